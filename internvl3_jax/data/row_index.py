"""Where each row of a JSONL file or a tar shard begins: an .npy file of int64 that every process maps and none holds in memory.

    VERSION, bytes of the file, its time stamp, whether a row has pictures, start of row 0, start of row 1, ... end of the last row

It is written once, beside the file or, where that folder cannot be written or is remote, in $INTERNVL3_JAX_CACHE (by default
~/.cache/internvl3_jax), and again when the size or the time stamp has changed. Writing is atomic: several processes may build it
at once, each for itself, and the last one wins.

A JSONL row is a line. Lines without content count as rows (and are errors when read), except at the end of the file. A row of a
tar shard is a run of files with the same name up to the first dot, as WebDataset writes them.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import tarfile
import tempfile

import numpy as np

from internvl3_jax.data.files import FileError, fingerprint, is_remote, open_binary

VERSION = 1
HEADER = 4  # int64 before the offsets
CHUNK = 1 << 24  # bytes read at a time
MENTIONS = (b'"image"', b'"video"')


@dataclasses.dataclass
class RowIndex:
    offsets: np.ndarray  # i64[rows + 1], mapped
    has_pictures: bool  # whether any row has a picture or video


def has_pictures(row) -> bool:
    """Whether a row of the annotations has a picture or a video."""
    return isinstance(row, dict) and bool(row.get("image") or row.get("video"))


def open_index(path: str) -> RowIndex:
    """The index of a .jsonl or .tar file, built if there is none or the file has changed."""
    stamp = fingerprint(path)
    places = index_places(path)
    for place in places:
        if (values := _load(place, stamp)) is not None:
            return RowIndex(values[HEADER:], bool(values[HEADER - 1]))
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            _write(path, place, stamp)
        except PermissionError:
            continue
        except OSError as error:
            if error.errno != 30:  # a read-only file system
                raise
            continue
        return open_index(path)
    raise FileError(f"{path}: no place for its index can be written: {', '.join(map(str, places))}; set INTERNVL3_JAX_CACHE")


def index_places(path: str) -> list[pathlib.Path]:
    """Where the index of a file may lie, the preferred place first."""
    name = f"{os.path.basename(path)}.index.npy"
    where = path if is_remote(path) else os.path.abspath(path)
    cache = pathlib.Path(os.environ.get("INTERNVL3_JAX_CACHE") or "~/.cache/internvl3_jax").expanduser()
    cached = cache / f"{hashlib.sha256(where.encode()).hexdigest()[:16]}-{name}"
    return [cached] if is_remote(path) else [pathlib.Path(where).parent / name, cached]


def _load(place: pathlib.Path, stamp: tuple[int, int]) -> np.ndarray | None:
    """The values of an index that is there, whole and of this state of the file; else None."""
    try:
        values = np.load(place, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    valid = values.ndim == 1 and values.dtype == np.int64 and len(values) > HEADER and tuple(values[:3]) == (VERSION, *stamp)
    return values if valid else None


def _write(path: str, place: pathlib.Path, stamp: tuple[int, int]) -> None:
    """Builds the index in a file beside `place` and moves it there."""
    handle, temporary = tempfile.mkstemp(prefix=f".{place.name}.", dir=place.parent)
    try:
        with os.fdopen(handle, "wb") as out, open_binary(path) as file:
            os.fchmod(out.fileno(), 0o644)
            writer = _Writer(out, (VERSION, *stamp))
            scan = _scan_tar if path.endswith(".tar") else _scan_lines
            scan(file, writer, path)
            writer.finish()
        if fingerprint(path) != stamp:
            raise FileError(f"{path}: was changed while its rows were counted")
        os.replace(temporary, place)
    except BaseException:
        os.unlink(temporary)
        raise


class _Writer:
    """An .npy file of int64 that grows: numpy leaves room in its header for the final length."""

    def __init__(self, out, values: tuple[int, ...]):
        self.out, self.count = out, 0
        self._header()
        self.append([*values, 0])
        self.pictures = False

    def append(self, values) -> None:
        self.out.write(np.asarray(values, np.int64).tobytes())
        self.count += len(values)

    def finish(self) -> None:
        self.out.seek(0)
        self._header()
        self.out.seek(8 * (HEADER - 1), os.SEEK_CUR)
        self.out.write(np.int64(self.pictures).tobytes())

    def _header(self) -> None:
        described = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.int64)), "fortran_order": False, "shape": (self.count,)}
        np.lib.format.write_array_header_1_0(self.out, described)


def _scan_lines(file, writer: _Writer, path: str) -> None:
    end = _content_end(file)
    file.seek(0)
    writer.append([0] if end else [])
    position, rest = 0, b""
    while chunk := file.read(CHUNK):
        starts = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + (position + 1)
        writer.append(starts[starts < end])
        position += len(chunk)
        if not writer.pictures:
            lines, newline, rest = (rest + chunk).rpartition(b"\n")
            writer.pictures = _lines_have_pictures(lines + newline)
    writer.pictures = writer.pictures or _lines_have_pictures(rest)
    writer.append([end])


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


def _lines_have_pictures(lines: bytes) -> bool:
    """Whether any of these whole lines has a picture. Only those that mention one are parsed."""
    for mention in MENTIONS:
        place = lines.find(mention)
        while place >= 0:
            start, stop = lines.rfind(b"\n", 0, place) + 1, lines.find(b"\n", place)
            stop = len(lines) if stop < 0 else stop
            if _parsed_has_pictures(lines[start:stop]):
                return True
            place = lines.find(mention, stop)
    return False


def _parsed_has_pictures(line: bytes) -> bool:
    try:
        return has_pictures(json.loads(line))
    except (ValueError, RecursionError):  # whoever reads this row gets the error with its place
        return False


def _scan_tar(file, writer: _Writer, path: str) -> None:
    key, end = None, 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                archive.members = []  # else it keeps every header it has seen
                if not member.isfile():
                    continue
                if key != (key := tar_key(member.name)):
                    writer.append([member.offset])
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if not writer.pictures:
                    is_row = member.name.endswith(".json")
                    writer.pictures = not is_row or _parsed_has_pictures(archive.extractfile(member).read())
    except tarfile.TarError as error:
        raise FileError(f"{path}: is not an uncompressed tar archive, or is damaged ({error})") from error
    writer.append([end])


def tar_key(name: str) -> str:
    """Name of a member up to the first dot after its last slash: what the files of one sample share."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]
