"""Writes the tiny checkpoints of a pack: each family with random weights, in both layouts."""

import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

from internvl3_jax.checkpoints.hf.assemble import (
    padded_shape,
    tensors_from_params,
    vocabulary_slice,
)
from internvl3_jax.checkpoints.hf.config import LAYOUTS, from_hf
from internvl3_jax.checkpoints.hf.internlm2 import FileWriter
from internvl3_jax.checkpoints.hf.mapping import active_rows
from internvl3_jax.checkpoints.storage import nest
from internvl3_jax.config import ModelConfig
from internvl3_jax.parity import tiny_config, tiny_tokenizer


def write(folder: pathlib.Path, name: str, seed: int) -> dict[str, pathlib.Path]:
    """Writes a family's tiny checkpoint into `folder`/LAYOUT; returns the directory by layout."""
    files = tiny_tokenizer.build(thinks=name == "internvl3_5")
    added = json.loads(files["added_tokens.json"])
    vocabulary = 1 + max(added.values())
    configs = {
        "internvl": tiny_config.original(name, vocabulary),
        "hf": tiny_config.transformers(name, vocabulary, added["<IMG_CONTEXT>"]),
    }
    model = from_hf(configs["internvl"], image_token_id=added["<IMG_CONTEXT>"], has_head=True)
    params = random_params(model, seed)
    for layout in LAYOUTS:
        directory = folder / layout
        directory.mkdir(parents=True)
        for file, content in files.items():
            (directory / file).write_bytes(content)
        for file, content in (
            ("config.json", configs[layout]),
            ("preprocessor_config.json", tiny_config.preprocessor(layout)),
        ):
            (directory / file).write_text(json.dumps(content, indent=1))
        tensors = _named(model, tensors_from_params(model, params, layout), layout)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return {layout: folder / layout for layout in LAYOUTS}


def random_params(model: ModelConfig, seed: int) -> dict:
    """Samples every parameter, f32: scales around 1, layer scales around 0.5, the rest so that
    activations stay near 1. Fresh parameters, with biases at 0 and scales at 1, would hide faults.
    """
    rng = np.random.default_rng(seed)
    leaves = {}
    for row in active_rows(model):
        shape, name = padded_shape(row, model), row.target.rpartition("/")[2]
        noise = rng.standard_normal(shape, np.float32)
        if name == "kernel":
            noise *= np.float32(shape[-2] ** -0.5)
        elif name.startswith("layer_scale"):
            noise = 0.5 + 0.1 * noise
        elif name == "scale":
            noise = 1 + 0.2 * noise
        elif name == "bias":
            noise *= 0.2
        leaf = np.zeros(shape, np.float32)
        inside = (..., *vocabulary_slice(row, model))
        leaf[inside] = noise[inside]
        leaves[row.target] = leaf
    return nest(leaves)


class _Collected(dict):
    """Takes the place of a file's writer."""

    def write(self, name: str, tensor: np.ndarray) -> None:
        self[name] = np.ascontiguousarray(tensor)


def _named(model: ModelConfig, tensors: dict, layout: str) -> dict[str, np.ndarray]:
    """Returns tensors under the names of the files; InternLM2's original ones are its own."""
    collected = _Collected()
    is_internlm2 = model.language.family == "internlm2" and layout == "internvl"
    writer = FileWriter(collected, model, layout) if is_internlm2 else collected
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    return dict(collected)
