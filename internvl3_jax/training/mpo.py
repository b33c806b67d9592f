"""Losses of preference optimisation from log-probabilities of whole answers; pure functions, one
number for each pair.

    preference   DPO (Rafailov et al. 2023): the chosen answer rather than the rejected one
    quality      BCO (Jung et al. 2024): each answer by itself good or bad, against the rewards seen so far (the shift)

MPO (Wang et al. 2024) adds both and the chosen answer's cross-entropy (config.LossConfig). A reward
is beta times what the policy adds to the reference's log-probability. Follows `concatenated_loss`
of InternVL's trainer_dpo.py and trl's losses, to which the tests compare.

B rows, T tokens, K pairs a row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from internvl3_jax.config import LossConfig, TrainConfig

KINDS = ("sft", "mpo")
SHIFTS = ("running", "moving")


class RewardShift(NamedTuple):
    """Mean of the rewards so far, BCO's shift. Kept with the run."""

    mean: jax.Array  # f32[]
    count: jax.Array  # f32[], contributions


def init_reward_shift() -> RewardShift:
    return RewardShift(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))


def check(config: LossConfig) -> None:
    """ValueError naming the field that makes no sense."""
    for name, known in (("kind", KINDS), ("reward_shift", SHIFTS)):
        if getattr(config, name) not in known:
            raise ValueError(
                f"loss.{name} is {getattr(config, name)!r}; it must be one of {', '.join(known)}"
            )
    weights = {
        name: getattr(config, f"{name}_weight") for name in ("preference", "quality", "generation")
    }
    if min(weights.values()) < 0 or not any(weights.values()):
        raise ValueError(
            f"loss weights are {weights}; none may be negative, and one must be above 0"
        )
    if (
        config.beta <= 0
        or not 0 <= config.label_smoothing < 0.5
        or not 0 <= config.reward_shift_decay < 1
    ):
        raise ValueError(
            f"loss.beta is {config.beta} (above 0), loss.label_smoothing {config.label_smoothing} (0 to 0.5), loss.reward_shift_decay "
            f"{config.reward_shift_decay} (0 to 1): one is out of its range"
        )


def needs_model(config: TrainConfig) -> bool:
    """Whether the step takes the parameters of a reference model: none under "sft", nor where its
    log-probabilities come with the batch or the base of adapters is the reference.
    """
    is_base = config.lora.rank and not config.lora.full and not config.loss.ref_model
    return config.loss.kind == "mpo" and not config.data.ref_logps_file and not is_base


def reference_dtype(config: TrainConfig) -> str:
    return config.loss.ref_model_dtype or config.compute_dtype


def answer_sums(values, answers, pairs: int):
    """Sums f32[B,K,2] over each answer's targets, chosen first: values f32[B,T], answers i32[B,T]
    as in `Batch`.
    """
    # Compared with a counter in place of a scatter: rows that are sharded stay where they are.
    member = answers[..., None] == jnp.arange(1, 2 * pairs + 1)[None, None]
    return jnp.where(member, values[..., None], 0.0).sum(axis=1).reshape(len(answers), pairs, 2)


def at_answers(values, answers):
    """f32[B,K,2] back at each answer's targets: f32[B,T], 0 elsewhere."""
    flat = jnp.pad(values.reshape(len(answers), -1), ((0, 0), (1, 0)))
    return jnp.take_along_axis(flat, answers, axis=1)


def preference_loss(policy, reference, config: LossConfig):
    """Returns DPO's loss of each pair, f32[B,K], from log-probabilities f32[B,K,2]."""
    gain = policy - reference
    margin = gain[..., 0] - gain[..., 1]
    right, wrong = (
        jax.nn.log_sigmoid(config.beta * margin),
        jax.nn.log_sigmoid(-config.beta * margin),
    )
    return -(1 - config.label_smoothing) * right - config.label_smoothing * wrong


def quality_loss(policy, reference, shift, beta: float):
    """f32[B,K] of both answers of each pair. shift: f32[], no gradient goes to it."""
    rewards = beta * (policy - reference) - jax.lax.stop_gradient(shift)
    return -jax.nn.log_sigmoid(rewards[..., 0]) - jax.nn.log_sigmoid(-rewards[..., 1])


def running_shift(shift: RewardShift, rewards, present) -> RewardShift:
    """As InternVL's code: the mean of all contributions, of which the rewards f32[B,K,2] of the
    pairs that are `present` bool[B,K] are the next. Each part of a batch is one, and has itself in
    the shift that `quality_loss` takes.
    """
    mean = jnp.where(present[..., None], rewards, 0.0).sum() / (2 * jnp.maximum(present.sum(), 1))
    count = shift.count + 1
    return RewardShift(shift.mean + (mean - shift.mean) / count, count)


def moving_shift(shift: RewardShift, mean, decay: float) -> RewardShift:
    """As its paper: the exponential mean of the updates before this one, whose rewards have the
    mean f32[].
    """
    rate = jnp.where(shift.count == 0, 1.0, 1 - decay)
    return RewardShift(shift.mean + rate * (mean - shift.mean), shift.count + 1)


def at_start(config: LossConfig) -> float:
    """Preference and quality, weighted, where the policy is the reference."""
    ln2 = 0.6931471805599453
    return (config.preference_weight + 2 * config.quality_weight) * ln2
