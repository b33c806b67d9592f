"""Random access to the rows of annotation files: JSONL, JSON lists, tar shards, ArrayRecord.

    JSONL         one JSON object per line, in UTF-8; a .json file may be one too
    JSON          a list of objects
    tar           for each sample KEY.json and, if they are in it, its images KEY.jpg, KEY.1.png,
                  ... or its video KEY.mp4
    ArrayRecord   a record is a JSON object, or a small tar archive of one sample as above

The files may have any number of rows; a process holds only the row that it reads.
"""

import bisect
import hashlib
import io
import os
from collections.abc import Sequence

from internvl3_jax.data.sources.files import (
    ChangedError,
    FileError,
    exists,
    fingerprint,
    is_remote,
    open_binary,
    read_range,
)
from internvl3_jax.data.sources.json_list import is_list
from internvl3_jax.data.sources.row_index import RowIndex, index_places, open_index
from internvl3_jax.data.sources.row_scan import MAX_ROW, START, parsed_has_images
from internvl3_jax.data.sources.tars import TarError, members
from internvl3_jax.io import strict_json
from internvl3_jax.io.terminal import excerpt, one_line

KINDS = (".jsonl", ".json", ".tar", ".array_record", ".arrayrecord")
MAX_SAMPLE = 2 << 30  # bytes of a sample with its images in a tar shard
MAX_MEMBERS = 10_000  # files of a sample


class RowError(ValueError):
    """A row that does not follow the format. The caller adds which row it is."""


class Rows:
    """The rows of one or several files, one after the other.

    Threads may share it; a pickled copy opens its index again.
    """

    def __init__(self, paths: Sequence[str]):
        self.files = [_open(path) for path in paths]
        self.ends = []
        for file in self.files:
            self.ends.append(len(file) + (self.ends[-1] if self.ends else 0))

    @property
    def has_images(self) -> bool:
        return any(file.has_images for file in self.files)

    @property
    def identity(self) -> str:
        """Returns a short text that changes with rows or their order, not with the files' names."""
        digest = hashlib.sha256(
            " ".join(f"{len(file)} {file.digest}" for file in self.files).encode()
        )
        return f"{len(self)} rows, sha256 {digest.hexdigest()[:32]}"

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, row: int) -> tuple[dict, dict[str, bytes] | None]:
        """Returns a row's JSON object and its files by name; None if it is not in an archive."""
        file, number = self._find(row)
        data = file[number]
        return decode_tar(data) if file.is_tar(data) else (decode_json(data), None)

    def locate(self, row: int) -> str:
        """Names a row as a person finds it: "train.jsonl line 7"."""
        file, number = self._find(row)
        name = one_line(os.path.basename(file.path))
        unit = "sample"
        if file.path.endswith((".jsonl", ".json")):
            unit = "item" if file.is_list else "line"
        return f"{name} {unit} {number + 1}"

    def _find(self, row: int):
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        number = bisect.bisect_right(self.ends, row)
        return self.files[number], row - (self.ends[number - 1] if number else 0)


def _open(path: str):
    if not path.endswith(KINDS):
        packed = path.endswith((".gz", ".tgz", ".zst", ".bz2", ".xz", ".zip"))
        remedy = "; unpack it" if packed else ""
        raise FileError(
            f"{one_line(path)}: annotations are {', '.join(KINDS)} files, not compressed{remedy}"
        )
    is_indexed = path.endswith((".jsonl", ".json", ".tar"))
    return _IndexedFile(path) if is_indexed else _ArrayRecordFile(path)


class _IndexedFile:
    """Reads the bytes of each row of a .jsonl, .json or .tar file, by its index."""

    def __init__(self, path: str):
        self.path = path
        index = open_index(path)
        self.has_images, self.length, self.digest, self.stamp = (
            index.has_images,
            index.rows,
            index.digest,
            index.stamp,
        )
        self._index: RowIndex | None = index
        self.is_list = False
        if path.endswith(".json"):
            with open_binary(path) as file:
                self.is_list = is_list(file.read(START))

    def __len__(self) -> int:
        return self.length

    def is_tar(self, data: bytes) -> bool:
        return self.path.endswith(".tar")

    def __getitem__(self, row: int) -> bytes:
        if self._index is None:  # in a worker process
            self._index = open_index(self.path, self.digest)
        start, stop = map(int, self._index.offsets[row : row + 2])
        is_tar = self.path.endswith(".tar")
        if not 0 <= start <= stop <= self.stamp[0]:
            raise self._misplaced(row)
        longest = MAX_SAMPLE if is_tar else MAX_ROW
        if stop - start > longest:
            raise RowError(f"has {stop - start:,} bytes; at most {longest:,} are read")
        self._check_unchanged()
        if is_tar:
            return read_range(self.path, start, stop)
        if self.is_list:
            item = read_range(self.path, start, stop).rstrip().removesuffix(b",").rstrip()
            if item[:1] != b"{" or item[-1:] != b"}":
                raise self._misplaced(row)
            return item
        # The line break before a row says that the index is of this file.
        data = read_range(self.path, max(0, start - 1), stop)
        line = data if start == 0 else data[1:]
        if (start and data[:1] != b"\n") or b"\n" in line.rstrip():
            raise self._misplaced(row)
        return line

    def _misplaced(self, row: int) -> ChangedError:
        return ChangedError(
            f"{one_line(self.path)}: row {row} is not where its index says: the file was changed "
            f"while in use, or the index is damaged; delete "
            f"{one_line(str(index_places(self.path)[0]))} and start again"
        )

    def _check_unchanged(self) -> None:
        if not is_remote(self.path) and fingerprint(self.path)[:2] != self.stamp[:2]:
            raise ChangedError(
                f"{one_line(self.path)}: was changed while in use; start again, so that its rows "
                f"are counted again"
            )

    def __getstate__(self):
        return self.__dict__ | {"_index": None}


class _ArrayRecordFile:
    """Reads the records of an ArrayRecord file."""

    def __init__(self, path: str):
        if is_remote(path):
            raise FileError(
                f"{path}: ArrayRecord files are read from local disks only; copy it, or use .jsonl "
                f"or .tar"
            )
        try:
            from array_record.python.array_record_data_source import ArrayRecordDataSource
        except ImportError as error:
            raise FileError(
                f"{path}: needs the array_record package: pip install array_record"
            ) from error
        if not exists(path):
            raise FileError(f"{one_line(path)}: no such file")
        with open_binary(path):
            pass  # refuses a pipe, for which ArrayRecord would wait
        try:
            self.path, self.records = path, ArrayRecordDataSource([path])
            index = open_index(path, scan=self._scan)
        except FileError:
            raise
        except Exception as error:  # the library raises exceptions of many types
            raise FileError(
                f"{one_line(path)}: is not an ArrayRecord file, or damaged ({one_line(str(error))})"
            ) from error
        self.has_images, self.digest = index.has_images, index.digest

    def __len__(self) -> int:
        return len(self.records)

    def is_tar(self, data: bytes) -> bool:
        return not data.lstrip().startswith((b"{", b"\xef\xbb\xbf"))

    def _scan(self, file, writer, path: str) -> None:
        for row in range(len(self)):
            data = self[row]
            writer.rows += 1
            writer.digest.update(f"{len(data)} ".encode() + data)
            writer.images = writer.images or self.is_tar(data) or parsed_has_images(data)

    def __getitem__(self, row: int) -> bytes:
        return self.records[row]


def decode_json(data: bytes) -> dict:
    """Parses a row's bytes as a JSON object. RowError if they are none."""
    if not data.strip():
        raise RowError("the line is empty")
    try:
        row = strict_json.loads(_text(data), "row")
    except ValueError as error:
        raise RowError(str(error).removeprefix("row: ")) from error
    if not isinstance(row, dict):
        raise RowError(
            f"is {strict_json.describe(row)}; expected an object with the key conversations"
        )
    return row


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RowError(f"byte {error.start} is not UTF-8; save the file as UTF-8") from error


def decode_tar(data: bytes) -> tuple[dict, dict[str, bytes]]:
    """Reads a sample's part of a tar archive: its JSON object, and its other files by name."""
    files: dict[str, bytes] = {}
    try:
        for member in members(
            io.BytesIO(data), "its part of the tar archive", MAX_SAMPLE, has_end=False
        ):
            if member.name in files:
                raise RowError(
                    f"has two files {excerpt(member.name)}; a name must occur once in a sample"
                )
            if len(files) == MAX_MEMBERS:
                raise RowError(f"has more than {MAX_MEMBERS:,} files")
            files[member.name] = member.read()
    except TarError as error:
        raise RowError(str(error)) from error
    rows = [name for name in files if name.endswith(".json")]
    if len(rows) != 1:
        names = one_line(", ".join(list(files)[:10]))
        raise RowError(
            f"the files {names} hold {len(rows)} .json files; expected one, next to its images"
        )
    return decode_json(files.pop(rows[0])), files
