"""A tiny model with random weights and the digits tokenizer, in memory and as a checkpoint
directory.
"""

import atexit
import dataclasses
import functools
import pathlib
import shutil
import tempfile

import jax
import numpy as np

from examples.tiny_digits.recipe import tokenizer as tiny_tokenizer
from internvl3_jax.checkpoints.checkpoint import save_checkpoint
from internvl3_jax.config import (
    CheckpointConfig,
    DataConfig,
    LanguageConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ProcessorConfig,
    TrainConfig,
    VisionConfig,
)
from internvl3_jax.model.internvl import abstract_params

TOKENIZER = pathlib.Path(__file__).resolve().parents[2] / "examples" / "tiny_digits"

VISION = VisionConfig(
    image_size=16, patch_size=4, hidden_size=24, num_layers=2, num_heads=3, intermediate_size=40
)
LANGUAGE = LanguageConfig(
    vocab_size=460,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    rope_theta=1e4,
    max_position=2048,
)
CONFIG = ModelConfig(vision=VISION, language=LANGUAGE, image_token_id=453)  # 4 tokens a tile
FLASH = dataclasses.replace(  # with a router, which compresses some of the tiles of noise
    CONFIG,
    vision=dataclasses.replace(VISION, hidden_size=32, num_heads=4),
    flash=True,
    flash_relative=0.4,
    flash_absolute=0.2,
)
PROCESSOR = ProcessorConfig(image_size=16, tokens_per_tile=4, max_tiles=4, system_message=None)


def random_params(config: ModelConfig, seed: int = 0) -> dict:
    """Samples every parameter, f32: scales around 1, layer scales around 0.5, the rest so that
    activations stay near 1.

    Freshly initialized parameters would hide mistakes: their biases are zero and their scales are
    constant.
    """
    rng = np.random.default_rng(seed)
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract_params(config))
    drawn = []
    for path, leaf in leaves:
        name, noise = path[-1].key, rng.standard_normal(leaf.shape, np.float32)
        if name == "kernel":
            noise *= leaf.shape[-2] ** -0.5
        elif name.startswith("layer_scale"):
            noise = 0.5 + 0.1 * noise
        elif name == "scale":
            noise = 1 + 0.2 * noise
        elif name == "bias":
            noise *= 0.2
        drawn.append(noise.astype(np.float32))
    return jax.tree_util.tree_unflatten(tree, drawn)


@functools.cache
def tokenizer_files() -> dict[str, bytes]:
    return tiny_tokenizer.build()


@functools.cache
def directory() -> pathlib.Path:
    """Writes the checkpoint on the first call; it is removed when the process ends."""
    parent = pathlib.Path(tempfile.mkdtemp(prefix="tiny_checkpoint_"))
    atexit.register(shutil.rmtree, parent, ignore_errors=True)
    save_checkpoint(parent / "tiny", random_params(CONFIG), CONFIG, PROCESSOR, tokenizer_files())
    return parent / "tiny"


def train_config() -> TrainConfig:
    """Returns the configuration of a short run of this model on digits."""
    return TrainConfig(
        model=CONFIG,
        processor=PROCESSOR,
        data=DataConfig(
            source="examples.tiny_digits.recipe.data:sources",
            tokenizer=str(TOKENIZER),
            rows=2,
            tokens_per_row=256,
            tiles_per_row=12,
            packing_buffer=4,
            deltas=("1", "1/2", "1/4"),
        ),
        optimizer=OptimizerConfig(name="muon", learning_rate=3e-3, warmup_steps=2),
        steps=30,
        checkpoint=CheckpointConfig(every=4, keep=2),
        logging=LoggingConfig(every=1),
    )


def changed(config: TrainConfig, **changes) -> TrainConfig:
    """Returns the configuration with other fields. GROUP__FIELD is a field of a group, such as
    checkpoint__every.
    """
    groups: dict[str, dict] = {}
    for name in [name for name in changes if "__" in name]:
        group, field = name.split("__", 1)
        groups.setdefault(group, {})[field] = changes.pop(name)
    config = dataclasses.replace(config, **changes)
    return dataclasses.replace(
        config,
        **{
            group: dataclasses.replace(getattr(config, group), **fields)
            for group, fields in groups.items()
        },
    )


def make_image(width: int, height: int, seed: int = 0):
    """Returns a PIL image of noise."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
