"""Reads a JSONL output that a program of ours appends to, after a kill or a power failure.

A kill can leave half of the last line, even half of a UTF-8 character. A power failure can leave
NUL bytes at the end of the file, where the file system had reserved space for data that never
arrived. Both are a torn tail: it is cut off, and its rows are made again. Anything else that is no
row is an error, because the file may be somebody else's.
"""

import dataclasses
import os
import sys
from collections.abc import Callable

from internvl3_jax.io import jsonl, safe_files, strict_json
from internvl3_jax.io.safe_files import FileError
from internvl3_jax.io.strict_json import JsonError
from internvl3_jax.io.terminal import one_line

ROW_START = b'{"id": '  # of every row of our outputs


@dataclasses.dataclass(frozen=True)
class Rows:
    """The content of a JSONL output.

    Attributes:
      path: the file.
      rows: one dict per complete line.
      sizes: bytes of each complete line, its line break included.
      tail: the bytes after the complete lines.
    """

    path: str | os.PathLike
    rows: list[dict]
    sizes: list[int]
    tail: bytes

    def tail_is_torn(self, start: bytes = ROW_START) -> bool:
        """Returns whether the tail can be the beginning of a row of ours, or NUL bytes, or both.

        start: the bytes that the row begins with.
        """
        written = self.tail.split(b"\0", 1)[0]
        return written.startswith(start) or start.startswith(written)

    def warn_of_tail(self) -> None:
        """Prints one line to stderr if there is a tail, which the caller cuts off."""
        if self.tail:
            print(
                f"{one_line(str(self.path))}: the last {len(self.tail):,} bytes, after line "
                f"{len(self.rows)}, are a torn row (the program or the machine stopped while "
                "writing); they are cut off and the row is made again",
                file=sys.stderr,
            )


def read_rows(path: str | os.PathLike) -> Rows:
    """Reads the complete lines of a JSONL output; each must be a JSON object.

    Lines at the end of the file that contain NUL bytes belong to the tail.

    Raises:
      FileError: the file cannot be read.
      JsonError: a line before the tail is blank, has NUL bytes or is not a JSON object.
    """
    data = safe_files.read_bytes(path, max_bytes=jsonl.MAX_BYTES)
    *lines, tail = data.split(b"\n")
    lines = [line + b"\n" for line in lines]
    while lines and b"\0" in lines[-1]:
        tail = lines.pop() + tail
    rows = []
    for number, line in enumerate(lines, 1):
        where = f"{one_line(os.fspath(path))} line {number}"
        if not line.strip():
            raise JsonError(f"{where}: is blank; remove the line")
        if b"\0" in line:
            raise JsonError(f"{where}: has NUL bytes, with complete lines after it")
        rows.append(strict_json.Object(strict_json.loads(line, where), where).values)
    return Rows(path, rows, [len(line) for line in lines], tail)


def read_own_rows(path: str | os.PathLike, is_row: Callable[[dict], bool], noun: str) -> Rows:
    """Returns what `read_rows` does, with errors that say which rows were expected.

    Args:
      is_row: returns whether an object is such a row.
      noun: what a row is called in messages, such as "an answer of infer.py".

    Raises:
      FileError: the file cannot be read, or a complete line is no such row.
    """
    advice = "name another --output"
    try:
        content = read_rows(path)
    except FileError as error:
        raise JsonError(f"{error}; every line should be {noun}: {advice}") from error
    for number, row in enumerate(content.rows, 1):
        if not is_row(row):
            raise JsonError(f"{one_line(os.fspath(path))} line {number} is not {noun}; {advice}")
    return content
