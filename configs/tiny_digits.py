"""Trains the digits model, which reads, counts, locates and compares handwritten digits.

    pip install -e '.[demo]'
    python train.py --config configs/tiny_digits.py --workdir runs/tiny_digits
    python examples/tiny_digits/recipe/evaluate.py runs/tiny_digits

It takes under ten minutes on two CPU cores and uses what the released sizes use, at a small size:
tiles by dynamic resolution, V2PE with a delta sampled for each image, packed rows, one loss. The
deltas stay near 1, since a tile has 4 tokens here: at 1/256 a whole image would take a tenth of a
position. With Muon such a tower learns to read single digits from about half as many images as with
AdamW.
"""

import pathlib

from internvl3_jax.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ProcessorConfig,
    TrainConfig,
)
from internvl3_jax.sizes import SIZES

ROOT = pathlib.Path(__file__).resolve().parent.parent


def get_config() -> TrainConfig:
    model = SIZES["tiny"]
    return TrainConfig(
        model=model,
        processor=tiny_processor(model),
        data=DataConfig(
            source="examples.tiny_digits.recipe.data:sources",
            tokenizer=str(ROOT / "examples" / "tiny_digits"),
            rows=11,
            tokens_per_row=144,
            tiles_per_row=11,
            packing_buffer=32,
            loss_reduction="token",
            deltas=("1", "1", "1/2"),
        ),
        optimizer=OptimizerConfig(
            name="muon", muon_learning_rate=0.02, learning_rate=2e-3, warmup_steps=50, beta2=0.99
        ),
        steps=1700,
        checkpoint=CheckpointConfig(every=250),
        scan_unroll=4,
    )


def tiny_processor(model: ModelConfig) -> ProcessorConfig:
    """Returns the processor of a model of this size: up to 6 tiles, no system message."""
    return ProcessorConfig(
        image_size=model.vision.image_size,
        tokens_per_tile=model.tokens_per_tile,
        max_tiles=6,
        system_message=None,
    )
