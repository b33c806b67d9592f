"""Settings that the recipes of the released sizes share.

The argument of a recipe is a size, or a checkpoint that brings its own shapes:

    --config configs/finetune.py:2b
        Shapes from SIZES, such as 3.5-8b of InternVL3.5; set --config.init_from and --config.data.tokenizer.
    --config configs/finetune.py:OpenGVLab/InternVL3-2B
        Shapes, processor, tokenizer and weights of that checkpoint.

Sources of the numbers: [P3] the InternVL3 paper, arXiv 2504.10479; [S25] InternVL's
shell/internvl2.5 scripts, the nearest public ones for what the paper does not give; [S3] InternVL's
shell/internvl3.0/2nd_finetune scripts; [M3] its shell/internvl3.0/mpo scripts; [ours] chosen here.
"""

import dataclasses

from internvl3_jax.config import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ProcessorConfig,
    TrainConfig,
)
from internvl3_jax.sizes import SIZES

RELEASED = ("1b", "2b", "8b", "9b", "14b", "38b", "78b")
# Packed rows of a batch [S25]
ROWS = 512
# Token and tile budget of a row [S25: max_packed_tokens, num_images_expected]
TOKENS, TILES = 16_384, 48
# Samples of a row: a limit lets NVIDIA GPUs use their fused attention [ours]
SAMPLES = 64
ALL_DELTAS = ("1", "1/2", "1/4", "1/8", "1/16", "1/32", "1/64", "1/128", "1/256")  # [P3 eq. 4]


def recipe(
    name: str,
    *,
    rows: int,
    steps: int,
    learning_rate: float,
    drop_path: float,
    data: dict,
    optimizer: dict,
) -> TrainConfig:
    """Returns a run of a size or checkpoint.

    It computes in bfloat16 with float32 parameters; the learning rate follows a cosine over `steps`
    with 3 % warm-up [S25, S3].

    Args:
      name: A size, or a checkpoint.
      data: More fields of DataConfig.
      optimizer: More fields of OptimizerConfig.
    """
    model, processor, start = _model(name, drop_path)
    return TrainConfig(
        model=model,
        processor=processor,
        data=DataConfig(
            source="",
            tokenizer=start,
            rows=rows,
            **(
                {"tokens_per_row": TOKENS, "tiles_per_row": TILES, "samples_per_row": SAMPLES}
                | data
            ),
        ),
        optimizer=OptimizerConfig(learning_rate=learning_rate, warmup_fraction=0.03, **optimizer),
        steps=steps,
        init_from=start,
        compute_dtype="bfloat16",
        remat_vision="full",  # [ours], as InternVL's gradient checkpointing
        remat_language="full",
        checkpoint=CheckpointConfig(every=500),
        logging=LoggingConfig(every=10, tensorboard=True),
    )


def full_training(name: str, steps: int, data: dict) -> TrainConfig:
    """Returns a run of all parameters with the numbers of InternVL2.5's stage 2 [S25]."""
    size = size_of(name)
    large = size in ("38b", "78b")
    return recipe(
        name,
        rows=ROWS,
        steps=steps,
        learning_rate=2e-5 if large else 4e-5,
        drop_path=0.4 if large else 0.1,
        data=data,
        optimizer={"weight_decay": 0.01 if size in ("1b", "2b") else 0.05},
    )


def size_of(name: str) -> str:
    """Returns the released size of a name or, for a checkpoint, the nearest by width x depth."""
    if name in RELEASED:
        return name
    model = _model(name, 0.0)[0]
    return min(RELEASED, key=lambda size: abs(_width(SIZES[size]) - _width(model)))


def _width(model: ModelConfig) -> int:
    return model.language.hidden_size * model.language.num_layers


def _model(name: str, drop_path: float) -> tuple[ModelConfig, ProcessorConfig, str]:
    """Returns (model, processor, checkpoint of the weights or "" for a size)."""
    if name in SIZES and name != "tiny":
        model, processor, start = SIZES[name], ProcessorConfig(), ""
    else:
        from convert.open import open_model
        from internvl3_jax.io.checkpoint_paths import resolve_checkpoint

        checkpoint = resolve_checkpoint(name)
        opened = open_model(checkpoint)
        model, processor, start = opened.config, opened.processor, str(checkpoint)
    return (
        dataclasses.replace(model, vision=dataclasses.replace(model.vision, drop_path=drop_path)),
        processor,
        start,
    )
