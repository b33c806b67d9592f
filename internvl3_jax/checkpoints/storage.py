"""Trees of parameters on disk. Only this file and orbax_*.py import Orbax.

Trees are nested dicts; a path is the keys joined by "/". Functions that handle one parameter at a
time keep one parameter in memory, or one layer of a large one.
"""

import fnmatch
import gc
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import numpy as np
from etils import epath
from flax import traverse_util

from internvl3_jax.checkpoints import orbax_s3, orbax_slices
from internvl3_jax.checkpoints.orbax_errors import writing
from internvl3_jax.checkpoints.read_limit import batches, largest_read

try:
    import orbax.checkpoint.experimental.v1 as ocp
except ImportError:  # in versions where it is no longer experimental
    import orbax.checkpoint.v1 as ocp

# Bytes of one stored chunk, the least that a reader of a shard has to read.
LARGEST_CHUNK = 512 << 20
# Bytes of a leaf, beyond which its layers are stored, and converted, by themselves.
BY_LAYER = LARGEST_CHUNK
SMALL = 64 << 20  # bytes of leaves that are written together


class _LiteralPath(type(epath.Path("/"))):
    """A path whose `glob`, which Orbax uses, takes [ ] * ? in the directory's name literally."""

    def glob(self, pattern: str):
        entries = self.iterdir() if self.is_dir() else ()
        return (entry for entry in entries if fnmatch.fnmatchcase(entry.name, pattern))


def _storage_options(path, leaf):
    if math.prod(np.shape(leaf)) * np.dtype(leaf.dtype).itemsize <= BY_LAYER:
        return None
    # Layers on the first axis get separate chunks, so that a chunk is contiguous in the array, and
    # a layer is read by itself. A fourth axis is that of experts.
    layers = (0,) if np.ndim(leaf) in (3, 4) else ()
    return ocp.options.ArrayOptions.Saving.StorageOptions(
        chunk_byte_size=LARGEST_CHUNK, shard_axes=layers
    )


def _context(path: pathlib.Path, copy: bool = False, largest_read: int = 0) -> "ocp.Context":
    if str(path).startswith("s3://"):
        orbax_s3.install()
    context = ocp.Context()
    context.file.path_class = _LiteralPath
    saving = context.array.saving
    saving.use_compression = False  # weights hardly shrink, and it is most of the time
    saving.scoped_storage_options_creator = _storage_options
    context.memory.deepcopy_host_arrays = copy
    # Of 2 GiB otherwise. What needs as much as the limit is refused.
    context.memory.read_concurrent_bytes = max(LARGEST_CHUNK, largest_read + 1)
    context.pytree.loading.partial_load = True
    return context


def nest(leaves: Mapping[str, object]) -> dict:
    """Nests a flat dict: {"a/b": x} -> {"a": {"b": x}}"""
    return traverse_util.unflatten_dict(leaves, sep="/")


def by_path(tree: Mapping) -> dict[str, object]:
    """Flattens a nested dict: {"a": {"b": x}} -> {"a/b": x}"""
    return traverse_util.flatten_dict(tree, sep="/")


class TreeWriter:
    """Writes a tree leaf by leaf; small leaves are written together, as each write costs time."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.waiting = {}

    def add(self, path: str, leaf: np.ndarray) -> None:
        self.waiting[path] = leaf
        if sum(leaf.nbytes for leaf in self.waiting.values()) > SMALL:
            self._flush()

    def add_layers(
        self, path: str, shape: tuple[int, ...], dtype: np.dtype, layers: Iterable[np.ndarray]
    ) -> None:
        """Writes a leaf of which `layers` makes the slices, in order; one of them is in memory."""
        orbax_slices.install()
        self._flush()
        self.waiting[path] = orbax_slices.Slices(shape, dtype, layers)
        self._flush()

    def close(self) -> None:
        self._flush()
        with writing(), _context(self.path):
            ocp.partial.finalize(self.path)

    def _flush(self) -> None:
        if self.waiting:
            with writing(), _context(self.path):
                ocp.partial.save(self.path, nest(self.waiting))
            self.waiting = {}
            gc.collect()  # Orbax leaves the arrays in reference cycles


def start_saving(path: pathlib.Path, tree) -> Callable[[], None]:
    """Copies a tree of arrays to the host and writes it in the background.

    The returned function waits for the end. The caller may donate jax arrays and change numpy
    arrays when this returns.
    """
    with writing(), _context(path, copy=True):
        response = ocp.save_async(path, tree)

    def wait() -> None:
        with writing():
            response.result()

    return wait


def leaf_infos(path: pathlib.Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns path -> shape and dtype of a stored tree, without reading arrays."""
    stored = by_path(_metadata(path))
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in stored.items()}


def _metadata(path: pathlib.Path):
    with _context(path):
        return ocp.metadata(path).metadata


class TreeReader:
    """Reads a stored tree leaf by leaf as numpy arrays, in the order of `names`.

    Small neighbors are read together.
    """

    def __init__(self, path: pathlib.Path, names: list[str]):
        self.path, self.names = path, names
        self.infos = leaf_infos(path)
        self.ready = {}

    def read(self, name: str) -> np.ndarray:
        if name not in self.ready:
            batch, size = {}, 0
            for following in self.names[self.names.index(name) :]:
                info = self.infos[following]
                size += math.prod(info.shape) * info.dtype.itemsize
                if batch and size > SMALL:
                    break
                batch[following] = np.empty(info.shape, info.dtype)
            with _context(self.path):
                self.ready = by_path(ocp.load(self.path, nest(batch)))
            gc.collect()  # Orbax leaves arrays in reference cycles
        return self.ready.pop(name)

    def layers(self, name: str) -> Iterator[np.ndarray]:
        """Yields the slices of a leaf along its first axis; one of them is in memory."""
        self.ready = {}
        return orbax_slices.read_slices(self.path, name)


def load_tree(path: pathlib.Path, abstract):
    """Reads a stored tree.

    Args:
      path: the tree's directory.
      abstract: tree with the shape, dtype and sharding of each leaf; the default device is used
        where the sharding is None.
    """
    return _reader(path)(abstract)


def load_params(path: pathlib.Path, abstract: dict, prepare: Callable | None = None) -> dict:
    """Reads a tree of parameters, on a CPU with less memory than `load_tree` needs.

    Args:
      path, abstract: as of `load_tree`.
      prepare: maps each leaf's path and value to the value to keep; leaves are then read singly.
    """
    read, leaves, found = _reader(path), by_path(abstract), {}
    if prepare is not None:
        for name, leaf in leaves.items():
            found[name] = prepare(name, by_path(read(nest({name: leaf})))[name])
    elif jax.process_count() > 1 or jax.default_backend() != "cpu":
        return read(abstract)
    else:
        for batch in batches(leaves, SMALL):
            if found:
                gc.collect()  # Orbax leaves arrays in reference cycles
            found |= by_path(read(nest(batch)))
    return nest(found)


def _reader(path: pathlib.Path) -> Callable:
    device, stored = jax.sharding.SingleDeviceSharding(jax.devices()[0]), _metadata(path)

    def target(leaf):
        sharding = getattr(leaf, "sharding", None) or device
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def read(tree):
        targets = jax.tree.map(target, tree)
        with _context(path, largest_read=largest_read(stored, targets)):
            return ocp.load(path, targets)

    return read
