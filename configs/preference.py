"""MPO in miniature: the model of examples/preference learns from pairs of its own answers.

    python examples/preference/run.py runs/preference                     all of it, and the table
    python train.py --config configs/preference.py:mpo --workdir runs/preference/mpo

The losses and their weights are those of the released sizes (configs/mpo.py). "generation" trains
on the cross-entropy of the chosen answers alone; the difference shows what the rejected answers
add. Learning rate and steps are for so small a model.
"""

import dataclasses

from configs.process_reward import get_config as process_reward
from internvl3_jax.config import LoggingConfig, LossConfig, OptimizerConfig, TrainConfig

LOSSES = {
    "mpo": LossConfig(kind="mpo"),
    "generation": LossConfig(kind="mpo", preference_weight=0.0, quality_weight=0.0),
}
STEPS = 150


def get_config(loss: str = "mpo") -> TrainConfig:
    """Returns the recipe with a loss, "mpo" or "generation"."""
    if loss not in LOSSES:
        raise ValueError(
            f"configs/preference.py has the losses {' and '.join(LOSSES)}, not {loss!r}"
        )
    config = process_reward("policy")
    data = dataclasses.replace(
        config.data, pairs=True, share_question=True, loss_reduction="sample"
    )
    return dataclasses.replace(
        config,
        data=data,
        loss=LOSSES[loss],
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=10),
        steps=STEPS,
        logging=LoggingConfig(every=10),
    )
