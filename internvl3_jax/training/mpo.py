"""Losses of Mixed Preference Optimization, from the log-probabilities of full answers.

    preference   DPO (Rafailov et al. 2023): the chosen answer over the rejected one
    quality      BCO (Jung et al. 2024): each answer by itself good or bad, compared with the mean
                 of the rewards so far (the reward shift)

MPO (Wang et al. 2024) adds both and the chosen answer's cross-entropy; see config.LossConfig. A
reward is beta times the log-probability ratio of policy and reference model. The functions follow
`concatenated_loss` of InternVL's trainer_dpo.py and trl's losses; the tests compare with trl.

Axes: B rows, T tokens, K pairs per row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from internvl3_jax.config import LossConfig, TrainConfig

KINDS = ("sft", "mpo", "vico", "router")
SHIFTS = ("running", "moving")
_LN2 = 0.6931471805599453


class RewardShift(NamedTuple):
    """Mean of the rewards so far, which BCO subtracts. It is saved with the run."""

    mean: Float32[Array, ""]
    count: Float32[Array, ""]  # number of contributions


def init_reward_shift() -> RewardShift:
    """Returns the shift before the first update."""
    return RewardShift(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))


def check(config: LossConfig) -> None:
    """Raises ValueError naming a field that is out of its range."""
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
            f"loss.beta is {config.beta} (above 0), loss.label_smoothing {config.label_smoothing} "
            f"(0 to 0.5), loss.reward_shift_decay {config.reward_shift_decay} (0 to 1): "
            f"one is out of its range"
        )


def needs_model(config: TrainConfig) -> bool:
    """Returns whether the train step takes the parameters of a reference model.

    It does under "vico" and "router". It does not under "sft", nor under "mpo" where the
    log-probabilities come with the batch or the frozen base of LoRA adapters is the reference.
    """
    if config.loss.kind in ("vico", "router"):
        return True
    is_base = config.lora.rank and not config.lora.full and not config.loss.ref_model
    return config.loss.kind == "mpo" and not config.data.ref_logps_file and not is_base


def reference_dtype(config: TrainConfig) -> str:
    """Returns the dtype that the reference model's parameters are stored in."""
    return config.loss.ref_model_dtype or config.compute_dtype


def answer_sums(
    values: Float[Array, "B T"], answers: Int[Array | np.ndarray, "B T"], pairs: int
) -> Float[Array, "B K 2"]:
    """Returns the sums of values over each answer's targets, chosen answers first.

    Args:
      answers: Number of the answer that a target belongs to, as in `Batch`; 0 for none.
      pairs: K.
    """
    # Compared with a counter, not scattered: sharded rows stay on their devices.
    is_member = answers[..., None] == jnp.arange(1, 2 * pairs + 1)[None, None]
    return jnp.where(is_member, values[..., None], 0.0).sum(axis=1).reshape(len(answers), pairs, 2)


def at_answers(
    values: Float[Array, "B K 2"], answers: Int[Array | np.ndarray, "B T"]
) -> Float[Array, "B T"]:
    """Returns each answer's value at its targets, and 0 elsewhere."""
    flat = jnp.pad(values.reshape(len(answers), -1), ((0, 0), (1, 0)))
    return jnp.take_along_axis(flat, answers, axis=1)


def preference_loss(
    policy: Float[Array | np.ndarray, "B K 2"],
    reference: Float[Array | np.ndarray, "B K 2"],
    config: LossConfig,
) -> Float[Array, "B K"]:
    """Returns DPO's loss of each pair, from the log-probabilities of its answers."""
    gain = policy - reference
    margin = gain[..., 0] - gain[..., 1]
    right = jax.nn.log_sigmoid(config.beta * margin)
    wrong = jax.nn.log_sigmoid(-config.beta * margin)
    return -(1 - config.label_smoothing) * right - config.label_smoothing * wrong


def quality_loss(
    policy: Float[Array | np.ndarray, "B K 2"],
    reference: Float[Array | np.ndarray, "B K 2"],
    shift: Float[Array, ""] | float,
    beta: float,
) -> Float[Array, "B K"]:
    """Returns BCO's loss of each pair: that of both answers. The shift gets no gradient."""
    rewards = beta * (policy - reference) - jax.lax.stop_gradient(shift)
    return -jax.nn.log_sigmoid(rewards[..., 0]) - jax.nn.log_sigmoid(-rewards[..., 1])


def running_shift(
    shift: RewardShift,
    rewards: Float[Array | np.ndarray, "B K 2"],
    present: Bool[Array | np.ndarray, "B K"],
) -> RewardShift:
    """Adds the rewards of the pairs that are present to the mean of all contributions.

    As in InternVL's code, each micro-batch is one contribution, and the shift that `quality_loss`
    takes contains its own rewards.
    """
    mean = jnp.where(present[..., None], rewards, 0.0).sum() / (2 * jnp.maximum(present.sum(), 1))
    count = shift.count + 1
    return RewardShift(shift.mean + (mean - shift.mean) / count, count)


def moving_shift(shift: RewardShift, mean: Float[Array, ""], decay: float) -> RewardShift:
    """Adds the mean reward of an update to the exponential mean of the earlier ones (the paper)."""
    rate = jnp.where(shift.count == 0, 1.0, 1 - decay)
    return RewardShift(shift.mean + rate * (mean - shift.mean), shift.count + 1)


def at_start(config: LossConfig) -> float:
    """Returns the weighted preference and quality loss of a policy that is the reference model."""
    return (config.preference_weight + 2 * config.quality_weight) * _LN2
