"""Reads data.source: a file of rows, or the meta JSON of InternVL, which lists the sources of a
mixture:

    {"docvqa": {"root": "images/docvqa",             folder or address of the rows' images
                "annotation": "docvqa_train.jsonl",  or a list, also .json, .tar, .array_record;
                                                     {000..127} and * name several files
                "data_augment": true,                JPEG recompression of the tiles (false)
                "repeat_time": 2,                    below 1: only that share, from the head (1)
                "max_dynamic_patch": 24,             tiles (processor.max_tiles)
                "length": 39463,                     number of rows; only compared
                "weight": 3.0,                       share for data.source_weights "given"; not InternVL's
                "allow_outside_root": true}}         rows may name other files; not InternVL's

A fractional repeat_time above 1 takes all rows as often as its whole part says, and a head slice
for the rest. InternVL's fine-tuning refuses such a number, its pre-training and MPO code drop the
fraction, and MPO takes a random subset in place of the head slice. InternVL reads repeats one after
the other; here every epoch over them is shuffled as one.

Relative paths are relative to the meta file, or to the file of rows. docs/data.md has the format.
"""

import dataclasses
import os

from internvl3_jax.data.sources.files import (
    FileError,
    exists,
    expand,
    folder_of,
    is_folder,
    is_remote,
    open_binary,
    read_bytes,
    resolve,
)
from internvl3_jax.data.sources.json_list import is_list
from internvl3_jax.data.sources.rows import KINDS
from internvl3_jax.io import strict_json
from internvl3_jax.io.strict_json import JsonError, Object
from internvl3_jax.io.terminal import excerpt, one_line

MAX_BYTES = 64 << 20  # of a meta JSON
MAX_NAME = 200  # characters of a source's name
ROW_START = 1 << 20  # bytes of a file in which the first row of a .json file is looked for
ROW_KEYS = frozenset({"conversations", "messages", "chosen"})  # a row has one of them
# Upper bounds, so that counts of samples and tiles stay within their types and the memory.
MOST_REPEATS, MOST_WEIGHT, MOST_TILES, MOST_ROWS = 10**6, 10**12, 1024, 2**53


class MetaError(ValueError):
    """A meta JSON that cannot be used. The message names the file, the entry and the key."""


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """One source with its paths resolved.

    Attributes:
      root: Folder or address that the paths of rows are relative to.
      root_error: Why the root cannot be used; an error only for a source with images.
      annotation: Files of rows.
      max_tiles: In place of the processor's.
      written_root: The root as the meta JSON has it.
      outside: What rows may name outside of the root: "no", "addresses", "absolute" (paths and
        addresses) or "yes" (everything).
    """

    name: str
    root: str
    root_error: str
    annotation: tuple[str, ...]
    augment: bool = False
    repeat: float = 1.0
    max_tiles: int | None = None
    length: int | None = None
    weight: float | None = None
    written_root: str = ""
    outside: str = "no"


def read_sources(path: str) -> list[SourceSpec]:
    """Reads data.source: a meta JSON, or a file of rows, which is then the only source.

    Raises:
      MetaError, FileError: Names the file, entry and key that cannot be used.
    """
    path = expand_user(path)
    return [_bare_source(path)] if holds_rows(path) else read_meta(path)


def holds_rows(path: str) -> bool:
    """Returns whether a path names a file of rows and not a meta JSON.

    A .json file holds rows if it is a list, or if its first line alone is a row.
    """
    if not path.endswith(".json"):
        return path.endswith(KINDS)
    try:
        with open_binary(path) as file:
            start = file.read(ROW_START)
    except FileError:
        return False  # read_meta says what is wrong
    if is_list(start):
        return True
    line = start.partition(b"\n")[0]
    try:
        first = strict_json.loads(line, "")
    except JsonError:
        return False
    return isinstance(first, dict) and not ROW_KEYS.isdisjoint(first)


def _bare_source(path: str) -> SourceSpec:
    """Describes a file of rows whose images are in its folder."""
    name = one_line(os.path.basename(path).partition(".")[0])[:MAX_NAME].lstrip("#").strip()
    annotation = tuple(expand(path))
    if not annotation:
        raise MetaError(f"data.source: {one_line(path)}: no such file")
    return SourceSpec(
        name=name or "rows",
        root=folder_of(annotation[0]),
        root_error="",
        annotation=annotation,
        outside=_outside("", path, annotation),
    )


def read_meta(path: str) -> list[SourceSpec]:
    """Reads the sources of a meta JSON in its order. Raises MetaError or FileError."""
    try:
        data = read_bytes(path, max_bytes=MAX_BYTES)
    except FileError as error:
        raise MetaError(
            f"data.source: {error}; it is the path of a meta JSON or of a file of rows, or "
            f"MODULE:FUNCTION"
        ) from error
    try:
        entries = strict_json.loads(data, one_line(path))
    except JsonError as error:
        raise MetaError(f"{error}") from error
    if not isinstance(entries, dict) or not entries:
        raise MetaError(
            f"{one_line(path)}: is {strict_json.describe(entries)}; expected an object with a name "
            f"and settings for each source"
        )
    if not any(isinstance(value, dict) for value in entries.values()):
        if not ROW_KEYS.isdisjoint(entries):
            raise MetaError(
                f"{one_line(path)}: is a single row, not a meta JSON; write rows as a list, "
                f"[{{...}}, ...], or one on each line"
            )
        if {"root", "annotation"} <= entries.keys():
            raise MetaError(
                f"{one_line(path)}: has one entry without a name; write "
                f'{{"mine": {{"root": ..., "annotation": ...}}}}'
            )
    return [_read_entry(path, name, entry) for name, entry in entries.items()]


def expand_user(path: str) -> str:
    """Returns the path with ~ replaced by the home directory."""
    return os.path.expanduser(path) if path.startswith("~") else path


def _read_entry(path: str, name: str, entry) -> SourceSpec:
    where = f"{one_line(path)}, entry {excerpt(name)}"
    if one_line(name) != name or not name.strip() or name.startswith("#") or len(name) > MAX_NAME:
        raise MetaError(
            f"{where}: a name must have 1 to {MAX_NAME} characters that can be printed, no tabs or "
            f"line breaks, and not begin with #"
        )
    base = folder_of(path)
    try:
        values = Object(entry, where)
        root = values.get("root", str)
        folder, root_error = _root(where, root, base)
        annotation = _annotation(where, values, base)
        outside = values.get("allow_outside_root", bool, False)
        spec = SourceSpec(
            name=name,
            root=folder,
            root_error=root_error,
            annotation=annotation,
            augment=values.get("data_augment", bool, False),
            repeat=float(_above_0(where, values, "repeat_time", float, 1, MOST_REPEATS)),
            max_tiles=values.get("max_dynamic_patch", int, None, low=1, high=MOST_TILES),
            length=values.get("length", int, None, low=0, high=MOST_ROWS),
            weight=values.get("weight", float, None, low=0, high=MOST_WEIGHT),
            written_root=root,
            outside="yes" if outside else _outside(root, path, annotation),
        )
        values.finish()
    except JsonError as error:
        raise MetaError(str(error)) from error
    return spec


def _above_0(where: str, values: Object, key: str, kind: type, default, high: float):
    value = values.get(key, kind, default, high=high)
    if value <= 0:
        raise MetaError(f"{where}: {key} is {excerpt(value)}; expected a number above 0")
    return value


def _outside(root: str, path: str, annotation: tuple[str, ...]) -> str:
    """Returns `SourceSpec.outside` of a source that does not allow everything."""
    if root:
        return "no"
    return "addresses" if is_remote(path) or any(map(is_remote, annotation)) else "absolute"


def _root(where: str, root: str, base: str) -> tuple[str, str]:
    """Returns (folder or address, why it cannot be used or "")."""
    if not root:
        return base, ""
    try:
        folder = resolve(root, base, _is_there)
    except FileError as error:
        return root, f"{where}: root: {error}"
    if not is_remote(folder) and not is_folder(folder):
        return folder, f"{where}: root: {one_line(folder)} is not a folder"
    return folder, ""


def _is_there(path: str) -> list[str]:
    return [path] if exists(path) else []


def _annotation(where: str, values: Object, base: str) -> tuple[str, ...]:
    names = values.get("annotation", (str, list))
    names = [names] if isinstance(names, str) else names
    if not names or not all(isinstance(name, str) and name for name in names):
        raise MetaError(
            f"{where}: annotation is {excerpt(values.values['annotation'])}; expected a path or a "
            f"list of paths"
        )
    try:
        return tuple(path for name in names for path in expand(resolve(name, base)))
    except JsonError:
        raise
    except FileError as error:
        raise MetaError(f"{where}: annotation: {error}") from error
