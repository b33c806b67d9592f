"""Converts tensors to the parameter tree and back through the table of mapping.py, fully checked.

A `Source` returns tensors by name, from a dict of arrays or a directory of safetensors files.
Names, shapes and dtypes are checked before the first tensor is read, and all problems are reported
at once.
"""

import collections
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import ml_dtypes
import numpy as np

from internvl3_jax.checkpoints import storage
from internvl3_jax.checkpoints.hf.mapping import (
    IGNORED,
    Row,
    active_rows,
    bits,
    canonical_key,
    check_layout,
    file_name,
    from_leaf,
    leaf_shape,
    source_shape,
    stacked_axes,
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
    """Returns "internvl" or "hf" by the names of the tensors."""
    prefixes = {"vision_model.": "internvl", "model.vision_tower.": "hf", "vision_tower.": "hf"}
    layouts = {
        layout for name in names for prefix, layout in prefixes.items() if name.startswith(prefix)
    }
    if len(layouts) != 1:
        shown = one_line(", ".join(sorted(names)[:5]))
        raise ConversionError(
            "these tensors are not an InternVL checkpoint: expected names under vision_model. "
            "(original layout) or vision_tower. / model.vision_tower. (transformers), found "
            f"{len(names)} tensors such as {shown}"
        )
    return layouts.pop()


def has_head(names) -> bool:
    """Returns whether the weights have an output head."""
    return any(name in HEADS for name in names)


class Plan(NamedTuple):
    """A checked conversion: the tensors that fill each leaf, and the dtype."""

    config: ModelConfig
    layout: str
    names: dict[str, str]  # key of the table -> name in the source
    dtype: np.dtype
    allow_nonfinite: bool = False  # otherwise NaN and infinities are errors


def plan(
    config: ModelConfig,
    source: Source,
    layout: str | None = None,
    dtype: str | None = None,
    part: str | None = None,
    allow_nonfinite: bool = False,
) -> Plan:
    """Checks all names, shapes and dtypes of a source against the table before reading.

    Args:
      config: the model.
      source: the tensors.
      layout: "internvl" or "hf"; None detects it.
      dtype: name of the dtype to convert to; None keeps the source's, which must be the same for
        all tensors.
      part: "vision" or "language" if the source has only that part of the model.
      allow_nonfinite: accept NaN and infinities when reading.

    Raises:
      ConversionError: it names tensors that are unknown, missing, duplicate, or of another shape or
        dtype.
      ValueError: the layout has no names for the model's tensors.
    """
    infos = source.infos()
    layout = layout or detect_layout(infos)
    check_layout(config, layout)
    # 1) Match the source's names with the table's keys.
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
    # 2) Check that nothing is missing, and all shapes.
    for key, row in wanted.items():
        if key not in names:
            problems["missing"].append(file_name(key, config, layout))
            continue
        shape, expected = (tuple(infos[names[key]].shape), source_shape(row, config, layout))
        if shape != expected:
            problems["of the wrong shape"].append(
                f"{names[key]} {shape}, config.json asks for {expected}"
            )
    # 3) Choose the dtype, and report all problems.
    target = _common_dtype({name: infos[name].dtype for name in names.values()}, dtype, problems)
    if problems:
        raise ConversionError(
            "\n".join(listing(kind, found) for kind, found in problems.items()) + kind_of(infos)
        )
    return Plan(config, layout, names, DTYPES[target], allow_nonfinite)


def _all_keys(row: Row, config: ModelConfig, layout: str):
    for index in stacked_indices(row, config):
        yield from row.keys(layout, index)


def stacked_indices(
    row: Row, config: ModelConfig, layer: tuple[int, ...] = ()
) -> list[tuple[int, ...]]:
    """Returns the indices of what a leaf stacks: (layer,) or (layer, expert) each, else one ().

    With `layer`, (number,), only those of this layer.
    """
    axes = stacked_axes(row, config)
    return [layer + index for index in np.ndindex(*axes[len(layer) :])]


def _check_tied(source: Source, head: str, layout: str, names: dict, infos: Mapping) -> None:
    """Checks that a head that is tied to the embedding equals it."""
    embeddings = (
        name
        for name in infos
        if canonical_key(name, layout).endswith("language_model.embed_tokens.weight")
    )
    name = next(embeddings, None)
    if name is not None and not np.array_equal(source.read(name), source.read(head)):
        raise ConversionError(
            f"config.json ties the head to the embedding, but {one_line(head)} differs from "
            f"{one_line(name)}; set tie_word_embeddings to false"
        )


def _common_dtype(dtypes: dict[str, str], dtype: str | None, problems: dict) -> str:
    """Returns the dtype to convert to; adds a problem for each tensor of an unsupported dtype.

    If `dtype` is None, tensors of another than the most common dtype are problems, too.
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


def read_tensors(plan: Plan, source: Source, row: Row, index: tuple[int, ...]) -> list[np.ndarray]:
    """Reads the tensors of one index of a leaf, in the plan's dtype."""
    tensors = []
    for key in row.keys(plan.layout, index):
        name = plan.names[key]
        tensor = source.read(name)
        if not plan.allow_nonfinite and nonfinite(tensor):
            refuse_nonfinite((name, source.read(name)) for name in plan.names.values())
        tensors.append(tensor if tensor.dtype == plan.dtype else cast(tensor, plan.dtype, name))
    return tensors


def padded_shape(row: Row, config: ModelConfig) -> tuple[int, ...]:
    """Returns the shape of a full leaf: layers and experts first, vocabulary padded."""
    shape = leaf_shape(row, config)
    padded = config.language.padded_vocab_size
    shape = tuple(
        padded if axis == "V" else size for axis, size in zip(row.shape.split(), shape, strict=True)
    )
    return (*stacked_axes(row, config), *shape)


def by_layer(row: Row, config: ModelConfig, dtype: np.dtype) -> bool:
    """Returns whether a leaf is so large that its layers are converted one by one."""
    size = math.prod(padded_shape(row, config)) * dtype.itemsize
    return len(stacked_axes(row, config)) > 0 and size > storage.BY_LAYER


def vocabulary_slice(row: Row, config: ModelConfig) -> tuple[slice, ...]:
    """Returns the slices of one layer of a leaf without the vocabulary's padding."""
    return tuple(
        slice(0, config.language.vocab_size) if axis == "V" else slice(None)
        for axis in row.shape.split()
    )


def fill_leaf(
    plan: Plan,
    source: Source,
    row: Row,
    out: np.ndarray,
    visit: Callable | None = None,
    layer: tuple[int, ...] = (),
) -> None:
    """Reads a leaf layer by layer, and expert by expert, into `out`.

    Args:
      visit: called with (key, tensors) of each; the key is the name in the original layout.
      layer: (number,) of the only layer to read, which is then all of `out`.
    """
    inside = vocabulary_slice(row, plan.config)
    if "V" in row.shape.split():
        out[...] = 0
    for index in stacked_indices(row, plan.config, layer):
        tensors = read_tensors(plan, source, row, index)
        place = bits(out[index[len(layer) :]])
        copy(bits(to_leaf(row, tensors, plan.config)), place[inside])
        if visit:
            visit(row.keys("internvl", index)[0], tensors)


def copy(value: np.ndarray, out: np.ndarray) -> None:
    """Copies an array, a transposed one in blocks that fit the caches (9x faster)."""
    step = value.shape[-1] if value.flags.c_contiguous else 256
    for start in range(0, value.shape[-1], step):
        out[..., start : start + step] = value[..., start : start + step]


def params_from_tensors(
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray] | Source,
    layout: str | None = None,
    dtype: str | None = None,
) -> dict:
    """Converts a state dict or Source of either layout to the parameter tree. Raises as `plan`."""
    source = ArraySource(tensors) if isinstance(tensors, Mapping) else tensors
    checked = plan(config, source, layout, dtype)
    leaves = {}
    for row in active_rows(config):
        leaves[row.target] = np.empty(padded_shape(row, config), checked.dtype)
        fill_leaf(checked, source, row, leaves[row.target])
    return nest(leaves)


def check_params(config: ModelConfig, leaves: Mapping[str, object]) -> None:
    """Raises ConversionError naming leaves that are unknown, missing or of another shape."""
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
    """Yields (name, tensor) of one leaf in a layout."""
    for index in stacked_indices(row, config):
        tensors = layer_tensors(config, row, leaf, index, layout)
        yield from zip(row.keys(layout, index), tensors, strict=True)


def layer_tensors(
    config: ModelConfig, row: Row, leaf: np.ndarray, index: tuple[int, ...], layout: str
) -> list[np.ndarray]:
    """Returns the tensors of one index of a leaf in a layout."""
    value = np.asarray(leaf[index])[vocabulary_slice(row, config)]
    return from_leaf(row, value, config, layout)


def tensors_from_params(config: ModelConfig, params: Mapping, layout: str) -> dict[str, np.ndarray]:
    """Converts the parameter tree to a state dict of a layout, in host memory."""
    check_layout(config, layout)
    leaves, tensors = by_path(params), {}
    check_params(config, leaves)
    for row in active_rows(config):
        tensors |= leaf_tensors(config, row, leaves[row.target], layout)
    return tensors
