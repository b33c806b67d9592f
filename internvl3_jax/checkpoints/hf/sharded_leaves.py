"""Leaves of the parameter tree as jax arrays, read from released tensors shard by shard."""

import math
from collections.abc import Mapping

import jax
import numpy as np

from internvl3_jax.checkpoints.hf.assemble import (
    Plan,
    Source,
    copy,
    padded_shape,
    read_tensors,
    stacked_indices,
)
from internvl3_jax.checkpoints.hf.mapping import Row, bits, to_leaf

_ALIGNMENT = 64  # bytes


def sharded_leaf(
    plan: Plan, source: Source, row: Row, sharding: jax.sharding.Sharding
) -> jax.Array:
    """Returns a leaf, of which this process reads the shards of its devices.

    One tensor of the source is in memory besides.
    """
    shape = padded_shape(row, plan.config)
    indices = {
        device: _bounds(index, shape)
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }
    parts = {
        bounds: _aligned([stop - start for start, stop in bounds], plan.dtype)
        for bounds in indices.values()
    }
    _fill_parts(plan, source, row, parts)
    arrays = [jax.device_put(parts[bounds], device) for device, bounds in indices.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _fill_parts(plan: Plan, source: Source, row: Row, parts: Mapping[tuple, np.ndarray]) -> None:
    """Fills blocks of a leaf layer by layer, reading each tensor once.

    Args:
      plan: the checked conversion.
      source: the tensors.
      row: the leaf's row.
      parts: ((start, stop) of each dimension of the leaf) -> array to fill.
    """
    for out in parts.values():
        out[...] = 0  # the vocabulary's padding
    for index in stacked_indices(row, plan.config):
        wanted = {
            key: out
            for key, out in parts.items()
            if all(start <= at < stop for at, (start, stop) in zip(index, key, strict=False))
        }
        if not wanted:
            continue
        value = bits(to_leaf(row, read_tensors(plan, source, row, index), plan.config))
        for key, out in wanted.items():
            inside = tuple(at - start for at, (start, _) in zip(index, key, strict=False))
            place, bounds = bits(out)[inside], key[len(index) :]
            ends = [min(stop, size) for (_, stop), size in zip(bounds, value.shape, strict=True)]
            taken = tuple(slice(start, end) for (start, _), end in zip(bounds, ends, strict=True))
            if all(part.start < part.stop for part in taken):
                copy(value[taken], place[tuple(slice(0, part.stop - part.start) for part in taken)])


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Returns ((start, stop), ...) of the dimensions."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Returns an array that jax takes as it is, and does not copy, on a CPU."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
