"""Writes tiny checkpoints in the released formats: every size at reduced width, random weights, a
small tokenizer, either layout.
"""

import dataclasses
import json
import pathlib

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from convert.config_json import to_hf
from convert.open import open_model
from convert.run import convert as convert_model
from examples.tiny_digits.recipe import tokenizer as tiny_tokenizer
from internvl3_jax.checkpoints.checkpoint import load
from internvl3_jax.checkpoints.hf.assemble import (
    padded_shape,
    tensors_from_params,
    vocabulary_slice,
)
from internvl3_jax.checkpoints.hf.mapping import active_rows
from internvl3_jax.checkpoints.storage import by_path, nest
from internvl3_jax.config import ModelConfig, ProcessorConfig
from internvl3_jax.sizes import SIZES

RELEASED = (
    *("1b", "2b", "8b", "9b", "14b", "38b", "78b"),
    *("2.5-4b", "3.5-1b", "3.5-4b", "3.5-8b", "3.5-38b", "3.5-30b-a3b"),
)
VOCABULARY = 463  # three rows more than the tokenizer has tokens: 448 + 12
IMAGE_TOKEN_ID = 453


def reduce(size: str) -> ModelConfig:
    """A size with the decoder's head counts, flags and norms, but narrow and shallow. The 6B tower
    keeps an odd head count, and Qwen3 heads that together are not as wide as the model.
    """
    model = SIZES[size]
    heads = 5 if model.vision.num_heads == 25 else 4
    vision = dataclasses.replace(
        model.vision,
        image_size=16,
        patch_size=4,
        hidden_size=4 * heads,
        num_layers=2,
        num_heads=heads,
        intermediate_size=24,
    )
    language = dataclasses.replace(
        model.language,
        vocab_size=VOCABULARY,
        hidden_size=4 * model.language.num_heads,
        num_layers=3,
        head_dim=6 if model.language.qk_norm else 4,
        intermediate_size=38,
    )
    if language.num_experts:
        language = dataclasses.replace(language, num_experts=5, experts_per_token=2, expert_size=14)
    return dataclasses.replace(
        model, vision=vision, language=language, image_token_id=IMAGE_TOKEN_ID
    )


def reduce_processor(model: ModelConfig, **changes) -> ProcessorConfig:
    return ProcessorConfig(
        image_size=model.vision.image_size, tokens_per_tile=model.tokens_per_tile, **changes
    )


def random_params(model: ModelConfig, seed: int = 0, dtype=ml_dtypes.bfloat16) -> dict:
    """Samples every parameter from a normal distribution; vocabulary padding stays zero."""
    generator = np.random.default_rng(seed)
    leaves = {}
    for row in active_rows(model):
        leaf = generator.standard_normal(padded_shape(row, model), np.float32).astype(dtype)
        if "V" in row.shape.split():
            inside = vocabulary_slice(row, model)
            kept = leaf[inside]
            leaf = np.zeros_like(leaf)
            leaf[inside] = kept
        leaves[row.target] = leaf
    return nest(leaves)


def write_released(
    directory: pathlib.Path,
    model: ModelConfig,
    layout: str,
    seed: int = 0,
    dtype=ml_dtypes.bfloat16,
) -> pathlib.Path:
    """Writes one safetensors file with the safetensors library, config.json and the tokenizer."""
    directory.mkdir(parents=True)
    tensors = tensors_from_params(model, random_params(model, seed, dtype), layout)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = to_hf(model, reduce_processor(model), layout, np.dtype(dtype).name)
    (directory / "config.json").write_text(json.dumps(config))
    for name, content in tiny_tokenizer.build().items():
        (directory / name).write_bytes(content)
    return directory


def convert(source, target, dtype=None, **options):
    return convert_model(open_model(pathlib.Path(source), dtype), target, **options)


def stored_tensors(directory) -> dict[str, np.ndarray]:
    """Reads all safetensors files of a directory with the safetensors library."""
    return {
        name: tensor
        for path in directory.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def same_tensors(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert tensor.tobytes() == np.asarray(other[name]).tobytes(), name


def params_of(directory) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in by_path(load(directory).params).items()}
