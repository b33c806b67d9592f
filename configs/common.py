"""What the recipes of the released sizes share. A recipe's argument is a size, or a checkpoint that
names its own:

    --config configs/finetune.py:2b                              shapes from SIZES; set --config.init_from and --config.data.tokenizer
    --config configs/finetune.py:OpenGVLab/InternVL3-2B          shapes, processor, tokenizer and weights of that checkpoint

Sources in the recipes: [P3] the InternVL3 paper, arXiv 2504.10479; [S25] InternVL's
shell/internvl2.5 scripts, the nearest public ones for what the paper does not give; [S3] InternVL's
shell/internvl3.0/2nd_finetune scripts; [ours] chosen here.
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
ROWS = 512  # of a batch, packed [S25]
TOKENS, TILES = 16_384, 48  # of a row [S25: max_packed_tokens, num_images_expected]
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
    """A run of a size or checkpoint: bfloat16 compute, float32 parameters, cosine over `steps` with
    3 % warm-up [S25, S3].
    """
    model, processor, start = _model(name, drop_path)
    return TrainConfig(
        model=model,
        processor=processor,
        data=DataConfig(
            source="",
            tokenizer=start,
            rows=rows,
            **({"tokens_per_row": TOKENS, "tiles_per_row": TILES} | data),
        ),
        optimizer=OptimizerConfig(learning_rate=learning_rate, warmup_fraction=0.03, **optimizer),
        steps=steps,
        init_from=start,
        compute_dtype="bfloat16",
        remat_vision="full",  # [ours], as the reference's gradient checkpointing
        remat_language="full",
        checkpoint=CheckpointConfig(every=500),
        logging=LoggingConfig(every=10, tensorboard=True),
    )


def full_training(name: str, steps: int, data: dict) -> TrainConfig:
    """All parameters trained at the numbers of InternVL2.5's stage 2 [S25]."""
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
    """The released size that a name stands for or, of a checkpoint, is nearest to in width times
    depth.
    """
    if name in RELEASED:
        return name
    model = _model(name, 0.0)[0]
    return min(RELEASED, key=lambda size: abs(_width(SIZES[size]) - _width(model)))


def _width(model: ModelConfig) -> int:
    return model.language.hidden_size * model.language.num_layers


def _model(name: str, drop_path: float) -> tuple[ModelConfig, ProcessorConfig, str]:
    """(model, processor, where the weights are; "" for a size)."""
    if name in RELEASED:
        model, processor, start = SIZES[name], ProcessorConfig(), ""
    else:
        from convert.open import open_model
        from internvl3_jax.io.checkpoint_paths import resolve_checkpoint

        found = resolve_checkpoint(name)
        opened = open_model(found)
        model, processor, start = opened.config, opened.processor, str(found)
    return (
        dataclasses.replace(model, vision=dataclasses.replace(model.vision, drop_path=drop_path)),
        processor,
        start,
    )
