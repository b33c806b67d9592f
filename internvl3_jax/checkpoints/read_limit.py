"""Limits how much of a stored tree is read at once."""

import math
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from internvl3_jax.param_tree import path_name


def largest_read(stored, targets) -> int:
    """Returns the most bytes that Orbax reads for a shard of an array on this process's devices.

    Orbax refuses to read a shard that needs more than its limit. A shard needs the chunks that it
    touches, in full.

    Args:
      stored: tree with metadata of the stored arrays; of others than the targets, too.
      targets: tree with the shape, dtype and sharding of what is read.
    """
    most = 0
    by_name = {path_name(path): info for path, info in jax.tree.leaves_with_path(stored)}
    for path, target in jax.tree.leaves_with_path(targets):
        info, shape = by_name.get(path_name(path), target), target.shape
        chunk = getattr(getattr(info, "storage_metadata", None), "chunk_shape", None) or shape
        itemsize = max(np.dtype(dtype).itemsize for dtype in (info.dtype, target.dtype))
        for index in target.sharding.addressable_devices_indices_map(shape).values():
            bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
            lengths = [
                -(-stop // step) * step - start // step * step
                for (start, stop), step in zip(bounds, chunk, strict=True)
            ]
            most = max(most, math.prod(lengths) * itemsize)
    return most


def batches(leaves: Mapping, limit: int) -> Iterator[dict]:
    """Yields path -> leaf in parts of at most `limit` bytes, or of one leaf.

    What is being read is in memory twice for a while. The largest leaves come first, while memory
    is empty.
    """
    batch, total = {}, 0
    sizes = {path: math.prod(x.shape) * np.dtype(x.dtype).itemsize for path, x in leaves.items()}
    for path in sorted(sizes, key=sizes.__getitem__, reverse=True):
        if batch and total + sizes[path] > limit:
            yield batch
            batch, total = {}, 0
        batch[path] = leaves[path]
        total += sizes[path]
    yield batch
