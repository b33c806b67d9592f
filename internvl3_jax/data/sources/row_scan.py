"""Finds the rows of annotation files for their index, and whether any row has an image.

A scanner takes (file, writer, path) and calls `RowWriter.starts` and `end` (row_index.py) with the
positions at which rows begin and end.
"""

import os
from collections.abc import Callable

import numpy as np

from internvl3_jax.data.sources.json_list import ListScanner, is_list
from internvl3_jax.data.sources.tars import members
from internvl3_jax.io import jsonl, strict_json
from internvl3_jax.io.terminal import one_line

CHUNK = 1 << 24  # bytes read at a time
LIST_CHUNK = 1 << 20  # of a JSON list, whose brackets are counted
START = 4096  # bytes that tell a list from lines
MEDIA_PARTS = ("image", "image_url", "video", "video_url")  # types of content parts
MAX_ROW = 256 << 20  # bytes of a JSON row
MENTIONS = tuple(
    f'"{name}{end}"'.encode() for name in ("image", "video") for end in ("", "s", "_url")
)


def has_images(row) -> bool:
    """Returns whether a row has an image or a video, by its keys or as a part of a turn."""
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
        isinstance(part, dict)
        and (part.get("type") in MEDIA_PARTS or any(part.get(name) for name in MEDIA_PARTS))
        for content in contents
        if isinstance(content, list)
        for part in content
    )


def scanner_of(path: str) -> Callable:
    """Returns the function that adds the rows of a file to a writer, by the file's suffix."""
    if path.endswith(".tar"):
        return _scan_tar
    return _scan_json if path.endswith(".json") else _scan_lines


def _scan_json(file, writer, path: str) -> None:
    """Scans a .json file: a list of rows or, as some data sets have it, a row on each line."""
    start = file.read(START)
    file.seek(0)
    (_scan_list if is_list(start) else _scan_lines)(file, writer, path)


def _scan_list(file, writer, path: str) -> None:
    def add_row(start: int, row: bytes) -> None:
        writer.starts([start])
        if not writer.images and any(mention in row for mention in MENTIONS):
            writer.images = parsed_has_images(row)

    scanner = ListScanner(path, add_row, MAX_ROW)
    while chunk := file.read(LIST_CHUNK):
        writer.digest.update(chunk)
        scanner.feed(chunk)
    writer.end(scanner.finish())


def _scan_lines(file, writer, path: str) -> None:
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
            if len(rest) > MAX_ROW:  # reading the row raises an error
                rest = b""
    writer.images = writer.images or _lines_have_images(rest)
    writer.end(end)


def _content_end(file) -> int:
    """Returns the size of a file without the white space at its end."""
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
    """Returns whether any complete line has an image; parses only those that mention one."""
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
    """Returns `has_images` of a row's bytes; False if they are not JSON."""
    try:
        return has_images(strict_json.loads(line, ""))
    except ValueError:  # reading the row raises the error
        return False


def _scan_tar(file, writer, path: str) -> None:
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
    """Returns a member's name up to the first dot of its last part, shared by a sample's files."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]
