"""Reads PEFT's LoRA adapters of both released layouts through the table of mapping.py.

DIR/adapter_config.json         rank, alpha, names of the layers
DIR/adapter_model.safetensors   base_model.model.LAYER.lora_A.weight [r, in]
                                base_model.model.LAYER.lora_B.weight [out, r]
                                fully trained modules as they are

A layer that a layout stores in several tensors (q, k, v of the vision tower in transformers) has
one a and the concatenated b. Read from three adapters with an a each, it has three times the rank.
"""

import collections
import pathlib
import re
from typing import NamedTuple

import numpy as np

from internvl3_jax.checkpoints.adapters import Adapter
from internvl3_jax.checkpoints.hf.assemble import (
    DTYPES,
    ConversionError,
    Plan,
    fill_leaf,
    padded_shape,
    stacked_indices,
)
from internvl3_jax.checkpoints.hf.mapping import (
    Row,
    active_rows,
    canonical_key,
    leaf_shape,
    source_shape,
    stacked_axes,
)
from internvl3_jax.checkpoints.hf.peft_settings import WEIGHTS, Settings, ends_with, settings_of
from internvl3_jax.checkpoints.hf.safetensors import SafetensorsSource
from internvl3_jax.checkpoints.hf.values import refuse_nonfinite
from internvl3_jax.checkpoints.storage import nest
from internvl3_jax.config import ModelConfig
from internvl3_jax.io.checkpoint_paths import PEFT
from internvl3_jax.io.terminal import one_line
from internvl3_jax.model import lora

PREFIX = "base_model.model."
LAYOUTS = ("internvl", "hf")
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


def check_names(model: ModelConfig, layout: str) -> None:
    """Raises ConversionError for InternLM2 in the original layout, which has no q, k and v."""
    if model.language.family == "internlm2" and layout == "internvl":
        raise ConversionError(
            "InternLM2's original code has q, k and v in one interleaved weight, for which "
            "adapters are not supported; use the hf layout, or merge"
        )


def module_of(name: str) -> str:
    """Returns the torch module of a tensor."""
    return name.rpartition(".")[0]


class _Named(NamedTuple):
    """Names in a file, by the table's keys."""

    layout: str
    factors: dict[str, dict[str, str]]  # key -> {"A": name, "B": name}
    whole: dict[str, str]
    unknown: list[str]


def read_peft(
    directory: pathlib.Path, model: ModelConfig, allow_nonfinite: bool = False
) -> Adapter:
    """Reads an adapter that PEFT or `write_peft` saved; the names tell the layout.

    Args:
      directory: the adapter's directory.
      model: configuration of the base.
      allow_nonfinite: accept NaN and infinities.

    Raises:
      ConversionError: tensors are unknown, missing, without their other factor, not finite or of
        another shape, or a setting is more than plain LoRA; the message names them.
    """
    settings = settings_of(directory)
    source = SafetensorsSource(directory, file=WEIGHTS)
    for name, info in source.infos().items():
        if info.dtype not in DTYPES:
            raise ConversionError(
                f"{directory / WEIGHTS}: {one_line(name)} is {info.dtype}; expected one of "
                f"{', '.join(DTYPES)}"
            )
    if not allow_nonfinite:
        refuse_nonfinite((name, source.read(name)) for name in source.infos())
    named = min(
        (_match(source.infos(), model, layout) for layout in LAYOUTS),
        key=lambda named: len(named.unknown),
    )
    if named.unknown:
        check_names(
            model,
            "internvl"
            if any("wqkv" in name or "feed_forward" in name for name in named.unknown)
            else "hf",
        )
        raise ConversionError(
            f"{directory}: {len(named.unknown)} tensor(s) that the model does not have, such as "
            f"{one_line(', '.join(named.unknown[:5]))}. Expected {PREFIX}LAYER.lora_A.weight, "
            "with the layers of the original layout or of transformers'"
        )
    layers = {}
    for row in active_rows(model):
        modules = [
            [named.factors.get(key) for key in row.keys(named.layout, index)]
            for index in stacked_indices(row, model)
        ]
        if any(any(layer) for layer in modules):
            factors = [
                [_factors(source, names, settings, row, model, named.layout) for names in layer]
                for layer in modules
            ]
            layers[row.target.removesuffix("/kernel")] = _stacked(factors, row, model)
    whole = _whole(directory, source, named, model)
    _check_complete(directory, settings, named, model)
    return Adapter(nest(layers), whole)


def _check_complete(
    directory: pathlib.Path, settings: Settings, named: _Named, model: ModelConfig
) -> None:
    """Raises ConversionError naming modules that adapter_config.json lists and have no tensors."""
    missing = []
    for row in active_rows(model):
        adapts = lora.LINEAR.fullmatch(row.target.removesuffix("/kernel"))
        for index in stacked_indices(row, model):
            for key in row.keys(named.layout, index):
                module = module_of(key)
                if (
                    adapts
                    and key not in named.factors
                    and any(ends_with(module, end) for end in settings.targets)
                ):
                    missing.append(f"{module}.lora_A.weight")
                if key not in named.whole and any(
                    f".{end}." in f".{module}." for end in settings.whole
                ):
                    missing.append(key)
    if missing:
        raise ConversionError(
            f"{directory / WEIGHTS} lacks {len(missing)} tensor(s) of modules that {PEFT} says "
            f"were trained (target_modules, modules_to_save), such as {', '.join(missing[:5])}; "
            "save the adapter again"
        )


def _match(names, model: ModelConfig, layout: str) -> _Named:
    rows = {
        key: row
        for row in active_rows(model)
        for index in stacked_indices(row, model)
        for key in row.keys(layout, index)
    }
    named = _Named(layout, collections.defaultdict(dict), {}, [])
    for name in names:
        factor = _FACTOR.fullmatch(name)
        key = canonical_key(
            (f"{factor[1]}.weight" if factor else name).removeprefix(PREFIX), layout
        )
        # PEFT itself silently ignores any other name.
        is_known = name.startswith(PREFIX) and key in rows
        if not is_known or (
            factor and not lora.LINEAR.fullmatch(rows[key].target.removesuffix("/kernel"))
        ):
            named.unknown.append(name)
        elif factor:
            named.factors[key][factor[2]] = name
        else:
            named.whole[key] = name
    return named


def _factors(
    source,
    names: dict[str, str] | None,
    settings: Settings,
    row: Row,
    model: ModelConfig,
    layout: str,
):
    """Returns (a [in, r], scaled b [r, out]) of a torch module, None without an adapter."""
    if names is None:
        return None
    if lacking := {"A", "B"} - names.keys():
        raise ConversionError(f"{next(iter(names.values()))} has no lora_{lacking.pop()}")
    a, b = (source.read(names[factor]).astype(np.float32).T for factor in "AB")
    columns, rows = source_shape(row, model, layout)
    if (
        (a.ndim, b.ndim) != (2, 2)
        or not a.shape[1]
        or a.shape[0] != rows
        or b.shape[1] != columns
        or a.shape[1] != b.shape[0]
    ):
        shapes = f"{names['A']} {a.T.shape} and {names['B']} {b.T.shape}"
        raise ConversionError(
            f"{shapes} do not fit: the layer has {rows} inputs and {columns} outputs"
        )
    module = _FACTOR.fullmatch(names["A"])[1].removeprefix(PREFIX)
    return a, b * np.float32(settings.scale(module, a.shape[1]))


def _stacked(layers: list, row: Row, model: ModelConfig) -> dict[str, np.ndarray]:
    """Stacks the factors of all layers, and experts: {"a": [L, in, r], "b": [L, r, out]}, zeros
    where absent.
    """
    rows, columns = leaf_shape(row, model)
    joined = [_joined(modules, rows, columns) for modules in layers]
    rank = max(a.shape[1] for a, _ in joined)
    a = np.stack([np.pad(a, ((0, 0), (0, rank - a.shape[1]))) for a, _ in joined])
    b = np.stack([np.pad(b, ((0, rank - b.shape[0]), (0, 0))) for _, b in joined])
    axes = stacked_axes(row, model)
    return {"a": a.reshape(*axes, *a.shape[1:]), "b": b.reshape(*axes, *b.shape[1:])}


def _joined(modules: list, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Joins the factors of a layer's modules, whose outputs are concatenated."""
    present = [factors for factors in modules if factors is not None]
    if not present:
        return np.zeros((rows, 0), np.float32), np.zeros((0, columns), np.float32)
    if len(present) == len(modules) and all(np.array_equal(a, present[0][0]) for a, _ in present):
        return present[0][0], np.concatenate([b for _, b in present], axis=1)
    width = columns // len(modules)
    placed = [
        np.pad(factors[1], ((0, 0), (index * width, columns - (index + 1) * width)))
        for index, factors in enumerate(modules)
        if factors is not None
    ]
    return np.concatenate([a for a, _ in present], axis=1), np.concatenate(placed)


def _whole(directory: pathlib.Path, source, named: _Named, model: ModelConfig) -> dict:
    """Reads fully trained parameters (PEFT's modules_to_save)."""
    # Non-finite values were checked before.
    plan, leaves = (
        Plan(model, named.layout, named.whole, DTYPES["float32"], allow_nonfinite=True),
        {},
    )
    for row in active_rows(model):
        keys = [
            key for index in stacked_indices(row, model) for key in row.keys(named.layout, index)
        ]
        if not any(key in named.whole for key in keys):
            continue
        if missing := [key for key in keys if key not in named.whole]:
            raise ConversionError(
                f"{directory} replaces only part of {row.target}: {missing[0]} is missing"
            )
        _check_shapes(directory, source, named, row, [named.whole[key] for key in keys], model)
        leaves[row.target] = np.empty(padded_shape(row, model), np.float32)
        fill_leaf(plan, source, row, leaves[row.target])
    return nest(leaves)


def _check_shapes(
    directory: pathlib.Path, source, named: _Named, row: Row, names: list[str], model: ModelConfig
) -> None:
    expected = source_shape(row, model, named.layout)
    for name in names:
        if (shape := tuple(source.infos()[name].shape)) != expected:
            grown = "V" in row.shape.split() and shape[1:] == expected[1:]
            why = (
                "; its vocabulary was resized, so give the base whose embeddings were resized as "
                "well"
                if grown
                else ""
            )
            raise ConversionError(
                f"{directory / WEIGHTS}: {name} has shape {shape}, the base has {expected}{why}"
            )
