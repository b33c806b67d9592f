"""Random access to the rows of annotation files: JSONL, tar shards, ArrayRecord.

    JSONL         one JSON object a line
    tar           of each sample KEY.json and, if they travel with it, its pictures KEY.jpg, KEY.1.png, ... or video KEY.mp4
    ArrayRecord   a record is a JSON object, or a small tar archive of one sample as above

The files hold any number of rows and no process holds more than the one it reads.
"""

import bisect
import io
import json
import os
import tarfile
from collections.abc import Sequence

from internvl3_jax.data.files import FileError, is_remote, read_range
from internvl3_jax.data.row_index import RowIndex, has_pictures, open_index

KINDS = (".jsonl", ".tar", ".array_record", ".arrayrecord")


class RowError(ValueError):
    """A row that is not what the format asks for. The message says what is wrong, not where: the caller knows."""


class Rows:
    """The rows of one or several files, one after the other. Threads may share it; a pickled copy opens its index anew."""

    def __init__(self, paths: Sequence[str]):
        self.files = [_open(path) for path in paths]
        self.ends = []
        for file in self.files:
            self.ends.append(len(file) + (self.ends[-1] if self.ends else 0))

    @property
    def has_pictures(self) -> bool:
        return any(file.has_pictures for file in self.files)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, row: int) -> tuple[dict, dict[str, bytes]]:
        """The JSON object of a row, and the files that came with it by name."""
        file, number = self._find(row)
        data = file[number]
        return decode_tar(data) if file.is_tar(data) else (decode_json(data), {})

    def locate(self, row: int) -> str:
        """Where a person finds a row: "train.jsonl line 7"."""
        file, number = self._find(row)
        return f"{os.path.basename(file.path)} {'line' if file.path.endswith('.jsonl') else 'sample'} {number + 1}"

    def _find(self, row: int):
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        number = bisect.bisect_right(self.ends, row)
        return self.files[number], row - (self.ends[number - 1] if number else 0)


def _open(path: str):
    if not path.endswith(KINDS):
        raise FileError(f"{path}: annotations are {', '.join(KINDS)} files, not compressed")
    return _IndexedFile(path) if path.endswith((".jsonl", ".tar")) else _ArrayRecordFile(path)


class _IndexedFile:
    """Bytes of each row of a .jsonl or .tar file, by its index."""

    def __init__(self, path: str):
        self.path = path
        index = open_index(path)
        self.has_pictures, self.length = index.has_pictures, len(index.offsets) - 1
        self._index: RowIndex | None = index

    def __len__(self) -> int:
        return self.length

    def is_tar(self, data: bytes) -> bool:
        return self.path.endswith(".tar")

    def __getitem__(self, row: int) -> bytes:
        if self._index is None:  # in a worker process
            self._index = open_index(self.path)
            if len(self._index.offsets) - 1 != self.length:
                raise FileError(f"{self.path}: was changed while in use")
        start, stop = self._index.offsets[row : row + 2]
        return read_range(self.path, int(start), int(stop))

    def __getstate__(self):
        return self.__dict__ | {"_index": None}


class _ArrayRecordFile:
    """Records of an ArrayRecord file."""

    def __init__(self, path: str):
        if is_remote(path):
            raise FileError(f"{path}: ArrayRecord files are read from local disks; copy it, or use .jsonl or .tar")
        try:
            from array_record.python.array_record_data_source import ArrayRecordDataSource
        except ImportError as error:
            raise FileError(f"{path}: needs the array_record package: pip install array_record") from error
        if not os.path.exists(path):
            raise FileError(f"{path}: no such file")
        self.path, self.records = path, ArrayRecordDataSource([path])
        self.has_pictures = any(self._shows(self[row]) for row in range(len(self)))

    def __len__(self) -> int:
        return len(self.records)

    def is_tar(self, data: bytes) -> bool:
        return not data.lstrip().startswith(b"{")

    def _shows(self, data: bytes) -> bool:
        try:
            return self.is_tar(data) or has_pictures(decode_json(data))
        except RowError:  # whoever reads this row gets the error with its place
            return False

    def __getitem__(self, row: int) -> bytes:
        return self.records[row]


def decode_json(data: bytes) -> dict:
    """The JSON object of a row's bytes. RowError if there is none."""
    if not data.strip():
        raise RowError("the line is empty")
    try:
        row = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RowError(f"is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise RowError(f"is a JSON {type(row).__name__}; expected an object with the key conversations")
    return row


def decode_tar(data: bytes) -> tuple[dict, dict[str, bytes]]:
    """The JSON object of a sample's part of a tar archive, and its other files by name. RowError if they cannot be read."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            files = {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}
    except tarfile.TarError as error:
        raise RowError(f"its part of the tar archive is damaged: {error}") from error
    rows = [name for name in files if name.endswith(".json")]
    if len(rows) != 1:
        raise RowError(f"the files {', '.join(files)} hold {len(rows)} .json files; expected one, next to its pictures")
    return decode_json(files.pop(rows[0])), files
