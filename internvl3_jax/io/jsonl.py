"""Files of one JSON value per line (JSONL): read strictly, append durably, resume after a kill.

A line is complete with its line break. `read` is for files that people wrote, where a last line
without a break counts. `whole_lines` is for files of this program, which may have been killed while
writing: what follows the last line break is torn, maybe within a character, and does not count.
`Appender` appends complete lines durably.
"""

import json
import os
import pathlib
import stat
from collections.abc import Iterator, Sequence

from internvl3_jax.io import remote_files, safe_files, strict_json
from internvl3_jax.io.command_line import naming
from internvl3_jax.io.remote_files import is_remote
from internvl3_jax.io.safe_files import FileError
from internvl3_jax.io.terminal import UNSAFE, one_line

MAX_BYTES = 4 << 30  # of one file
MAX_LINE = 64 << 20  # bytes of one line


def lines(path: str | os.PathLike, *, max_bytes: int = MAX_BYTES) -> list[tuple[int, str]]:
    """Returns (number from 1, text) of each line that is not blank, without LF, CRLF or a BOM.

    Only LF ends a line: U+2028 and the like may occur inside a JSON string.

    Raises:
      FileError: the file is missing, not regular, too large or not UTF-8; the message names the
        line.
    """
    name = one_line(os.fspath(path))
    data = safe_files.read_bytes(path, max_bytes=max_bytes)
    check_kind(data[:4096], data[-4096:].rstrip()[-1:], name)
    text = strict_json.decode(data, name)
    if len(text) > MAX_LINE and any(len(line) > MAX_LINE for line in text.split("\n")):
        raise FileError(
            f"{name}: has a line of more than {MAX_LINE:,} characters; is it JSONL, one value per "
            "line?"
        )
    return [
        (number, line.rstrip("\r"))
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]


def check_kind(start: bytes, last: bytes, name: str) -> None:
    """Raises FileError for another kind of file.

    Args:
      start: the first bytes.
      last: the last byte that is not white space.
      name: what errors call the file.
    """
    if start.startswith((b"\x1f\x8b", b"PK\3\4", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")):
        raise FileError(f"{name}: is compressed; unpack it")
    if b"\0" in start[:4] or start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise FileError(f"{name}: is UTF-16 or UTF-32 text, or binary; save it as UTF-8")
    if start.startswith(b"version https://git-lfs"):
        raise FileError(f"{name}: is a Git LFS pointer; fetch the file itself with git lfs pull")
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[") and last == b"]":
        raise FileError(
            f"{name}: is one JSON list; convert it to one row per line with jq -c '.[]' {name} > "
            "rows.jsonl"
        )


def read(path: str | os.PathLike, *, max_bytes: int = MAX_BYTES) -> Iterator[tuple[str, object]]:
    """Yields (where, value) of each line that is not blank; `where` is "FILE line N" for errors.

    Raises:
      FileError: see `lines`; also if a line is not strict JSON (strict_json.JsonError).
    """
    name = one_line(os.fspath(path))
    for number, line in lines(path, max_bytes=max_bytes):
        where = f"{name} line {number}"
        yield where, strict_json.loads(line, where)


def read_objects(
    path: str | os.PathLike, *, max_bytes: int = MAX_BYTES
) -> Iterator[strict_json.Object]:
    """Yields each line as an object; its `where` names file and line."""
    for where, value in read(path, max_bytes=max_bytes):
        yield strict_json.Object(value, where)


def whole_lines(path: str | os.PathLike, *, max_bytes: int = MAX_BYTES) -> list[bytes]:
    """Returns the complete lines of a file that a kill may have torn, with their line breaks."""
    data = safe_files.read_bytes(path, max_bytes=max_bytes)
    return [line + b"\n" for line in data[: data.rfind(b"\n") + 1].split(b"\n")[:-1]]


def torn(path: str | os.PathLike, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Returns what follows the last line break of a file."""
    data = safe_files.read_bytes(path, max_bytes=max_bytes)
    return data[data.rfind(b"\n") + 1 :]


def parse(lines: Sequence[bytes], path: str | os.PathLike) -> list[strict_json.Object]:
    """Parses lines of `whole_lines` as objects; JsonError names file and line."""
    name = one_line(os.fspath(path))
    objects = []
    for number, line in enumerate(lines, 1):
        where = f"{name} line {number}"
        objects.append(strict_json.Object(strict_json.loads(line, where), where))
    return objects


def dumps(value) -> str:
    r"""Returns JSON in one line; ValueError for NaN and infinities.

    Letters of all languages stay as they are. Control characters, line separators and lone
    surrogates are escaped as \uXXXX.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


class Appender:
    """Appends complete lines to a file; a context manager.

    OSError names the file, also when the disk is full.

    Args:
      path: the file. It is created if it is missing; its folder must exist.
      keep: bytes of an existing file to keep, counted with `whole_lines` after checking that this
        program wrote them; the torn rest is cut off. None refuses an existing file.
    """

    def __init__(self, path: str | os.PathLike, keep: int | None):
        self.path = path if is_remote(path) else pathlib.Path(path)
        self.keep, self._file = keep, None

    def __enter__(self) -> "Appender":
        if is_remote(self.path):
            if self.keep is None and remote_files.exists(self.path):
                raise FileExistsError(f"{self.path} exists; name another one")
            whole = (
                safe_files.read_bytes(self.path, max_bytes=MAX_BYTES)[: self.keep]
                if self.keep
                else b""
            )
            safe_files.replace(self.path, whole)
            return self
        with naming(self.path):
            flags = (
                os.O_RDWR
                | os.O_CREAT
                | os.O_CLOEXEC
                | os.O_NONBLOCK
                | (os.O_EXCL if self.keep is None else 0)
            )
            self._file = os.open(self.path, flags, 0o644)
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                os.close(self._file)
                raise FileError(
                    f"{one_line(str(self.path))}: is not a regular file (a pipe, socket or "
                    "device); name a regular file"
                )
            if os.fstat(self._file).st_size > (self.keep or 0):
                os.ftruncate(self._file, self.keep or 0)
            os.lseek(self._file, 0, os.SEEK_END)
        return self

    def write(self, texts: Sequence[str]) -> None:
        """Appends lines given without line breaks.

        They are on the disk when this returns, or an OSError is raised. In object storage they are
        written a few seconds later (remote_files.append).
        """
        data = memoryview("".join(f"{text}\n" for text in texts).encode("utf-8"))
        if is_remote(self.path):
            remote_files.append(self.path, bytes(data))
            return
        with naming(self.path):
            while data:  # a nearly full disk may take only some of it
                data = data[os.write(self._file, data) :]
            os.fsync(self._file)

    def __exit__(self, *exception) -> None:
        if is_remote(self.path):
            remote_files.flush()
        if self._file is not None:
            with naming(self.path):
                os.close(self._file)
            self._file = None


def append(path: pathlib.Path, texts: Sequence[str]) -> None:
    """Appends lines, given without line breaks, to a file, which is created if it is missing."""
    data = "".join(f"{text}\n" for text in texts)
    if is_remote(path):
        remote_files.append(path, data.encode("utf-8"))
        return
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(data)


def rewrite(path: str | os.PathLike, texts: Sequence[str]) -> None:
    """Replaces a file by these lines, given without line breaks, in one atomic step."""
    safe_files.replace(path, "".join(f"{text}\n" for text in texts))
