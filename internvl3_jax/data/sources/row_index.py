"""The index of an annotation file: an .npy file of int64 with the position of each row, which
processes map into memory instead of reading it.

    HEADER numbers (`_HEADER_NAMES`), start of row 0, start of row 1, ... end of the last row

It is written next to the file or, where that folder cannot be written or is remote, in
$INTERNVL3_JAX_CACHE (by default ~/.cache/internvl3_jax), and again after the file was written.
Writing is atomic: several processes may build an index at once, and the last one wins.

A written file is recognized by its size, its time stamp, and the time of its last change, which no
program can set back. An index that was built within SETTLED of that change is built again, since
the clock of a file system is coarse.

A row of a JSON list is one of its objects. A JSONL row is a line. Lines without content count as
rows (and are errors when read), except at the end of the file. A row of a tar shard is a run of
files with the same name up to the first dot, as WebDataset writes them. An ArrayRecord file finds
its records itself, so its index holds only the numbers in front.
"""

import dataclasses
import hashlib
import os
import pathlib
import tempfile
import time
from collections.abc import Callable

import numpy as np

from internvl3_jax.data.sources.files import (
    INDEX,
    ChangedError,
    FileError,
    fingerprint,
    is_remote,
    open_binary,
)
from internvl3_jax.data.sources.row_scan import scanner_of
from internvl3_jax.io.safe_files import open_regular
from internvl3_jax.io.terminal import one_line

VERSION = 3
_HEADER_NAMES = (
    "version",
    "size",
    "written",
    "changed",
    "built",
    "rows",
    "images",
    "hash0",
    "hash1",
    "hash2",
    "hash3",
)
HEADER = len(_HEADER_NAMES)  # int64 before the offsets
# nanoseconds between a file's change and its index, from which on the change shows in the time
# stamps
SETTLED = 2 * 10**9


@dataclasses.dataclass
class RowIndex:
    """The rows of an annotation file.

    Attributes:
      offsets: i64[rows + 1], mapped into memory; empty for ArrayRecord.
      has_images: Whether any row has an image or a video.
      digest: Hash in hex of the rows' bytes in their order; for a tar shard, of its rows' JSON and
        the names, sizes and positions of its members.
      stamp: `fingerprint` of the file.
    """

    offsets: np.ndarray
    rows: int
    has_images: bool
    digest: str
    stamp: tuple[int, int, int]


def open_index(path: str, digest: str | None = None, scan: Callable | None = None) -> RowIndex:
    """Opens the index of an annotation file; builds it if it is missing or out of date.

    Args:
      digest: That of an earlier index of this path; the file must then be the same.
      scan: Takes (file, writer, path) and adds the rows to the writer; by default by the suffix.

    Raises:
      ChangedError: The file is not that of `digest`, or was written during the scan.
      FileError: The file cannot be read, or no index can be written.
    """
    stamp = fingerprint(path)
    places = index_places(path)
    for place in places:
        index = _load(place, stamp, digest)
        if index is not None:
            return index
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            index = _write(path, place, stamp, scan or scanner_of(path))
        except PermissionError:
            continue
        except OSError as error:
            if error.errno != 30:  # a read-only file system
                raise
            continue
        if digest is not None and index.digest != digest:
            raise ChangedError(
                f"{one_line(path)}: was changed while in use; start again, so that its rows are "
                f"counted again"
            )
        return index
    raise FileError(
        f"{path}: its index cannot be written to {' or '.join(map(str, places))}; set "
        f"INTERNVL3_JAX_CACHE to a folder that can be written"
    )


def index_places(path: str) -> list[pathlib.Path]:
    """Returns the paths where the index of a file may be, the preferred one first."""
    name = f"{os.path.basename(path)}{INDEX}"
    full_path = path if is_remote(path) else os.path.abspath(path)
    cache = pathlib.Path(
        os.path.expanduser(os.environ.get("INTERNVL3_JAX_CACHE") or "~/.cache/internvl3_jax")
    )
    cached = cache / f"{hashlib.sha256(os.fsencode(full_path)).hexdigest()[:16]}-{name}"
    return [cached] if is_remote(path) else [pathlib.Path(full_path).parent / name, cached]


def _load(place: pathlib.Path, stamp: tuple[int, int, int], digest: str | None) -> RowIndex | None:
    """Reads an index; None if it is missing, damaged, or of another state of the file."""
    values = _map(place)
    if values is None:
        return None
    header = dict(zip(_HEADER_NAMES, values[:HEADER].tolist(), strict=True))
    saved = header["size"], header["written"], header["changed"]
    index = RowIndex(
        values[HEADER:],
        header["rows"],
        bool(header["images"]),
        values[HEADER - 4 : HEADER].tobytes().hex(),
        saved,
    )
    if header["version"] != VERSION or len(index.offsets) not in (0, index.rows + 1):
        return None
    if len(index.offsets) and (index.offsets[0] < 0 or index.offsets[-1] > stamp[0]):
        return None
    if digest is not None:  # the time of change also changes with the name and the permissions
        return index if saved[:2] == stamp[:2] and index.digest == digest else None
    return index if saved == stamp and header["built"] - header["changed"] > SETTLED else None


def _map(place: pathlib.Path) -> np.ndarray | None:
    """Maps the int64 of an .npy file; None if the file is not complete."""
    try:
        with open_regular(place) as file:
            if np.lib.format.read_magic(file) != (1, 0):
                return None
            shape, _, kind = np.lib.format.read_array_header_1_0(file)
            is_complete = (
                len(shape) == 1
                and kind == np.int64
                and file.tell() + 8 * shape[0] == os.fstat(file.fileno()).st_size
            )
            return (
                np.memmap(file, np.int64, "r", file.tell(), shape)
                if is_complete and shape[0] >= HEADER
                else None
            )
    except (OSError, ValueError, TypeError, OverflowError):  # FileError is a ValueError
        return None


def _write(path: str, place: pathlib.Path, stamp: tuple[int, int, int], scan: Callable) -> RowIndex:
    """Builds the index in a temporary file next to `place` and moves it there."""
    handle, temporary = tempfile.mkstemp(prefix=f".{place.name[:100]}.", dir=place.parent)
    try:
        with os.fdopen(handle, "wb") as out, open_binary(path) as file:
            os.fchmod(out.fileno(), 0o644)
            writer = RowWriter(out)
            built = time.time_ns()
            scan(file, writer, path)
            writer.finish(stamp, built)
        if fingerprint(path) != stamp:
            raise ChangedError(
                f"{one_line(path)}: was changed while its rows were counted; start again"
            )
        os.replace(temporary, place)
    except BaseException:
        os.unlink(temporary)
        raise
    return RowIndex(
        _map(place)[HEADER:], writer.rows, writer.images, writer.digest.hexdigest(), stamp
    )


class RowWriter:
    """A growing .npy file of int64: numpy's header has room for the final length."""

    def __init__(self, out):
        self.out, self.count, self.rows = out, 0, 0
        self.digest, self.images = hashlib.sha256(), False
        self._header()
        self._append([0] * HEADER)

    def starts(self, values) -> None:
        """Appends the positions at which rows begin."""
        self._append(values)
        self.rows += len(values)

    def end(self, value: int) -> None:
        """Appends the position at which the last row ends."""
        self._append([value])

    def _append(self, values) -> None:
        self.out.write(np.asarray(values, np.int64).tobytes())
        self.count += len(values)

    def finish(self, stamp: tuple[int, int, int], built: int) -> None:
        self.out.seek(0)
        self._header()
        hashes = np.frombuffer(self.digest.digest(), np.int64).tolist()
        self.out.write(
            np.asarray(
                [VERSION, *stamp, built, self.rows, self.images, *hashes], np.int64
            ).tobytes()
        )

    def _header(self) -> None:
        described = {
            "descr": np.lib.format.dtype_to_descr(np.dtype(np.int64)),
            "fortran_order": False,
            "shape": (self.count,),
        }
        np.lib.format.write_array_header_1_0(self.out, described)
