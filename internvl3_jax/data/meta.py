"""The official meta JSON, which lists the sources of a training mixture:

    {"docvqa": {"root": "images/docvqa",              folder or address that the picture paths are relative to
                "annotation": "docvqa_train.jsonl",   or .tar shards, .array_record; a list, {000..127} and * name several files
                "data_augment": true,                 JPEG recompression of the tiles (false)
                "repeat_time": 2,                     below 1: only that share of the rows, from the head; above: repeated (1)
                "max_dynamic_patch": 24,              tiles of a sample's pictures together (processor.max_tiles)
                "length": 39463,                      number of rows; only compared
                "weight": 3.0}}                       its part of the mixture where data.weights is "given"; not in the original

A fractional repeat_time above 1 takes whole repeats and a head slice for the rest. InternVL's fine-tuning refuses such a number,
its pre-training and MPO code drop the fraction, and MPO takes a random subset in place of the head slice. The original would sample
repeats one after the other as listed; here every epoch over them is shuffled as a whole.

Relative paths are looked up beside the meta file and in the working directory.
"""

import dataclasses
import difflib
import json
import os

from internvl3_jax.data.files import FileError, expand, is_remote, read_bytes, resolve

KEYS = ("root", "annotation", "data_augment", "repeat_time", "max_dynamic_patch", "length", "weight")


class MetaError(ValueError):
    """A meta JSON that cannot be used. The message names the file, the entry and the key."""


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """One entry of the meta JSON with its paths resolved."""

    name: str
    root: str
    root_error: str  # why the root cannot be used; only sources with pictures need one
    annotation: tuple[str, ...]  # files
    augment: bool = False
    repeat: float = 1.0
    max_tiles: int | None = None
    length: int | None = None
    weight: float | None = None


def read_meta(path: str) -> list[SourceSpec]:
    """The sources of a meta JSON in its order. Raises MetaError or FileError."""
    try:
        entries = json.loads(read_bytes(path), object_pairs_hook=_unique)
    except MetaError as error:
        raise MetaError(f"{path}: {error}") from error
    except FileError as error:
        raise MetaError(f"data.source: {error}; it is the path of a meta JSON, or digits") from error
    except ValueError as error:
        raise MetaError(f"{path}: is not JSON: {error}") from error
    if not isinstance(entries, dict) or not entries:
        raise MetaError(f"{path}: expected an object with a name and settings for each source")
    return [_read_entry(path, name, entry) for name, entry in entries.items()]


def _unique(pairs: list[tuple]) -> dict:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise MetaError(f"{name!r} stands there twice")
    return dict(pairs)


def _read_entry(path: str, name: str, entry) -> SourceSpec:
    where = f"{path}, entry {name!r}"
    if not isinstance(entry, dict):
        raise MetaError(f"{where}: expected an object with {', '.join(KEYS)}")
    if any(character in name for character in "\t\r\n"):
        raise MetaError(f"{where}: a name must not hold tabs or line breaks")
    for key in entry:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            raise MetaError(f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else f"; known: {KEYS}"))
    base = path.rpartition("/")[0] if is_remote(path) else os.path.dirname(os.path.abspath(path))
    root, root_error = _root(where, entry, base)
    return SourceSpec(
        name,
        root,
        root_error,
        _annotation(where, entry, base),
        _checked(where, entry, "data_augment", bool, lambda value: True, "true or false", False),
        float(_checked(where, entry, "repeat_time", (int, float), lambda value: value > 0, "a number above 0", 1)),
        _checked(where, entry, "max_dynamic_patch", int, lambda value: value > 0, "a whole number above 0", None),
        _checked(where, entry, "length", int, lambda value: value >= 0, "a number of rows", None),
        _checked(where, entry, "weight", (int, float), lambda value: value >= 0, "a number, 0 or above", None),
    )


def _checked(where: str, entry: dict, key: str, kind, holds, expected: str, default):
    value = entry.get(key, default)
    if value is default:
        return default
    is_flag = isinstance(value, bool) and kind is not bool  # a bool is an int to Python
    if is_flag or not isinstance(value, kind) or not holds(value):
        raise MetaError(f"{where}: {key} is {value!r}; expected {expected}")
    return value


def _root(where: str, entry: dict, base: str) -> tuple[str, str]:
    root = entry.get("root")
    if not isinstance(root, str):
        raise MetaError(f"{where}: root is {root!r}; expected a folder or an address, or an empty text if paths are whole")
    if not root:
        return "", ""
    try:
        return resolve(root, base), ""
    except FileError as error:
        return root, f"{where}: root: {error}"


def _annotation(where: str, entry: dict, base: str) -> tuple[str, ...]:
    names = entry.get("annotation")
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise MetaError(f"{where}: annotation is {entry.get('annotation')!r}; expected a path or a list of paths")
    try:
        return tuple(path for name in names for path in expand(resolve(name, base)))
    except FileError as error:
        raise MetaError(f"{where}: annotation: {error}") from error
