"""Reads and writes safetensors files one tensor at a time, in any order.

The format is a little-endian u64 with the length of a JSON header, the header (name -> dtype,
shape, byte range), then the bytes. The safetensors library maps files into memory, so a file that
shrinks kills the process, and it accepts a name that occurs twice. So files are read here, and the
library is a second opinion.
"""

import json
import logging
import math
import os
import pathlib
from collections.abc import Callable, Iterable

import ml_dtypes
import numpy as np
import safetensors

from internvl3_jax.checkpoints.hf.assemble import ConversionError, TensorInfo
from internvl3_jax.io.model_files import exists, open_file, read_file
from internvl3_jax.io.strict_json import JsonError, Object, check, loads
from internvl3_jax.io.terminal import excerpt, one_line

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
LARGEST_HEADER = 100_000_000  # bytes; the safetensors library's own limit
_LARGEST = 1 << 60  # of a size or an offset
_AGAIN = "copy or download the file again"

log = logging.getLogger(__name__)


def read_header(path: pathlib.Path) -> tuple[dict[str, dict], int]:
    """Returns (name -> {dtype, shape, data_offsets}, offset of the first byte of tensors).

    Raises:
      ConversionError, FileError: the file is not valid safetensors by the library's own rules, or
        shorter than its header says; the message names the tensors.
    """
    where = one_line(str(path))
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ConversionError(
                f"{where} is truncated or not a safetensors file: its header is longer than the "
                f"file ({size} bytes); {_AGAIN}"
            )
        if length > LARGEST_HEADER:
            raise ConversionError(
                f"{where} is not a safetensors file: its header has {length:,} bytes; at most "
                f"{LARGEST_HEADER:,} are read"
            )
        content = file.read(length)
    try:
        header = Object(loads(content, f"{where}: header"), f"{where}: header").values
    except JsonError as error:
        raise ConversionError(
            f"{where} is not a safetensors file: its header is not valid JSON ({error}); {_AGAIN}"
        ) from error
    for name, text in Object(header, f"{where}: header").get("__metadata__", dict, {}).items():
        check(text, str, f"{where}: header: __metadata__: {excerpt(name)}")
    entries = {
        name: _entry(entry, f"{where}: header: {one_line(name)}")
        for name, entry in header.items()
        if name != "__metadata__"
    }
    _check_ranges(where, entries, size - 8 - length)
    try:
        with safetensors.safe_open(path, "np"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise ConversionError(
            f"{where} is refused by the safetensors library: {one_line(str(error))}; {_AGAIN}"
        ) from error
    return entries, 8 + length


def _entry(values, where: str) -> dict:
    """Checks the entry of one tensor."""
    fields = Object(values, where)
    code = fields.get("dtype", str)
    if code not in DTYPES:
        raise ConversionError(
            f"{where}: dtype is {excerpt(code)}, which is not supported; supported are "
            f"{', '.join(DTYPES)}"
        )
    shape = fields.list_of("shape", int, low=0, high=_LARGEST)
    first, last = fields.list_of("data_offsets", int, length=2, low=0, high=_LARGEST)
    fields.finish()
    if len(shape) > 16 or last - first != math.prod(shape) * DTYPES[code].itemsize:
        raise ConversionError(
            f"{where}: data_offsets give {last - first} bytes, which does not fit its shape "
            f"{excerpt(shape)} of {code}"
        )
    return {"dtype": code, "shape": shape, "data_offsets": [first, last]}


def _check_ranges(where: str, entries: dict[str, dict], size: int) -> None:
    """Checks that the tensors cover all bytes without overlap or gap."""
    cut = [one_line(name) for name, entry in entries.items() if entry["data_offsets"][1] > size]
    if cut:
        shown = ", ".join(cut[:12]) + (f" and {len(cut) - 12} more" if len(cut) > 12 else "")
        raise ConversionError(
            f"{where} is truncated, {size} bytes of tensors are left; cut off or missing: "
            f"{shown}; {_AGAIN}"
        )
    end, before = 0, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        if first != end:
            what = (
                f"overlaps with {before}"
                if first < end
                else f"leaves a gap of {first - end} bytes after {before}"
            )
            raise ConversionError(
                f"{where}: header: {one_line(name)} {what} (data_offsets {first}, {last}); {_AGAIN}"
            )
        end, before = last, one_line(name)
    if end != size:
        raise ConversionError(
            f"{where}: {size - end} bytes after the last tensor belong to none; {_AGAIN}"
        )


def read_index(directory: pathlib.Path) -> dict[str, str]:
    """Returns tensor name -> file name from the index of a directory."""
    path = directory / INDEX
    where = one_line(str(path))
    placed = Object(loads(read_file(path), where), where).get("weight_map", dict, low=1)
    for name, file in placed.items():
        check(file, str, f"{where}: weight_map: {one_line(name)}", low=1, high=255)
        if pathlib.PurePath(file).name != file or "\0" in file or not file.endswith(".safetensors"):
            raise ConversionError(
                f"{where}: weight_map: {one_line(name)} is in {excerpt(file)}; expected a file of "
                "this directory, NAME.safetensors"
            )
    return placed


def shard_files(directory: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, str] | None]:
    """Returns the weight files of a directory, and the index of their tensors if it is used.

    As in transformers, model.safetensors comes first, then the index, then a single *.safetensors.
    """
    if exists(directory / SINGLE):
        others = sorted(
            path.name for path in directory.glob("*.safetensors*") if path.name != SINGLE
        )
        if others:
            log.warning(
                "%s: opening %s, as transformers does; ignoring %s",
                directory,
                SINGLE,
                one_line(", ".join(others[:12])),
            )
        return [directory / SINGLE], None
    if exists(directory / INDEX):
        index = read_index(directory)
        names = sorted(set(index.values()))
        missing = [name for name in names if not exists(directory / name)]
        if missing:
            shown = one_line(", ".join(missing[:12])) + (
                f" and {len(missing) - 12} more" if len(missing) > 12 else ""
            )
            raise ConversionError(
                f"{directory / INDEX} names files that do not exist: {shown}; download the model "
                "again"
            )
        return [directory / name for name in names], index
    files = sorted(path for path in directory.glob("*.safetensors") if exists(path))
    if len(files) > 1:
        found = one_line(", ".join(file.name for file in files[:12]))
        raise ConversionError(
            f"{directory} has several weight files ({found}) but no {INDEX} that says which "
            "belong together"
        )
    return files, None


class SafetensorsSource:
    """The tensors of a directory as a `Source` (see assemble.py).

    The peak memory of `read` is the tensor that it returns.

    Args:
      directory: the directory.
      rename: maps a tensor's name to another, for parts of other models; None hides it.
      file: the only file to read; None reads `shard_files`.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        rename: Callable[[str], str | None] | None = None,
        file: str | None = None,
    ):
        self.directory = pathlib.Path(directory)
        self.entries = {}  # name -> (file, offset of its bytes, header entry)
        paths, index = ([self.directory / file], None) if file else shard_files(self.directory)
        for path in paths:
            header, start = read_header(path)
            if index is not None:
                self._check_index(index, path.name, header)
            for stored, entry in header.items():
                name = rename(stored) if rename else stored
                if name is None:
                    continue
                if name in self.entries:
                    raise ConversionError(
                        f"{one_line(name)} is given twice: in "
                        f"{one_line(str(self.entries[name][0]))} and in {one_line(path.name)}"
                    )
                self.entries[name] = (path, start + entry["data_offsets"][0], entry)
        if not self.entries:
            raise ConversionError(
                f"{self.directory} holds no safetensors weights; expected {SINGLE} or {INDEX} "
                "with its shards"
            )

    def _check_index(self, index: dict[str, str], file: str, header: dict[str, dict]) -> None:
        listed = {name for name, place in index.items() if place == file}
        for name in sorted(listed ^ header.keys()):
            placed = f"in {one_line(index[name])}" if name in index else "nowhere"
            found = f"it is in {one_line(file)}" if name in header else "that file does not have it"
            raise ConversionError(
                f"{self.directory / INDEX} places {one_line(name)} {placed}, but {found}"
            )

    def infos(self) -> dict[str, TensorInfo]:
        return {
            name: TensorInfo(tuple(entry["shape"]), DTYPES[entry["dtype"]].name)
            for name, (_, _, entry) in self.entries.items()
        }

    def read(self, name: str) -> np.ndarray:
        path, offset, entry = self.entries[name]
        tensor = np.empty(math.prod(entry["shape"]), DTYPES[entry["dtype"]])
        with open_file(path) as file:
            file.seek(offset)
            view = memoryview(tensor.view(np.uint8))
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise ConversionError(
                        f"{path} ended while {one_line(name)} was read; it changed during the "
                        "conversion"
                    )
                done += count
        return tensor.reshape(entry["shape"])


class SafetensorsWriter:
    """Writes shards of known tensors in any order, with one tensor in memory.

    Args:
      directory: an existing directory.
      tensors: (name, shape) in the order of the files.
      dtype: dtype of all tensors.
      shard_size: most bytes of tensors in one file; a larger tensor gets a separate file.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        tensors: Iterable[tuple[str, tuple[int, ...]]],
        dtype: np.dtype,
        shard_size: int,
    ):
        self.dtype = dtype
        shards, filled = [{}], 0
        for name, shape in tensors:
            size = math.prod(shape) * dtype.itemsize
            if shards[-1] and filled + size > shard_size:
                shards.append({})
                filled = 0
            entry = {
                "dtype": CODES[dtype.name],
                "shape": list(shape),
                "data_offsets": [filled, filled + size],
            }
            shards[-1][name] = entry
            filled += size
        names = (
            [SINGLE]
            if len(shards) == 1
            else [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
        )
        self.waiting = {}  # name -> (file, offset of its bytes, header entry)
        for file, shard in zip(names, shards, strict=True):
            self._start(directory / file, shard)
        if len(shards) > 1:
            total = sum(
                math.prod(entry["shape"]) * dtype.itemsize
                for shard in shards
                for entry in shard.values()
            )
            weight_map = {
                name: file for file, shard in zip(names, shards, strict=True) for name in shard
            }
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (directory / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")

    def _start(self, path: pathlib.Path, shard: dict) -> None:
        header = json.dumps({"__metadata__": {"format": "pt"}, **shard}).encode()
        # Tensors start at a multiple of 8, as in the reference implementation.
        header += b" " * (-len(header) % 8)
        with path.open("wb") as file:
            file.write(len(header).to_bytes(8, "little"))
            file.write(header)
        for name, entry in shard.items():
            self.waiting[name] = (path, 8 + len(header) + entry["data_offsets"][0], entry)

    def write(self, name: str, tensor: np.ndarray) -> None:
        """Writes one tensor; each name once."""
        if name not in self.waiting:
            raise ConversionError(
                f"{name} is not among the tensors to write, or was written before"
            )
        path, offset, entry = self.waiting.pop(name)
        if list(tensor.shape) != entry["shape"] or tensor.dtype != self.dtype:
            raise ConversionError(
                f"{name} is {tensor.dtype}{tensor.shape}, planned as "
                f"{self.dtype}{tuple(entry['shape'])}"
            )
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))

    def close(self) -> None:
        if self.waiting:
            raise ConversionError(f"never written: {', '.join(list(self.waiting)[:12])}")
