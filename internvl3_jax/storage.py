"""Directories that appear whole or not at all, and parameter trees in them. The only file that imports Orbax.

Trees are nested dicts; a path is the keys joined by "/". Functions that handle one parameter at a time keep one parameter in
memory.
"""

import contextlib
import gc
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from internvl3_jax.find import FILES

try:
    import orbax.checkpoint.experimental.v1 as ocp
except ImportError:  # where it has left experimental
    import orbax.checkpoint.v1 as ocp

LARGEST_CHUNK = 512 << 20  # bytes of one stored block, the least that a reader of a shard has to touch
SMALL = 64 << 20  # bytes of leaves that are written together


@contextlib.contextmanager
def new_directory(directory: str | os.PathLike, overwrite: bool = False):
    """Yields an empty directory to fill; it becomes `directory` when the block ends well and is removed when it does not.

    With several processes every one enters the block; the first creates and moves.
    """
    final = pathlib.Path(directory).absolute()
    start_directory(final, overwrite)
    try:
        yield partial_name(final)
    except BaseException:
        if jax.process_index() == 0:
            shutil.rmtree(partial_name(final), ignore_errors=True)
        raise
    commit_directory(final)


def partial_name(final: pathlib.Path) -> pathlib.Path:
    """Where a directory is built: beside its place, so that moving it there is one rename."""
    return final.with_name(final.name + ".partial")


def start_directory(final: pathlib.Path, overwrite: bool = False) -> pathlib.Path:
    """Creates the empty directory to fill; what an interrupted write left there is removed."""
    if final.exists() and not overwrite:
        raise FileExistsError(f"{final} exists; choose another place or allow overwriting (--overwrite)")
    if jax.process_index() == 0:
        shutil.rmtree(partial_name(final), ignore_errors=True)
        partial_name(final).mkdir(parents=True)
    _barrier(f"start {final}")
    return partial_name(final)


def commit_directory(final: pathlib.Path, listed: bool = False) -> None:
    """Moves the filled directory to its place, replacing what was there; `listed` adds files.json with the size of every file."""
    _barrier(f"filled {final}")
    if jax.process_index() == 0:
        partial = partial_name(final)
        if listed:
            files = sorted(path for path in partial.rglob("*") if path.is_file())
            sizes = {path.relative_to(partial).as_posix(): path.stat().st_size for path in files}
            (partial / FILES).write_text(json.dumps(sizes, indent=1))
        old = final.with_name(final.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            os.replace(final, old)
        os.replace(partial, final)
        shutil.rmtree(old, ignore_errors=True)
    _barrier(f"committed {final}")


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _storage_options(path, leaf):
    if math.prod(np.shape(leaf)) * np.dtype(leaf.dtype).itemsize <= LARGEST_CHUNK:
        return None
    # Of layers on the first axis each gets blocks of its own, so that a block is contiguous in the array.
    layers = (0,) if np.ndim(leaf) == 3 else ()
    return ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=LARGEST_CHUNK, shard_axes=layers)


def _context(copy: bool = False) -> "ocp.Context":
    context = ocp.Context()
    saving = context.array.saving
    saving.use_compression = False  # weights hardly shrink, and it takes most of the writing time
    saving.scoped_storage_options_creator = _storage_options
    context.memory.deepcopy_host_arrays = copy
    context.memory.read_concurrent_bytes = LARGEST_CHUNK  # of 2 GiB otherwise
    context.pytree.loading.partial_load = True
    return context


def nest(leaves: Mapping[str, object]) -> dict:
    """{"a/b": x} -> {"a": {"b": x}}"""
    tree = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def by_path(tree: Mapping) -> dict[str, object]:
    """{"a": {"b": x}} -> {"a/b": x}"""
    return {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


class TreeWriter:
    """Writes a tree leaf by leaf; small leaves wait for one another, as each write has a cost of its own."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.waiting = {}

    def add(self, path: str, leaf: np.ndarray) -> None:
        self.waiting[path] = leaf
        if sum(leaf.nbytes for leaf in self.waiting.values()) > SMALL:
            self._flush()

    def close(self) -> None:
        self._flush()
        with _context():
            ocp.partial.finalize(self.path)

    def _flush(self) -> None:
        if self.waiting:
            with _context():
                ocp.partial.save(self.path, nest(self.waiting))
            self.waiting = {}
            gc.collect()  # Orbax leaves the arrays in reference cycles


def start_saving(path: pathlib.Path, tree) -> Callable[[], None]:
    """Copies a tree of arrays to the host and writes it in the background; the returned function waits for the end.

    The caller may donate jax arrays when this returns, and change numpy arrays.
    """
    with _context(copy=True):
        response = ocp.save_async(path, tree)
    return response.result


def leaf_infos(path: pathlib.Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape and dtype of every leaf of a stored tree of dicts, without reading arrays."""
    stored = by_path(ocp.metadata(path).metadata)
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in stored.items()}


class TreeReader:
    """Reads a stored tree leaf by leaf as numpy arrays, in the order of `names`; small neighbours are read together."""

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
            with _context():
                self.ready = by_path(ocp.load(self.path, nest(batch)))
            gc.collect()  # Orbax leaves arrays in reference cycles
        return self.ready.pop(name)


def load_tree(path: pathlib.Path, abstract, prepare: Callable | None = None):
    """A stored tree, each leaf in the dtype and with the sharding of `abstract`; without one it goes to the default device.

    prepare: makes of each leaf's path and value what takes its place; the leaves are then read one by one.
    """
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def target(leaf):
        sharding = getattr(leaf, "sharding", None) or device
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def read(tree):
        with _context():
            return ocp.load(path, jax.tree.map(target, tree))

    if prepare is None:
        return read(abstract)
    names = by_path(abstract)
    return nest({name: prepare(name, by_path(read(nest({name: leaf})))[name]) for name, leaf in names.items()})
