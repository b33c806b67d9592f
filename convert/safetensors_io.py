"""Safetensors files, one tensor at a time: a directory to read from and a set of shards to fill in any order.

The format is a little-endian u64 with the length of a JSON header, the header (name -> dtype, shape, byte range), then the
bytes. Reading and writing by position keeps one tensor in memory and lets damage be reported by the names of the tensors it
hits. Tensors are checked against the header and the header against the file's length before any is read.
"""

import json
import math
import pathlib
from collections.abc import Iterable

import ml_dtypes
import numpy as np

from convert.assemble import ConversionError, TensorInfo

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
CODES = {dtype.name: code for code, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def read_header(path: pathlib.Path) -> tuple[dict[str, dict], int]:
    """(name -> {dtype, shape, data_offsets}, where the bytes begin).

    Raises:
      ConversionError: if the file is no safetensors file or is shorter than its header says, naming the tensors cut off.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ConversionError(
                f"{path} is truncated or no safetensors file: its header is longer than the file ({size} bytes)"
            )
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ConversionError(f"{path} is no safetensors file: its header is not JSON ({error})") from error
    header.pop("__metadata__", None)
    start = 8 + length
    cut = [name for name, entry in header.items() if start + entry["data_offsets"][1] > size]
    if cut:
        shown = ", ".join(cut[:12]) + (f" and {len(cut) - 12} more" if len(cut) > 12 else "")
        raise ConversionError(
            f"{path} is truncated at {size} bytes; cut off or missing: {shown}. Copy or download the file again"
        )
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            raise ConversionError(f"{path}: {name} has dtype {entry['dtype']}, which is not known here")
        if last - first != math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize:
            raise ConversionError(f"{path}: {name} is {last - first} bytes, which does not fit its shape {entry['shape']}")
    return header, start


def shard_files(directory: pathlib.Path) -> list[pathlib.Path]:
    """The weight files of a directory: those its index names, or the only *.safetensors; [] if it holds none."""
    index = directory / INDEX
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [name for name in names if not (directory / name).exists()]
        if missing:
            raise ConversionError(f"{index} names files that are not there: {', '.join(missing)}")
        return [directory / name for name in names]
    files = sorted(directory.glob("*.safetensors"))
    if len(files) > 1:
        found = ", ".join(file.name for file in files)
        raise ConversionError(
            f"{directory} holds several weight files ({found}) but no {INDEX} that says which belong together"
        )
    return files


class SafetensorsSource:
    """The tensors of a directory as a `Source` (see assemble.py). Peak memory of `read` is the tensor it returns.

    `rename(name)` may give a tensor another name, for parts of other models; None hides it.
    """

    def __init__(self, directory: pathlib.Path, rename=None):
        self.directory = pathlib.Path(directory)
        self.entries = {}  # name -> (file, where its bytes begin, header entry)
        for path in shard_files(self.directory):
            header, start = read_header(path)
            for stored, entry in header.items():
                name = rename(stored) if rename else stored
                if name is None:
                    continue
                if name in self.entries:
                    raise ConversionError(f"{name} is given twice: in {self.entries[name][0].name} and in {path.name}")
                self.entries[name] = (path, start + entry["data_offsets"][0], entry)
        if not self.entries:
            raise ConversionError(
                f"{self.directory} holds no safetensors weights; expected {SINGLE} or {INDEX} with its shards"
            )
        if rename is None:
            self._check_index()

    def _check_index(self) -> None:
        index = self.directory / INDEX
        if not index.exists():
            return
        listed = json.loads(index.read_text())["weight_map"]
        for name in sorted(listed.keys() | self.entries.keys()):
            stored = self.entries[name][0].name if name in self.entries else None
            if listed.get(name) != stored:
                raise ConversionError(f"{index} places {name} in {listed.get(name)}, but it is in {stored}")

    def infos(self) -> dict[str, TensorInfo]:
        return {
            name: TensorInfo(tuple(entry["shape"]), DTYPES[entry["dtype"]].name) for name, (_, _, entry) in self.entries.items()
        }

    def read(self, name: str) -> np.ndarray:
        path, offset, entry = self.entries[name]
        tensor = np.empty(math.prod(entry["shape"]), DTYPES[entry["dtype"]])
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            view = memoryview(tensor.view(np.uint8))
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise ConversionError(f"{path} ended while {name} was read; it changed during the conversion")
                done += count
        return tensor.reshape(entry["shape"])


class SafetensorsWriter:
    """Shards of known tensors, filled in any order; nothing but the tensor at hand is in memory.

    Args:
      directory: an existing directory.
      tensors: (name, shape) in the order they shall have in the files.
      dtype: of all of them.
      shard_size: most bytes of tensors in one file; a larger tensor gets a file of its own.
    """

    def __init__(
        self, directory: pathlib.Path, tensors: Iterable[tuple[str, tuple[int, ...]]], dtype: np.dtype, shard_size: int
    ):
        self.dtype = dtype
        shards, filled = [{}], 0
        for name, shape in tensors:
            size = math.prod(shape) * dtype.itemsize
            if shards[-1] and filled + size > shard_size:
                shards.append({})
                filled = 0
            entry = {"dtype": CODES[dtype.name], "shape": list(shape), "data_offsets": [filled, filled + size]}
            shards[-1][name] = entry
            filled += size
        names = (
            [SINGLE] if len(shards) == 1 else [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
        )
        self.waiting = {}  # name -> (file, where its bytes go, header entry)
        for file, shard in zip(names, shards, strict=True):
            self._start(directory / file, shard)
        if len(shards) > 1:
            total = sum(math.prod(entry["shape"]) * dtype.itemsize for shard in shards for entry in shard.values())
            weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (directory / INDEX).write_text(json.dumps(index, indent=2))

    def _start(self, path: pathlib.Path, shard: dict) -> None:
        header = json.dumps({"__metadata__": {"format": "pt"}, **shard}).encode()
        header += b" " * (-len(header) % 8)  # tensors begin at a multiple of 8, as the reference implementation writes
        with path.open("wb") as file:
            file.write(len(header).to_bytes(8, "little"))
            file.write(header)
        for name, entry in shard.items():
            self.waiting[name] = (path, 8 + len(header) + entry["data_offsets"][0], entry)

    def write(self, name: str, tensor: np.ndarray) -> None:
        """Puts one tensor in its place; each name once."""
        if name not in self.waiting:
            raise ConversionError(f"{name} is not among the tensors to write, or was written before")
        path, offset, entry = self.waiting.pop(name)
        if list(tensor.shape) != entry["shape"] or tensor.dtype != self.dtype:
            raise ConversionError(f"{name} is {tensor.dtype}{tensor.shape}, planned as {self.dtype}{tuple(entry['shape'])}")
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))

    def close(self) -> None:
        if self.waiting:
            raise ConversionError(f"never written: {', '.join(list(self.waiting)[:12])}")
