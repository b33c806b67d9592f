"""The losses that a run minimizes: functions of one signature, chosen once by loss_choice.py.

    loss_fn(params, batch, key, loss_state, totals, ref_params) -> loss, (metrics, loss_state)

`SftLoss` is next-token cross-entropy; `MpoLoss` adds the preference and quality losses of mpo.py.
flash_loss.py has those of InternVL3.5-Flash. All are sums over a micro-batch, divided by the
`totals` of the full batch, so that the losses and gradients of micro-batches add up. `loss_state`
is carried from one micro-batch and update to the next. Without a key there is no dropout and
nothing is updated; so models are evaluated.

Axes: B rows, T tokens, K pairs per row, D width, V vocabulary.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from internvl3_jax.config import LoraConfig, LossConfig
from internvl3_jax.model import lora
from internvl3_jax.model.experts import STATISTICS
from internvl3_jax.model.internvl import InternVL
from internvl3_jax.training import mpo
from internvl3_jax.training.balance import balance_loss, statistics_of
from internvl3_jax.training.losses import chunked_cross_entropy


class BatchTotals(NamedTuple):
    """Normalizers over the full batch of an update."""

    weight: Float32[Array, ""]  # sum of the loss weights
    pairs: Float32[Array, ""]  # number of pairs
    tokens: Float32[Array, ""]  # number of tokens without padding
    samples: Float32[Array, ""]  # number of samples


def batch_totals(batch: Mapping) -> BatchTotals:
    """Returns the totals of a full batch, whose axes B and T may be sharded."""
    answers = batch["answers"].max(axis=1) if "answers" in batch else jnp.zeros((), jnp.int32)
    pairs = (answers.sum() / 2).astype(jnp.float32)
    samples = batch["segments"].max(axis=1).sum().astype(jnp.float32)
    return BatchTotals(batch["loss_weights"].sum(), pairs, _num_tokens(batch), samples)


def _num_tokens(batch: Mapping) -> Float32[Array, ""]:
    return (batch["segments"] > 0).sum().astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class SftLoss:
    """Next-token cross-entropy, weighted by batch["loss_weights"].

    Attributes:
      chunk: Tokens per device whose logits exist at a time.
      num_sources: Number of data sources. Above 0 the batch has "sources" i32[B,T], and the metrics
        hold the sums source_loss and source_weight, f32[num_sources].
      scaling: Rope scaling; None takes the model's.
      adapters: Settings of the LoRA adapters in the parameters, if there are any.
      drop_path: Whether the vision tower drops paths.
      balance: Weight of the loss that balances experts. A decoder with experts also reports
        loss_balance and expert_choices f32[L,E], the tokens that chose each expert.
    """

    model: InternVL
    chunk: int = 1024
    num_sources: int = 0
    scaling: str | None = None
    adapters: LoraConfig | None = None
    drop_path: bool = True
    balance: float = 0.0

    def init(self) -> mpo.RewardShift | tuple:
        """Returns the first loss state."""
        return ()

    def __call__(self, params, batch, key, loss_state, totals: BatchTotals, ref_params=None):
        hidden, kernel, routing = self.routed_outputs(params, batch, key)
        total, losses = self.token_losses(hidden, kernel, batch, batch["loss_weights"])
        balance, metrics = self.balance_terms(routing, batch, totals)
        metrics |= self.by_source(batch, losses)
        return total / totals.weight + balance, (metrics, loss_state)

    def finish(self, loss_state, metrics: dict):
        """Returns the loss state after an update, and metrics to add.

        Args:
          metrics: Sums over the micro-batches of the update.
        """
        return loss_state, {}

    def outputs(
        self, params: Mapping, batch: Mapping, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "D V"]]:
        """Returns the hidden states and the head's kernel.

        Args:
          key: Seeds drop path and dropout; None disables both.
        """
        return self._outputs(params, batch, key)[:2]

    def routed_outputs(self, params: Mapping, batch: Mapping, key: PRNGKeyArray | None):
        """Returns `outputs`, and the statistics of the routers where experts are trained.

        The statistics are {} without a key, or without experts.
        """
        counts = key is not None and self.model.config.language.num_experts > 0
        return self._outputs(params, batch, key, [STATISTICS] if counts else False)

    def balance_terms(self, routing: Mapping, batch: Mapping, totals: BatchTotals):
        """Returns the micro-batch's share of the loss that balances experts, and metrics.

        Loads are balanced within each micro-batch, which counts by its tokens.
        """
        if not routing:
            return 0.0, {}
        tokens = _num_tokens(batch)
        loss = balance_loss(**routing, tokens=tokens) * tokens / totals.tokens
        metrics = {"loss_balance": loss, "expert_choices": routing["chosen"]}
        return self.balance * loss, jax.lax.stop_gradient(metrics)

    def _outputs(self, params, batch, key, mutable=False):
        variables = lora.variables(params, self.adapters, training=key is not None)
        rngs = None if key is None else {"drop_path": key, "dropout": jax.random.fold_in(key, 1)}
        deterministic = key is None or not self.drop_path
        arguments = batch, deterministic, self.scaling
        options = {"rngs": rngs, "method": InternVL.hidden, "mutable": mutable}
        found = self.model.apply(variables, *arguments, **options)
        hidden, state = found if mutable else (found, None)
        kernel = self.model.apply(variables, method=InternVL.head_kernel)
        return hidden, kernel, statistics_of(state) if mutable else {}

    def token_losses(
        self,
        hidden: Float[Array, "B T D"],
        kernel: Float[Array, "D V"],
        batch: Mapping,
        weights: Float[Array, "B T"],
    ) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
        """Returns the sum of weight * loss and, without gradient, the loss of each token."""
        vocab_size = self.model.config.language.vocab_size
        return chunked_cross_entropy(
            hidden, kernel, batch["targets"], weights, vocab_size, self.chunk
        )

    def by_source(self, batch: Mapping, losses: Float[Array, "B T"]) -> dict:
        """Returns the sums of weighted losses and of weights by source, or {} without sources."""
        if not self.num_sources:
            return {}
        # Compared with a counter, not scattered: sharded rows stay on their devices.
        is_source = batch["sources"][..., None] == jnp.arange(self.num_sources)[None, None]
        values = {
            "source_loss": losses * batch["loss_weights"],
            "source_weight": batch["loss_weights"],
        }
        return {
            name: jnp.where(is_source, value[..., None], 0.0).sum((0, 1))
            for name, value in values.items()
        }


@dataclasses.dataclass(frozen=True)
class MpoLoss(SftLoss):
    """Mixed Preference Optimization (Wang et al. 2024): DPO, BCO and cross-entropy of the chosen.

    The losses are functions of the log-probabilities of full answers, so that the gradient of a
    token's loss depends on all tokens of its pair. The head therefore runs twice: for the
    log-probabilities, and for a weighted sum of token losses that has the gradient of the loss.

    Attributes:
      pairs: K, the most pairs in a row.
    """

    config: LossConfig = LossConfig(kind="mpo")
    pairs: int = 16

    def init(self) -> mpo.RewardShift:
        return mpo.init_reward_shift()

    def __call__(
        self, params, batch, key, loss_state: mpo.RewardShift, totals: BatchTotals, ref_params=None
    ):
        # Log-probabilities of both models, and rewards
        config, answers = self.config, batch["answers"]
        hidden, kernel, routing = self.routed_outputs(params, batch, key)
        policy = self.log_probabilities(hidden, kernel, batch)
        reference = self.ref_logps(params, ref_params, batch)
        present = answers.max(axis=1)[:, None] > 2 * jnp.arange(self.pairs)[None]
        rewards = config.beta * (policy - reference)
        if key is not None and config.reward_shift == "running":
            loss_state = mpo.running_shift(loss_state, rewards, present)

        # Preference and quality losses, and their slopes by the policy's log-probabilities
        def pair_loss(policy):
            preference = mpo.preference_loss(policy, reference, config)
            quality = mpo.quality_loss(policy, reference, loss_state.mean, config.beta)
            terms = {"preference": preference, "quality": quality}
            terms = {
                name: jnp.where(present, value, 0.0).sum() / totals.pairs
                for name, value in terms.items()
            }
            loss = config.preference_weight * terms["preference"]
            return loss + config.quality_weight * terms["quality"], terms

        (loss, terms), slopes = jax.value_and_grad(pair_loss, has_aux=True)(policy)

        # Cross-entropy, and a surrogate with the gradient of the full loss. The log-probability of
        # an answer is minus the sum of its tokens' losses.
        generation = batch["loss_weights"] / totals.weight
        weights = config.generation_weight * generation - mpo.at_answers(slopes, answers)
        surrogate, losses = self.token_losses(hidden, kernel, batch, weights)
        terms["generation"] = (losses * generation).sum()
        loss += config.generation_weight * terms["generation"]
        metrics = {f"loss_{name}": value for name, value in terms.items()} | _reward_metrics(
            rewards, present, totals
        )

        # The value is the loss, the gradient that of the surrogate.
        loss = loss + surrogate - jax.lax.stop_gradient(surrogate)
        balance, more = self.balance_terms(routing, batch, totals)
        return loss + balance, (metrics | more | self.by_source(batch, losses), loss_state)

    def finish(self, loss_state: mpo.RewardShift, metrics: dict):
        used = {"reward_shift": loss_state.mean}
        if self.config.reward_shift == "moving":
            mean = (metrics["reward_chosen"] + metrics["reward_rejected"]) / 2
            loss_state = mpo.moving_shift(loss_state, mean, self.config.reward_shift_decay)
        return loss_state, used

    def log_probabilities(
        self, hidden: Float[Array, "B T D"], kernel: Float[Array, "D V"], batch: Mapping
    ) -> Float[Array, "B K 2"]:
        """Returns the log-probabilities of full answers, chosen first, without gradient."""
        answered = (batch["answers"] > 0).astype(jnp.float32)
        hidden, kernel = jax.lax.stop_gradient((hidden, kernel))
        _, losses = self.token_losses(hidden, kernel, batch, answered)
        return -mpo.answer_sums(losses, batch["answers"], self.pairs)

    def ref_logps(
        self, params: Mapping, ref_params: Mapping | None, batch: Mapping
    ) -> Float[Array, "B K 2"]:
        """Returns the log-probabilities of answers under the reference model.

        They come with the batch ("reference"), or are computed with `ref_params` or, where these
        are None, with `params` without their adapters.
        """
        if "reference" in batch:
            return mpo.answer_sums(batch["reference"], batch["answers"], self.pairs)
        base = lora.base_params(params) if ref_params is None else ref_params
        return self.log_probabilities(*self.outputs(base, batch), batch)


def _reward_metrics(rewards, present, totals: BatchTotals) -> dict:
    """Returns sums over the pairs, divided by the number of pairs of the full batch."""
    chosen, rejected = rewards[..., 0], rewards[..., 1]
    values = {
        "chosen": chosen,
        "rejected": rejected,
        "margin": chosen - rejected,
        "accuracy": chosen > rejected,
    }
    return {
        f"reward_{name}": jnp.where(present, value, 0.0).sum() / totals.pairs
        for name, value in values.items()
    }
