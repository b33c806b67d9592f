"""What a run minimizes: two loss functions of one signature, chosen once by `make_loss`.

    loss_fn(params, batch, key, loss_state, totals, ref_params) -> loss, (metrics, loss_state)

`SftLoss` is next-token cross-entropy; `MpoLoss` adds the preference and quality losses of mpo.py.
Both are sums over a micro-batch, divided by the `totals` of the whole batch, so that the losses and
gradients of micro-batches add up. `loss_state` is carried from one micro-batch and update to the
next. Without a key there is no dropout and nothing is updated: this is how a model is evaluated.

B rows, T tokens, K pairs a row, D width, V vocabulary.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from internvl3_jax.config import LoraConfig, LossConfig, TrainConfig
from internvl3_jax.model import lora
from internvl3_jax.model.internvl import InternVL
from internvl3_jax.positions import rope_scaling
from internvl3_jax.training import mpo
from internvl3_jax.training.losses import chunked_cross_entropy


class BatchTotals(NamedTuple):
    """Normalizers over the full batch of an update."""

    weight: jax.Array  # f32[], sum of the loss weights
    pairs: jax.Array  # f32[], number of pairs


def batch_totals(batch) -> BatchTotals:
    answers = batch["answers"].max(axis=1) if "answers" in batch else jnp.zeros((), jnp.int32)
    return BatchTotals(batch["loss_weights"].sum(), (answers.sum() / 2).astype(jnp.float32))


def make_loss(
    config: TrainConfig, model: InternVL, num_sources: int = 0, drop_path: bool = True
) -> "SftLoss":
    """Returns the loss function that the configuration asks for.

    Args:
      num_sources: Number of data sources to report losses of; 0 reports none.
      drop_path: Whether the vision tower is trained, and so drops paths.
    """
    options = {
        "chunk": config.loss_chunk,
        "num_sources": num_sources,
        "scaling": rope_scaling(config.model.language, config.data.deltas),
        "adapters": config.lora,
        "drop_path": drop_path,
    }
    if config.loss.kind == "sft":
        return SftLoss(model, **options)
    # Under MPO drop path would set the policy apart from its reference.
    options["drop_path"] &= config.loss.drop_path
    return MpoLoss(model, **options, config=config.loss, pairs=config.data.pairs_per_row)


@dataclasses.dataclass(frozen=True)
class SftLoss:
    """Next-token cross-entropy, weighted by batch["loss_weights"].

    Attributes:
      chunk: Tokens per device whose logits exist at a time.
      num_sources: Number of data sources; above 0 the batch has "sources" i32[B,T], and the metrics
          hold source_loss and
        source_weight, f32[num_sources] sums.
      scaling: Rope scaling; None takes the model's.
      adapters: Settings of the LoRA adapters in the parameters, if there are any.
      drop_path: Whether the vision tower drops paths.
    """

    model: InternVL
    chunk: int = 1024
    num_sources: int = 0
    scaling: str | None = None
    adapters: LoraConfig | None = None
    drop_path: bool = True

    def init(self) -> mpo.RewardShift | tuple:
        """Returns the first loss state."""
        return ()

    def __call__(self, params, batch, key, loss_state, totals: BatchTotals, ref_params=None):
        hidden, kernel = self.outputs(params, batch, key)
        total, losses = self.token_losses(hidden, kernel, batch, batch["loss_weights"])
        return total / totals.weight, (self.by_source(batch, losses), loss_state)

    def finish(self, loss_state, metrics: dict):
        """Returns the loss state after an update, whose metrics are the sums over its
        micro-batches, and metrics of its own.
        """
        return loss_state, {}

    def outputs(self, params, batch, key=None):
        """Returns the hidden states [B,T,D] and the head's kernel [D,V]. Without a key: no drop
        path and no dropout.
        """
        variables = lora.variables(params, self.adapters, training=key is not None)
        rngs = None if key is None else {"drop_path": key, "dropout": jax.random.fold_in(key, 1)}
        deterministic = key is None or not self.drop_path
        hidden = self.model.apply(
            variables, batch, deterministic, self.scaling, rngs=rngs, method=InternVL.hidden
        )
        return hidden, self.model.apply(variables, method=InternVL.head_kernel)

    def token_losses(self, hidden, kernel, batch, weights):
        """Returns the f32[] sum of weight * loss and, without gradient, the losses f32[B,T].
        weights: f32[B,T].
        """
        vocab_size = self.model.config.language.vocab_size
        return chunked_cross_entropy(
            hidden, kernel, batch["targets"], weights, vocab_size, self.chunk
        )

    def by_source(self, batch, losses) -> dict:
        """Returns the sums of weighted losses and of weights of each source; nothing if
        `num_sources` is 0.
        """
        if not self.num_sources:
            return {}
        # Compared with a counter in place of a scatter: rows that are sharded stay where they are.
        member = batch["sources"][..., None] == jnp.arange(self.num_sources)[None, None]
        values = {
            "source_loss": losses * batch["loss_weights"],
            "source_weight": batch["loss_weights"],
        }
        return {
            name: jnp.where(member, value[..., None], 0.0).sum((0, 1))
            for name, value in values.items()
        }


@dataclasses.dataclass(frozen=True)
class MpoLoss(SftLoss):
    """Mixed preference optimization (Wang et al. 2024) on a batch of pairs: DPO, BCO and the chosen
    answers' cross-entropy.

    The losses are functions of the log-probabilities of whole answers, so the weight of a token is
    known only when all of them are.
    The head therefore runs twice: for the log-probabilities, and for a sum of token losses whose
    weights make its gradient that of the loss.
    """

    config: LossConfig = LossConfig(kind="mpo")
    pairs: int = 16

    def init(self) -> mpo.RewardShift:
        return mpo.init_reward_shift()

    def __call__(
        self, params, batch, key, loss_state: mpo.RewardShift, totals: BatchTotals, ref_params=None
    ):
        config, answers = self.config, batch["answers"]
        hidden, kernel = self.outputs(params, batch, key)
        policy = self.log_probabilities(hidden, kernel, batch)
        reference = self.ref_logps(params, ref_params, batch)
        present = answers.max(axis=1)[:, None] > 2 * jnp.arange(self.pairs)[None]
        rewards = config.beta * (policy - reference)
        if key is not None and config.reward_shift == "running":
            loss_state = mpo.running_shift(loss_state, rewards, present)

        def pair_loss(policy):
            preference = mpo.preference_loss(policy, reference, config)
            quality = mpo.quality_loss(policy, reference, loss_state.mean, config.beta)
            parts = {"preference": preference, "quality": quality}
            parts = {
                name: jnp.where(present, value, 0.0).sum() / totals.pairs
                for name, value in parts.items()
            }
            return config.preference_weight * parts["preference"] + config.quality_weight * parts[
                "quality"
            ], parts

        (loss, parts), slopes = jax.value_and_grad(pair_loss, has_aux=True)(policy)
        generation = batch["loss_weights"] / totals.weight
        # The log-probability of an answer is minus the sum of its tokens' losses.
        weights = config.generation_weight * generation - mpo.at_answers(slopes, answers)
        surrogate, losses = self.token_losses(hidden, kernel, batch, weights)
        parts["generation"] = (losses * generation).sum()
        loss += config.generation_weight * parts["generation"]
        metrics = {f"loss_{name}": value for name, value in parts.items()} | _reward_metrics(
            rewards, present, totals
        )
        # The value is the loss, the gradient that of the surrogate.
        return loss + surrogate - jax.lax.stop_gradient(surrogate), (
            metrics | self.by_source(batch, losses),
            loss_state,
        )

    def finish(self, loss_state: mpo.RewardShift, metrics: dict):
        used = {"reward_shift": loss_state.mean}
        if self.config.reward_shift == "moving":
            mean = (metrics["reward_chosen"] + metrics["reward_rejected"]) / 2
            loss_state = mpo.moving_shift(loss_state, mean, self.config.reward_shift_decay)
        return loss_state, used

    def log_probabilities(self, hidden, kernel, batch):
        """Returns those of whole answers, f32[B,K,2], chosen first; without gradient."""
        answered = (batch["answers"] > 0).astype(jnp.float32)
        hidden, kernel = jax.lax.stop_gradient((hidden, kernel))
        _, losses = self.token_losses(hidden, kernel, batch, answered)
        return -mpo.answer_sums(losses, batch["answers"], self.pairs)

    def ref_logps(self, params, ref_params, batch):
        """Returns the reference model's log-probabilities f32[B,K,2].

        They come with the batch ("reference"), or are computed with `ref_params` or, where these
        are None, with `params` without their adapters.
        """
        if "reference" in batch:
            return mpo.answer_sums(batch["reference"], batch["answers"], self.pairs)
        base = lora.base_params(params) if ref_params is None else ref_params
        return self.log_probabilities(*self.outputs(base, batch), batch)


def _reward_metrics(rewards, present, totals: BatchTotals) -> dict:
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
