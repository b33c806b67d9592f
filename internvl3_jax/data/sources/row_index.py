"""Where each row of an annotation file begins: an .npy file of int64 that every process maps and
none holds in memory.

    HEADER numbers (`_HEADER_NAMES`), start of row 0, start of row 1, ... end of the last row

It is written once, beside the file or, where that folder cannot be written or is remote, in
$INTERNVL3_JAX_CACHE (by default ~/.cache/internvl3_jax), and again when the file was written since.
Writing is atomic: several processes may build it at once, each for itself, and the last one wins.

That a file was written is seen from its size, its time stamp, and the time of its last change,
which no program can set back. An index that was built within a moment of that change is built
again: the clock of a file system is coarse.

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
from internvl3_jax.data.sources.json_list import ListScanner, is_list
from internvl3_jax.data.sources.tars import members
from internvl3_jax.io import jsonl, strict_json
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
CHUNK = 1 << 24  # bytes read at a time
LIST_CHUNK = 1 << 20  # of a JSON list, whose brackets are counted
START = 4096  # bytes that tell a list from lines
MEDIA_PARTS = {"image", "image_url", "video", "video_url"}  # types of content parts
MAX_ROW = 256 << 20  # bytes of a JSON row
MENTIONS = tuple(
    f'"{name}{end}"'.encode() for name in ("image", "video") for end in ("", "s", "_url")
)


@dataclasses.dataclass
class RowIndex:
    """What is known of an annotation file."""

    offsets: np.ndarray  # i64[rows + 1], mapped; empty for ArrayRecord
    rows: int
    has_images: bool  # whether any row has an image or video
    digest: (
        # hex; of the rows' bytes in their order, of a tar shard of its rows' JSON and its members'
        # names, sizes and places
        str
    )
    stamp: tuple[int, int, int]  # `fingerprint` of the file


def has_images(row) -> bool:
    """Whether a row of the annotations has an image or a video, by its keys or as a content part."""
    if not isinstance(row, dict):
        return False
    if any(row.get(name) for name in ("image", "video", "images", "videos")):
        return True
    turns = row.get("messages") or row.get("conversations")
    contents = [
        turn.get("content") or turn.get("value")
        for turn in (turns if isinstance(turns, list) else ())
        if isinstance(turn, dict)
    ]
    return any(
        isinstance(part, dict) and not MEDIA_PARTS.isdisjoint([*part, str(part.get("type"))])
        for content in contents
        if isinstance(content, list)
        for part in content
    )


def open_index(path: str, digest: str | None = None, scan: Callable | None = None) -> RowIndex:
    """The index of an annotation file, built if there is none or the file was written since.

    Args:
      digest: of an index that this path had before; then the file must be the same as it was.
      scan: of (file, writer, path), appends the rows to the writer; by default that of the path's
          ending.

    Raises:
      ChangedError: the file is not the one of `digest`, or was written during the scan.
      FileError: it cannot be read, or there is no place for an index.
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
            index = _write(path, place, stamp, scan or _scan_of(path))
        except PermissionError:
            continue
        except OSError as error:
            if error.errno != 30:  # a read-only file system
                raise
            continue
        if digest is not None and index.digest != digest:
            raise ChangedError(
                f"{one_line(path)}: was changed while in use; start again, so that its rows are counted anew"
            )
        return index
    raise FileError(
        f"{path}: no place for its index can be written: {', '.join(map(str, places))}; set INTERNVL3_JAX_CACHE"
    )


def index_places(path: str) -> list[pathlib.Path]:
    """Where the index of a file may be, the preferred place first."""
    name = f"{os.path.basename(path)}{INDEX}"
    where = path if is_remote(path) else os.path.abspath(path)
    cache = pathlib.Path(
        os.path.expanduser(os.environ.get("INTERNVL3_JAX_CACHE") or "~/.cache/internvl3_jax")
    )
    cached = cache / f"{hashlib.sha256(os.fsencode(where)).hexdigest()[:16]}-{name}"
    return [cached] if is_remote(path) else [pathlib.Path(where).parent / name, cached]


def _load(place: pathlib.Path, stamp: tuple[int, int, int], digest: str | None) -> RowIndex | None:
    """An index that is there, whole and of this state of the file; else None."""
    values = _map(place)
    if values is None:
        return None
    header = dict(zip(_HEADER_NAMES, values[:HEADER].tolist(), strict=True))
    found = header["size"], header["written"], header["changed"]
    index = RowIndex(
        values[HEADER:],
        header["rows"],
        bool(header["images"]),
        values[HEADER - 4 : HEADER].tobytes().hex(),
        found,
    )
    if header["version"] != VERSION or len(index.offsets) not in (0, index.rows + 1):
        return None
    if len(index.offsets) and (index.offsets[0] < 0 or index.offsets[-1] > stamp[0]):
        return None
    if digest is not None:  # the change alone would also tell of a new name or new permissions
        return index if found[:2] == stamp[:2] and index.digest == digest else None
    return index if found == stamp and header["built"] - header["changed"] > SETTLED else None


def _map(place: pathlib.Path) -> np.ndarray | None:
    """The int64 of an .npy file, mapped; None unless it is a whole one."""
    try:
        with open_regular(place) as file:
            if np.lib.format.read_magic(file) != (1, 0):
                return None
            shape, _, kind = np.lib.format.read_array_header_1_0(file)
            whole = (
                len(shape) == 1
                and kind == np.int64
                and file.tell() + 8 * shape[0] == os.fstat(file.fileno()).st_size
            )
            return (
                np.memmap(file, np.int64, "r", file.tell(), shape)
                if whole and shape[0] >= HEADER
                else None
            )
    except (OSError, ValueError, TypeError, OverflowError):  # FileError is a ValueError
        return None


def _write(path: str, place: pathlib.Path, stamp: tuple[int, int, int], scan: Callable) -> RowIndex:
    """Builds the index in a file beside `place` and moves it there."""
    handle, temporary = tempfile.mkstemp(prefix=f".{place.name[:100]}.", dir=place.parent)
    try:
        with os.fdopen(handle, "wb") as out, open_binary(path) as file:
            os.fchmod(out.fileno(), 0o644)
            writer = _Writer(out)
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


class _Writer:
    """An .npy file of int64 that grows: numpy leaves room in its header for the final length."""

    def __init__(self, out):
        self.out, self.count, self.rows = out, 0, 0
        self.digest, self.images = hashlib.sha256(), False
        self._header()
        self._append([0] * HEADER)

    def starts(self, values) -> None:
        """Where rows begin."""
        self._append(values)
        self.rows += len(values)

    def end(self, value: int) -> None:
        """Where the last row ends."""
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


def _scan_of(path: str) -> Callable:
    if path.endswith(".tar"):
        return _scan_tar
    return _scan_json if path.endswith(".json") else _scan_lines


def _scan_json(file, writer: _Writer, path: str) -> None:
    """A .json file is a list of rows or, as some data sets are published, has one on each line."""
    start = file.read(START)
    file.seek(0)
    (_scan_list if is_list(start) else _scan_lines)(file, writer, path)


def _scan_list(file, writer: _Writer, path: str) -> None:
    def add_row(start: int, row: bytes) -> None:
        writer.starts([start])
        if not writer.images and any(mention in row for mention in MENTIONS):
            writer.images = parsed_has_images(row)

    scanner = ListScanner(path, add_row, MAX_ROW)
    while chunk := file.read(LIST_CHUNK):
        writer.digest.update(chunk)
        scanner.feed(chunk)
    writer.end(scanner.finish())


def _scan_lines(file, writer: _Writer, path: str) -> None:
    end = _content_end(file)
    file.seek(max(0, end - 1))
    last = file.read(1)
    file.seek(0)
    jsonl.check_kind(file.read(4096), last, one_line(path))
    file.seek(0)
    writer.starts([0] if end else [])
    position, rest = 0, b""
    while chunk := file.read(CHUNK):
        writer.digest.update(chunk)
        starts = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + (position + 1)
        writer.starts(starts[starts < end])
        position += len(chunk)
        if not writer.images:
            lines, newline, rest = (rest + chunk).rpartition(b"\n")
            writer.images = _lines_have_images(lines + newline)
            if len(rest) > MAX_ROW:  # an error when it is read
                rest = b""
    writer.images = writer.images or _lines_have_images(rest)
    writer.end(end)


def _content_end(file) -> int:
    """Bytes of a file without the white space at its end."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        file.seek(start)
        tail = file.read(end - start).rstrip()
        if tail:
            return start + len(tail)
        end = start
    return 0


def _lines_have_images(lines: bytes) -> bool:
    """Whether any of these whole lines has an image. Only those that mention one are parsed."""
    for mention in MENTIONS:
        place = lines.find(mention)
        while place >= 0:
            start, stop = lines.rfind(b"\n", 0, place) + 1, lines.find(b"\n", place)
            stop = len(lines) if stop < 0 else stop
            if parsed_has_images(lines[start:stop]):
                return True
            place = lines.find(mention, stop)
    return False


def parsed_has_images(line: bytes) -> bool:
    """`has_images` of a row's bytes; False if they are no JSON."""
    try:
        return has_images(strict_json.loads(line, ""))
    except ValueError:  # whoever reads this row gets the error with its place
        return False


def _scan_tar(file, writer: _Writer, path: str) -> None:
    key, end = None, 0
    for member in members(file, os.fspath(path), MAX_ROW):
        if key != (key := tar_key(member.name)):
            writer.starts([member.start])
        end = member.end
        writer.digest.update(
            f"{len(member.name)} {member.size} {member.start} ".encode() + os.fsencode(member.name)
        )
        if member.name.endswith(".json"):
            content = member.read()
            writer.digest.update(content)
            writer.images = writer.images or parsed_has_images(content)
        else:
            writer.images = True
    writer.end(end)


def tar_key(name: str) -> str:
    """Name of a member up to the first dot after its last slash: what the files of one sample
    share.
    """
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]
