"""What a part of a batch adds to the loss of an update: next-token cross-entropy, or the three losses of MPO (preference.py).

B rows, T tokens, K pairs a row, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from internvl3_jax.config import LossConfig
from internvl3_jax.training.losses import chunked_cross_entropy
from internvl3_jax.training.mpo import Shift, answer_sums, at_answers, preference_loss, quality_loss, running_shift


class Head(NamedTuple):
    """What turns hidden states [B,T,D] into losses, but for the matrix."""

    vocab_size: int
    chunk: int

    def losses(self, hidden, kernel, batch, weights):
        """(f32[] sum of weight * loss, f32[B,T] losses without gradient); weights f32[B,T]"""
        return chunked_cross_entropy(hidden, kernel, batch["targets"], weights, self.vocab_size, self.chunk)

    def log_probabilities(self, hidden, kernel, batch, pairs: int):
        """f32[B,K,2] of whole answers, chosen first; without gradient."""
        answered = (batch["answers"] > 0).astype(jnp.float32)
        hidden, kernel = jax.lax.stop_gradient((hidden, kernel))
        return -answer_sums(self.losses(hidden, kernel, batch, answered)[1], batch["answers"], pairs)


class Whole(NamedTuple):
    """Of all of an update's batch: what sums of its parts are divided by."""

    weight: jax.Array  # f32[], sum of the loss weights
    pairs: jax.Array  # f32[]


def whole(batch) -> Whole:
    answers = batch["answers"].max(axis=1) if "answers" in batch else jnp.zeros((), jnp.int32)
    return Whole(batch["loss_weights"].sum(), (answers.sum() / 2).astype(jnp.float32))


def supervised(head: Head, hidden, kernel, part, of: Whole):
    """(f32[] loss, f32[B,T] losses)"""
    total, losses = head.losses(hidden, kernel, part, part["loss_weights"])
    return total / of.weight, losses


def preferred(
    head: Head,
    hidden,
    kernel,
    part,
    of: Whole,
    shift: Shift,
    reference: Callable[[], jax.Array],
    config: LossConfig,
    pairs: int,
):
    """(f32[] loss, f32[B,T] losses, metrics of f32[], the shift that it took). reference: makes its log-probabilities f32[B,K,2].

    The losses are of log-probabilities of whole answers, so how much a token counts is known only when all of them are. The head
    therefore runs twice: for the log-probabilities, and for a sum of token losses, weighted so that its gradient is the loss' own.
    """
    answers = part["answers"]
    policy, of_reference = head.log_probabilities(hidden, kernel, part, pairs), reference()
    lengths = jnp.maximum(answer_sums((answers > 0).astype(jnp.float32), answers, pairs), 1.0)
    present = answers.max(axis=1)[:, None] > 2 * jnp.arange(pairs)[None]
    rewards = config.beta * (policy - of_reference)
    shift = running_shift(shift, rewards, present) if config.shift == "running" else shift

    def terms(policy):
        preference = preference_loss(policy, of_reference, lengths, config)
        quality = quality_loss(policy, of_reference, shift.mean, config.beta)
        found = {"preference": preference, "quality": quality}
        found = {name: jnp.where(present, value, 0.0).sum() / of.pairs for name, value in found.items()}
        return config.preference_weight * found["preference"] + config.quality_weight * found["quality"], found

    (paired, found), slopes = jax.value_and_grad(terms, has_aux=True)(policy)
    generation = part["loss_weights"] / of.weight
    # An answer's log-probability is minus the sum of its tokens' losses.
    weights = config.generation_weight * generation - at_answers(slopes, answers)
    surrogate, losses = head.losses(hidden, kernel, part, weights)
    found["generation"] = (losses * generation).sum()
    loss = paired + config.generation_weight * found["generation"]
    metrics = {f"loss_{name}": value for name, value in found.items()} | _reward_metrics(rewards, present, of)
    return loss + surrogate - jax.lax.stop_gradient(surrogate), losses, metrics, shift


def _reward_metrics(rewards, present, of: Whole) -> dict:
    chosen, rejected = rewards[..., 0], rewards[..., 1]
    values = {"chosen": chosen, "rejected": rejected, "margin": chosen - rejected, "accuracy": chosen > rejected}
    return {f"reward_{name}": jnp.where(present, value, 0.0).sum() / of.pairs for name, value in values.items()}
