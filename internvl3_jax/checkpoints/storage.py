"""Atomic directories and the parameter trees in them. Only this file and orbax_*.py import Orbax.

Trees are nested dicts; a path is the keys joined by "/". Functions that handle one parameter at a
time keep one parameter in memory, or one layer of a large one.
"""

import contextlib
import fnmatch
import gc
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils

from internvl3_jax.checkpoints import orbax_s3, orbax_slices
from internvl3_jax.checkpoints.orbax_errors import writing
from internvl3_jax.checkpoints.read_limit import largest_read
from internvl3_jax.io import remote_files
from internvl3_jax.io.checkpoint_paths import damage
from internvl3_jax.io.integrity import FILES, publish, seal
from internvl3_jax.io.remote_files import is_remote
from internvl3_jax.io.replaceable import check_replaceable
from internvl3_jax.io.safe_files import mark_own
from internvl3_jax.io.unfinished import (
    InPlace,
    Unfinished,
    absolute,
    clean,
    set_aside,
)

try:
    import orbax.checkpoint.experimental.v1 as ocp
except ImportError:  # in versions where it is no longer experimental
    import orbax.checkpoint.v1 as ocp

# Bytes of one stored chunk, the least that a reader of a shard has to read.
LARGEST_CHUNK = 512 << 20
# Bytes of a leaf, beyond which its layers are stored, and converted, by themselves.
BY_LAYER = LARGEST_CHUNK
SMALL = 64 << 20  # bytes of leaves that are written together


# --- directories ---------------------------------------------------------------------------------


@contextlib.contextmanager
def new_directory(
    directory: str | os.PathLike, overwrite: bool = False, sources: Iterable[str | os.PathLike] = ()
):
    """Yields an empty directory to fill, which becomes `directory` if the block succeeds.

    It is removed if the block fails. All processes enter the block; the first creates and moves.

    Args:
      directory: local path or address of the new directory.
      overwrite: replace an existing directory that this program wrote and that holds nothing else.
      sources: directories that are read and must not be replaced.

    Raises:
      FileExistsError: something is there, and may not be replaced.
      InUse: another process is filling the same directory.
    """
    final = absolute(directory)
    if is_remote(final):
        with _new_remote(final, overwrite, sources) as filled:
            yield filled
        return
    unfinished = start_directory(final, overwrite, sources)
    try:
        yield unfinished.path
        seal_directory(unfinished)
        commit_directory(unfinished, overwrite)
    except BaseException:
        unfinished.abandon()
        raise


@contextlib.contextmanager
def _new_remote(final, overwrite: bool, sources: Iterable[str | os.PathLike]):
    """Fills a directory on the local disk and uploads it; for a single process."""
    if jax.process_count() > 1:
        raise ValueError(f"{final}: only a single process can write a checkpoint to object storage")
    clean(final.parent, final.name)
    before = remote_files.objects(final)
    if before and not overwrite:
        raise FileExistsError(
            f"{final} exists; choose another place or allow overwriting (--overwrite)"
        )
    if before:
        check_replaceable(final, sources)
    with tempfile.TemporaryDirectory(prefix="internvl3_jax_") as local:
        filled = pathlib.Path(local) / "filled"
        filled.mkdir()
        mark_own(filled)
        yield filled
        seal(filled)
        unfinished = InPlace(final, True)
        try:
            remote_files.remove(final, [FILES, *(name for name in before if name != FILES)])
            publish(filled, final)
        except BaseException:
            unfinished.abandon()
            raise


def start_directory(
    final: pathlib.Path, overwrite: bool = False, sources: Iterable[str | os.PathLike] = ()
) -> Unfinished:
    """Creates an empty directory to fill, after removing remains of killed processes."""
    if jax.process_index() == 0:
        clean(final.parent, final.name)
    if os.path.lexists(final):
        if not overwrite:
            raise FileExistsError(
                f"{final} exists; choose another place or allow overwriting (--overwrite)"
            )
        check_replaceable(final, sources)
    return _create(final)


def start_step(final: pathlib.Path) -> Unfinished | InPlace:
    """Creates the directory of a training step.

    A damaged directory of the same step is renamed; an intact one raises FileExistsError.
    """
    if jax.process_index() == 0:
        clean(final.parent)
    # No process looks while the first one removes remains, and every process looks before the first
    # one renames what it finds.
    _barrier(f"clean {final.parent} for {final.name}")
    exists = bool(remote_files.objects(final)) if is_remote(final) else os.path.lexists(final)
    intact = exists and damage(final) is None
    _barrier(f"look at {final}")
    if intact:
        raise FileExistsError(f"{final} exists and is intact; it is not replaced")
    if exists and jax.process_index() == 0:
        set_aside(final)
    return _create(final)


def _create(final: pathlib.Path) -> Unfinished | InPlace:
    token = np.frombuffer(os.urandom(4), np.uint8)
    if jax.process_count() > 1:
        token = np.asarray(multihost_utils.broadcast_one_to_all(token))
    if is_remote(final):
        unfinished = InPlace(final, jax.process_index() == 0)
        _barrier(f"start {final}")
        return unfinished
    unfinished = Unfinished(final, token.tobytes().hex(), jax.process_index() == 0)
    _barrier(f"start {final}")
    return unfinished


def seal_directory(unfinished: Unfinished) -> None:
    """Waits until all processes have filled it, and writes the list of files with hashes."""
    _barrier(f"filled {unfinished.final}")
    if unfinished.creates:
        seal(unfinished.path)


def commit_directory(unfinished: Unfinished, overwrite: bool = False) -> None:
    """Moves the filled directory to its final place; all processes wait for it."""
    _barrier(f"sealed {unfinished.final}")
    unfinished.commit(overwrite)
    _barrier(f"committed {unfinished.final}")


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


# --- trees ---------------------------------------------------------------------------------------


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


def load_tree(path: pathlib.Path, abstract, prepare: Callable | None = None):
    """Reads a stored tree.

    Args:
      path: the tree's directory.
      abstract: tree with the shape, dtype and sharding of each leaf; the default device is used
        where the sharding is None.
      prepare: maps each leaf's path and value to the value to keep; leaves are then read singly.
    """
    device, stored = jax.sharding.SingleDeviceSharding(jax.devices()[0]), _metadata(path)

    def target(leaf):
        sharding = getattr(leaf, "sharding", None) or device
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def read(tree):
        targets = jax.tree.map(target, tree)
        with _context(path, largest_read=largest_read(stored, targets)):
            return ocp.load(path, targets)

    if prepare is None:
        return read(abstract)
    names = by_path(abstract)
    return nest(
        {
            name: prepare(name, by_path(read(nest({name: leaf})))[name])
            for name, leaf in names.items()
        }
    )
