"""Tensors -> parameter tree and back through the table, with every check that makes a conversion
total.

A `Source` hands out tensors by name; a dict of arrays and a directory of safetensors files both are
one. Everything that can be known from names, shapes and dtypes is checked before the first tensor
is read, and all that is wrong is reported at once.
"""

import collections
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import ml_dtypes
import numpy as np

from internvl3_jax.checkpoints.hf.mapping import (
    IGNORED,
    Row,
    active_rows,
    bits,
    canonical_key,
    file_name,
    from_leaf,
    layers_of,
    leaf_shape,
    source_shape,
    to_leaf,
)
from internvl3_jax.checkpoints.hf.values import (
    ConversionError,
    cast,
    kind_of,
    listing,
    nonfinite,
    refuse_nonfinite,
)
from internvl3_jax.checkpoints.storage import by_path, nest
from internvl3_jax.config import ModelConfig
from internvl3_jax.io.terminal import one_line

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
HEADS = ("language_model.lm_head.weight", "lm_head.weight", "language_model.output.weight")


class TensorInfo(NamedTuple):
    shape: tuple[int, ...]
    dtype: str


class Source(Protocol):
    def infos(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> np.ndarray: ...


class ArraySource:
    """Tensors in memory: a state dict of numpy arrays."""

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        self.tensors = tensors

    def infos(self) -> dict[str, TensorInfo]:
        return {
            name: TensorInfo(tensor.shape, tensor.dtype.name)
            for name, tensor in self.tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        return np.asarray(self.tensors[name])


def detect_layout(names) -> str:
    """ "internvl" or "hf" from the names of the tensors."""
    prefixes = {"vision_model.": "internvl", "model.vision_tower.": "hf", "vision_tower.": "hf"}
    found = {
        layout for name in names for prefix, layout in prefixes.items() if name.startswith(prefix)
    }
    if len(found) != 1:
        shown = one_line(", ".join(sorted(names)[:5]))
        raise ConversionError(
            "these tensors are not an InternVL checkpoint: expected names under vision_model. "
            "(original layout) or vision_tower. / "
            f"model.vision_tower. (transformers), found {len(names)} tensors such as {shown}"
        )
    return found.pop()


def has_head(names) -> bool:
    """Whether the weights bring an output head of their own."""
    return any(name in HEADS for name in names)


class Plan(NamedTuple):
    """A checked conversion: which tensors fill which leaf, and in what dtype."""

    config: ModelConfig
    layout: str
    names: dict[str, str]  # the table's key -> the name in the source
    dtype: np.dtype
    allow_nonfinite: bool = False  # or NaN and infinities are errors


def plan(
    config: ModelConfig,
    source: Source,
    layout: str | None = None,
    dtype: str | None = None,
    part: str | None = None,
    allow_nonfinite: bool = False,
) -> Plan:
    """Checks a source against the table, completely, before anything is read.

    Args:
      dtype: name of the dtype to convert to; None keeps the source's, which must then be one and
          the same for all tensors.
      part: "vision" or "language" for a source that holds that part of the model alone.
      allow_nonfinite: reading takes NaN and infinities instead of refusing them.

    Raises:
      ConversionError: naming tensors that are unknown, missing, given twice, of another shape or of
      another dtype.
    """
    infos = source.infos()
    layout = layout or detect_layout(infos)
    rows = [row for row in active_rows(config) if part is None or row.target.startswith(part + "/")]
    wanted = {key: row for row in rows for key in _all_keys(row, config, layout)}
    problems = collections.defaultdict(list)
    names = {}
    for name in infos:
        key = canonical_key(name, layout)
        if IGNORED.search(name):
            continue
        if key in names:
            problems["given twice"].append(f"{names[key]} and {name}")
        elif key in wanted:
            names[key] = name
        elif config.language.tie_embeddings and key in HEADS:
            _check_tied(source, name, layout, names, infos)
        else:
            problems["unknown (nothing in the model takes them)"].append(name)
    for key, row in wanted.items():
        if key not in names:
            problems["missing"].append(file_name(key, config, layout))
            continue
        shape, expected = (tuple(infos[names[key]].shape), source_shape(row, config, layout))
        if shape != expected:
            problems["of the wrong shape"].append(
                f"{names[key]} {shape}, config.json asks for {expected}"
            )
    target = _common_dtype({name: infos[name].dtype for name in names.values()}, dtype, problems)
    if problems:
        raise ConversionError(
            "\n".join(listing(kind, found) for kind, found in problems.items()) + kind_of(infos)
        )
    return Plan(config, layout, names, DTYPES[target], allow_nonfinite)


def _all_keys(row: Row, config: ModelConfig, layout: str):
    for layer in layer_numbers(row, config):
        yield from row.keys(layout, layer)


def layer_numbers(row: Row, config: ModelConfig):
    """The layers that a leaf stacks; [None] for a leaf that stacks none."""
    layers = layers_of(row, config)
    return [None] if layers is None else range(layers)


def _check_tied(source: Source, head: str, layout: str, names: dict, infos: Mapping) -> None:
    """A head saved beside the embedding it is tied to must be that embedding."""
    embeddings = (
        name
        for name in infos
        if canonical_key(name, layout).endswith("language_model.embed_tokens.weight")
    )
    name = next(embeddings, None)
    if name is not None and not np.array_equal(source.read(name), source.read(head)):
        raise ConversionError(
            f"config.json ties the head to the embedding, but {one_line(head)} differs from "
            f"{one_line(name)}; set "
            f"tie_word_embeddings to false"
        )


def _common_dtype(dtypes: dict[str, str], dtype: str | None, problems: dict) -> str:
    """The dtype to convert to; files a problem for each tensor that is no float or, when keeping,
    is not of the commonest.
    """
    for name, found in dtypes.items():
        if found not in DTYPES:
            problems[f"of a dtype other than {', '.join(DTYPES)}"].append(f"{name} {found}")
    if dtype is not None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
        return dtype
    counts = collections.Counter(found for found in dtypes.values() if found in DTYPES)
    common = counts.most_common(1)[0][0] if counts else "float32"
    for name, found in dtypes.items():
        if found in DTYPES and found != common:
            problems[
                f"of another dtype than the rest ({common}); name one with --dtype to cast all"
            ].append(f"{name} {found}")
    return common


def read_tensors(plan: Plan, source: Source, row: Row, layer: int | None) -> list[np.ndarray]:
    """The tensors that hold one layer of a leaf, in the plan's dtype."""
    tensors = []
    for key in row.keys(plan.layout, layer):
        name = plan.names[key]
        tensor = source.read(name)
        if not plan.allow_nonfinite and nonfinite(tensor):
            refuse_nonfinite((name, source.read(name)) for name in plan.names.values())
        tensors.append(tensor if tensor.dtype == plan.dtype else cast(tensor, plan.dtype, name))
    return tensors


def padded_shape(row: Row, config: ModelConfig) -> tuple[int, ...]:
    """Shape of the whole leaf: layers first, vocabulary padded."""
    shape = leaf_shape(row, config)
    padded = config.language.padded_vocab_size
    shape = tuple(
        padded if axis == "V" else size for axis, size in zip(row.shape.split(), shape, strict=True)
    )
    layers = layers_of(row, config)
    return shape if layers is None else (layers, *shape)


def vocabulary_slice(row: Row, config: ModelConfig) -> tuple[slice, ...]:
    """The part of one layer of a leaf that is no padding."""
    return tuple(
        slice(0, config.language.vocab_size) if axis == "V" else slice(None)
        for axis in row.shape.split()
    )


def fill_parts(plan: Plan, source: Source, row: Row, parts: Mapping[tuple, np.ndarray]) -> None:
    """Reads parts of a leaf layer by layer, each tensor once. `parts`: ((start, stop) of each
    dimension of the leaf) -> array to fill.
    """
    for out in parts.values():
        out[...] = 0  # the vocabulary's padding
    for layer in layer_numbers(row, plan.config):
        wanted = (
            parts
            if layer is None
            else {key: out for key, out in parts.items() if key[0][0] <= layer < key[0][1]}
        )
        value = (
            bits(to_leaf(row, read_tensors(plan, source, row, layer), plan.config))
            if wanted
            else None
        )
        for key, out in wanted.items():
            place, bounds = (
                (bits(out), key) if layer is None else (bits(out)[layer - key[0][0]], key[1:])
            )
            ends = [min(stop, size) for (_, stop), size in zip(bounds, value.shape, strict=True)]
            taken = tuple(slice(start, end) for (start, _), end in zip(bounds, ends, strict=True))
            if all(part.start < part.stop for part in taken):
                copy(value[taken], place[tuple(slice(0, part.stop - part.start) for part in taken)])


def fill_leaf(
    plan: Plan, source: Source, row: Row, out: np.ndarray, visit: Callable | None = None
) -> None:
    """Reads a leaf layer by layer into `out`.

    `visit(key, tensors)` sees the tensors of each layer; key names them in the original layout.
    """
    inside = vocabulary_slice(row, plan.config)
    if "V" in row.shape.split():
        out[...] = 0
    for layer in layer_numbers(row, plan.config):
        tensors = read_tensors(plan, source, row, layer)
        place = out if layer is None else out[layer]
        copy(bits(to_leaf(row, tensors, plan.config)), bits(place)[inside])
        if visit:
            visit(row.keys("internvl", layer)[0], tensors)


def copy(value: np.ndarray, out: np.ndarray) -> None:
    """Copies an array, one that is transposed by blocks that fit the processor's caches: nine times
    faster for a vocabulary.
    """
    step = value.shape[-1] if value.flags.c_contiguous else 256
    for start in range(0, value.shape[-1], step):
        out[..., start : start + step] = value[..., start : start + step]


def params_from_tensors(
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray] | Source,
    layout: str | None = None,
    dtype: str | None = None,
) -> dict:
    """A state dict (or any Source) of either layout -> the parameter tree, in host memory.

    Raises:
      ConversionError: see `plan`.
    """
    source = ArraySource(tensors) if isinstance(tensors, Mapping) else tensors
    checked = plan(config, source, layout, dtype)
    leaves = {}
    for row in active_rows(config):
        leaves[row.target] = np.empty(padded_shape(row, config), checked.dtype)
        fill_leaf(checked, source, row, leaves[row.target])
    return nest(leaves)


def check_params(config: ModelConfig, leaves: Mapping[str, object]) -> None:
    """Raises ConversionError naming leaves that the configuration does not have, lacks, or has in
    another shape.
    """
    wanted = {row.target: padded_shape(row, config) for row in active_rows(config)}
    problems = collections.defaultdict(list)
    for path in sorted(leaves.keys() | wanted.keys()):
        if path not in wanted:
            problems["unknown (nothing in the model takes them)"].append(path)
        elif path not in leaves:
            problems["missing"].append(path)
        elif tuple(leaves[path].shape) != wanted[path]:
            problems["of the wrong shape"].append(
                f"{path} {tuple(leaves[path].shape)}, the configuration asks for {wanted[path]}"
            )
    if problems:
        raise ConversionError("\n".join(listing(kind, found) for kind, found in problems.items()))


def leaf_tensors(config: ModelConfig, row: Row, leaf: np.ndarray, layout: str):
    """Yields (name, tensor) of all that a layout makes of one leaf."""
    for layer in layer_numbers(row, config):
        yield from zip(
            row.keys(layout, layer), layer_tensors(config, row, leaf, layer, layout), strict=True
        )


def layer_tensors(
    config: ModelConfig, row: Row, leaf: np.ndarray, layer: int | None, layout: str
) -> list[np.ndarray]:
    """What a layout makes of one layer of a leaf."""
    value = np.asarray(leaf if layer is None else leaf[layer])[vocabulary_slice(row, config)]
    return from_leaf(row, value, config, layout)


def tensors_from_params(config: ModelConfig, params: Mapping, layout: str) -> dict[str, np.ndarray]:
    """The parameter tree -> a state dict of a layout, in host memory."""
    leaves = by_path(params)
    check_params(config, leaves)
    return {
        name: tensor
        for row in active_rows(config)
        for name, tensor in leaf_tensors(config, row, leaves[row.target], layout)
    }
