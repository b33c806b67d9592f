"""Arrays of a stored tree in slices along their first axis: the layers of a stacked leaf.

Orbax reads and writes an array as a whole, and a stacked leaf of a large model is larger than a
computer's memory. TensorStore, in which Orbax stores arrays, takes slices. The functions of Orbax
that are used here are private; an error says if a version does not have them.
"""

import contextlib
import functools
import json
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np
import tensorstore as ts

from internvl3_jax.checkpoints import orbax_s3
from internvl3_jax.io.file_errors import FileError

_METADATA, _MANIFEST = "_METADATA", "manifest.ocdbt"


class Slices(np.ndarray):
    """An array to write, of which only one slice is in memory: all its elements are one zero.

    Attributes:
      slices: makes the slices along the first axis, in order.
    """

    slices: Iterable[np.ndarray]

    def __new__(cls, shape: tuple[int, ...], dtype: np.dtype, slices: Iterable[np.ndarray]):
        array = np.broadcast_to(np.zeros((), dtype), shape).view(cls)
        array.slices = slices
        return array

    def __array_finalize__(self, array):
        self.slices = getattr(array, "slices", ())


@functools.cache
def install() -> None:
    """Makes Orbax write `Slices` slice by slice, once per process; FileError if it cannot."""
    with _private():
        from orbax.checkpoint._src.serialization.type_handlers import NumpyHandler

        write_whole = NumpyHandler._open_and_write

    async def open_and_write(self, value, tspec, ts_context):
        if not isinstance(value, Slices):
            return await write_whole(self, value, tspec, ts_context)
        store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
        for index, part in enumerate(value.slices):
            await store[index].write(part, can_reference_source_data_indefinitely=True)

    NumpyHandler._open_and_write = open_and_write


def read_slices(path: pathlib.Path, name: str) -> Iterator[np.ndarray]:
    """Yields the slices of a stored array along its first axis."""
    store = open_array(path, name)
    for index in range(store.shape[0]):
        yield store[index].read().result()


def open_array(path: pathlib.Path, name: str) -> ts.TensorStore:
    """Opens a stored array.

    Args:
      path: directory of the tree.
      name: the array's keys, joined by "/".
    """
    with _private():
        from orbax.checkpoint._src.serialization import tensorstore_utils

        if str(path).startswith("s3://"):
            orbax_s3.install()
        folder = path
        if not (folder / _MANIFEST).exists():
            folder = next(entry for entry in path.iterdir() if (entry / _MANIFEST).exists())
        zarr3 = json.loads((folder / _METADATA).read_text()).get("use_zarr3", False)
        spec = tensorstore_utils.ArrayReadSpec(
            str(folder), name.replace("/", "."), zarr3, use_ocdbt=True
        ).json
        context = tensorstore_utils.get_ts_context(use_ocdbt=True)
    return ts.open(ts.Spec(spec), open=True, read=True, context=context).result()


@contextlib.contextmanager
def _private() -> Iterator[None]:
    try:
        yield
    except (ImportError, AttributeError, StopIteration) as error:
        raise FileError(
            "large checkpoints need another version of orbax-checkpoint "
            f"({type(error).__name__}: {error}); install the one in requirements/"
        ) from error
