"""Writes LoRA adapters as PEFT does, for both released layouts; see peft.py."""

import json
import math
import pathlib
from collections.abc import Mapping

import numpy as np
from safetensors.numpy import save_file

from internvl3_jax.checkpoints.hf.assemble import ConversionError, leaf_tensors, stacked_indices
from internvl3_jax.checkpoints.hf.mapping import Row, active_rows
from internvl3_jax.checkpoints.hf.peft import PREFIX, check_names, module_of
from internvl3_jax.checkpoints.hf.peft_settings import WEIGHTS
from internvl3_jax.checkpoints.storage import by_path
from internvl3_jax.config import LoraConfig, ModelConfig
from internvl3_jax.io.checkpoint_paths import PEFT
from internvl3_jax.model import lora

_NO_NUMBERS = "", ""  # in place of those of layer and expert


def write_peft(
    directory: pathlib.Path,
    own: Mapping,
    config: LoraConfig,
    model: ModelConfig,
    layout: str,
    base: str,
) -> dict[str, np.ndarray]:
    """Writes the adapter of a LoRA run, or one of scale 1, as PEFT does; returns the tensors.

    Args:
      directory: an existing directory.
      own: the subtree "lora" with a and b as trained, and fully trained parameters.
      config: rank, alpha and dropout.
      model: configuration of the base.
      layout: "internvl" or "hf".
      base: name of the base in adapter_config.json.
    """
    check_names(model, layout)
    rows = {row.target: row for row in active_rows(model)}
    tensors, ranks = {}, {}
    for path, (a, b) in _pairs(own[lora.SUBTREE]).items():
        row = rows[f"{path}/kernel"]
        ranks[row] = a.shape[-1]
        for index in stacked_indices(row, model):
            modules = [name.removesuffix(".weight") for name in row.keys(layout, index)]
            down, up = a[index], b[index]
            for module, columns in zip(modules, np.split(up, len(modules), axis=1), strict=True):
                tensors[f"{PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(down.T)
                tensors[f"{PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(columns.T)
    whole = _whole_tensors(lora.base_params(own), rows, model, layout)
    tensors |= {PREFIX + name: tensor for name, tensor in whole.items()}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / PEFT).write_text(
        json.dumps(_config(config, ranks, whole, layout, base), indent=2) + "\n"
    )
    return tensors


def _pairs(adapters: Mapping) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns layer's path -> (a, b) in float32."""
    leaves = by_path(adapters)
    names = sorted({path.rpartition("/")[0] for path in leaves})
    return {
        name: tuple(np.asarray(leaves[f"{name}/{part}"], np.float32) for part in "ab")
        for name in names
    }


def _whole_tensors(
    whole: Mapping, rows: Mapping[str, Row], model: ModelConfig, layout: str
) -> dict[str, np.ndarray]:
    """Returns the tensors of fully trained parameters.

    ConversionError if they are only part of a torch module, which PEFT does not support.
    """
    if model.language.tie_embeddings and "language/embedding" in by_path(whole):
        raise ConversionError(
            "a fully trained tied embedding cannot be in a PEFT adapter; merge the run instead"
        )
    tensors = {}
    for path, leaf in by_path(whole).items():
        tensors |= dict(leaf_tensors(model, rows[path], np.asarray(leaf, np.float32), layout))
    modules = {module_of(name) for name in tensors}
    for row in active_rows(model):
        for index in stacked_indices(row, model):
            for name in row.keys(layout, index):
                if module_of(name) in modules and name not in tensors:
                    raise ConversionError(
                        f"PEFT saves full modules: {module_of(name)} was trained except for "
                        f"{name}; merge the run instead"
                    )
    return tensors


def _config(
    config: LoraConfig, ranks: Mapping[Row, int], whole: Mapping, layout: str, base: str
) -> dict:
    other = {
        _suffix(name): rank
        for row, rank in ranks.items()
        if rank != config.rank
        for name in row.keys(layout, _NO_NUMBERS)
    }
    root = math.sqrt if config.rslora else float
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "target_modules": sorted(
            {_suffix(name) for row in ranks for name in row.keys(layout, _NO_NUMBERS)}
        ),
        "modules_to_save": sorted({module_of(name) for name in whole}) or None,
        "rank_pattern": other,
        "alpha_pattern": {name: lora.scale(config) * root(rank) for name, rank in other.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _suffix(name: str) -> str:
    """Returns a layer's name within its block, such as "self_attn.q_proj"."""
    return module_of(name).rpartition("..")[2]
