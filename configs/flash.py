"""The two stages of InternVL3.5-Flash in miniature: the digits model compresses blank tiles.

    python examples/flash/run.py runs/flash                             all of it, and the table
    python train.py --config configs/flash.py:vico --workdir runs/flash/vico
    python train.py --config configs/flash.py:router --workdir runs/flash/router

"vico" learns to answer alike with compressed tiles, "router" which tiles to compress. The stages
freeze what has no gradient: the router in the first, everything else in the second, and in both the
parts of the pooling that nothing reads.

All seven tiles of a sheet are judged in each update, in labels that are noisy one by one: what a
tile costs depends on the question.
"""

import dataclasses

from configs.tiny_digits import get_config as tiny_digits
from internvl3_jax.config import (
    CheckpointConfig,
    LoggingConfig,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
)

UNUSED = ("flash/pooling/(attn|norm)[34]/.*",)
# Stage -> initial weights, frozen parameters, steps, learning rate
STAGES = {
    "vico": ("runs/flash/start", ("vision/.*", "flash/(pooling|gating)/.*"), 700, 2e-3),
    "router": (
        "runs/flash/vico",
        ("vision/.*", "projector/.*", "language/.*", "flash/projector/.*", *UNUSED),
        80,
        1e-3,
    ),
}


def get_config(stage: str = "vico") -> TrainConfig:
    """stage: "vico" or "router"."""
    if stage not in STAGES:
        raise ValueError(f"configs/flash.py has the stages {' and '.join(STAGES)}, not {stage!r}")
    start, freeze, steps, rate = STAGES[stage]
    config = tiny_digits()
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, flash=True, flash_absolute=0.5),
        data=dataclasses.replace(
            config.data,
            source="examples.flash.data:sources",
            rows=6,
            tokens_per_row=160,
            tiles_per_row=14,
        ),
        loss=LossConfig(kind=stage, ref_model="runs/flash/start", router_tiles=7),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=rate,
            warmup_steps=10,
            beta2=0.99,
            freeze=freeze,
            projector_lr_scale=0.5,
            language_lr_scale=0.5,
        ),
        steps=steps,
        init_from=start,
        checkpoint=CheckpointConfig(every=1000, keep=1, keep_best=False),
        logging=LoggingConfig(every=10),
    )
