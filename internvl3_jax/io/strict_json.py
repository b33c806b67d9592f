"""Strict, bounded reading of JSON from users and of JSON that a crash may have damaged.

`loads` refuses what Python's parser accepts or what exhausts the machine: NaN and infinities, a key
that occurs twice in an object, numbers beyond a float's range, nesting beyond `MAX_DEPTH`, text
that is not UTF-8. `Object` reads the keys of one object with types and ranges. Every error is a
JsonError of one line that names the file and, if known, the line or the key.
"""

import difflib
import json
import math
import os
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from internvl3_jax.io.safe_files import FileError, read_bytes
from internvl3_jax.io.terminal import LONGEST, excerpt, one_line

# Default for one file. A tokenizer.json has about 11 MB, the index of the 78B model 100 kB.
MAX_BYTES = 256 << 20
MAX_DEPTH = 64
MAX_DIGITS = 400  # of one number

_KINDS = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    dict: "an object",
    list: "a list",
}
_REQUIRED = object()
# A string, or a bracket: enough to measure nesting before the parser recurses.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)


class JsonError(FileError):
    """Invalid JSON or an invalid value in it. The message names the file and the line or key."""


def loads(data: bytes | str, where: str):
    """Parses a JSON text.

    Args:
      data: UTF-8 bytes, with or without a byte order mark, or a text.
      where: what errors call it, usually the file's path.

    Raises:
      JsonError: it is not JSON by the rules above.
    """
    text = decode(data, where) if isinstance(data, bytes) else data
    _check_depth(text, where)

    problems = []  # of numbers, until the enclosing object is complete and the key is known

    def number(digits: str, kind: Callable):
        if len(digits) > MAX_DIGITS:
            problems.append(f"a number of {len(digits):,} digits; at most {MAX_DIGITS} are read")
            return math.nan
        value = kind(digits)
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"the number {excerpt(digits)[1:-1]} is too large")
        return value

    def constant(name: str):
        problems.append(f"{name} is not a JSON number; write a finite number or null")
        return math.nan

    def pairs(items: list[tuple[str, object]]):
        if problems:
            for name, value in items:
                if (path := _path_to_wrong(value)) is not None:
                    return _Wrong(f"{one_line(name[:LONGEST])}: {path}")
        values = dict(items)
        if len(values) < len(items):
            names = [name for name, _ in items]
            twice = next(name for name in names if names.count(name) > 1)
            raise JsonError(
                f"{where}: the key {excerpt(twice)} occurs twice in one object; remove one of them"
            )
        return values

    try:
        value = json.loads(
            text,
            parse_float=lambda digits: number(digits, float),
            parse_int=lambda digits: number(digits, int),
            parse_constant=constant,
            object_pairs_hook=pairs,
        )
        if problems:
            raise JsonError(f"{where}: {_path_to_wrong(value) or ''}{problems[0]}")
        return value
    except JsonError:
        raise
    except (ValueError, RecursionError) as error:
        empty = not text.strip()
        reason = "the file is empty" if empty else str(error)
        raise JsonError(
            f"{where}: is not JSON ({reason}); was it written or downloaded completely?"
        ) from error


class _Wrong(NamedTuple):
    """An object that holds an invalid number."""

    path: str  # of keys to it: "a: b: "


def _path_to_wrong(value) -> str | None:
    if isinstance(value, _Wrong):
        return value.path
    if isinstance(value, list):
        return next((path for path in map(_path_to_wrong, value) if path is not None), None)
    return "" if isinstance(value, float) and not math.isfinite(value) else None


def decode(data: bytes, where: str) -> str:
    """Decodes UTF-8 without a byte order mark; JsonError says what is wrong."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:4]:
        raise JsonError(f"{where}: is UTF-16 or UTF-32 text, or binary; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise JsonError(
            f"{where}: line {line} is not UTF-8 (byte {error.start}); save it as UTF-8"
        ) from error


def _check_depth(text: str, where: str) -> None:
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth = 0
    for match in _TOKEN.finditer(text):
        character = text[match.start()]
        if character in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise JsonError(f"{where}: is nested more than {MAX_DEPTH} levels deep")
        elif character in "]}":
            depth -= 1


def read(path: str | os.PathLike, *, max_bytes: int = MAX_BYTES):
    """Reads a JSON file; FileError if it is missing, not regular, too large or invalid."""
    return loads(read_bytes(path, max_bytes=max_bytes), str(path))


def read_object(path: str | os.PathLike, *, max_bytes: int = MAX_BYTES) -> "Object":
    """Reads a JSON file that holds an object."""
    return Object(read(path, max_bytes=max_bytes), str(path))


def suggestion(name: str, known: Iterable[str]) -> str:
    """Returns "; did you mean 'x'?" for a misspelled name, or ""."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


class Object:
    """A JSON object that is read key by key; `finish` refuses the keys that were never read.

    Args:
      values: result of `loads`; JsonError unless it is an object.
      where: file, or file and key, for errors.
    """

    def __init__(self, values, where: str):
        if not isinstance(values, dict):
            raise JsonError(f"{where}: is {describe(values)}; expected an object")
        self.values, self.where, self.asked = values, where, set()

    def get(
        self,
        name: str,
        kind: type | tuple[type, ...],
        default=_REQUIRED,
        *,
        low=None,
        high=None,
        choices=None,
    ):
        """Returns a key's value; null counts as absent.

        Args:
          kind: str, bool, int, float (takes whole numbers), dict or list, or several of them. A
              bool is never a number.
          default: value of an absent key; without it the key is required.
          low, high: bounds of a number, or of the length of a text, list or object; both inclusive.
          choices: the allowed values.

        Raises:
          JsonError: it names the key, its value and what is expected.
        """
        self.asked.add(name)
        value = self.values.get(name)
        if value is None:
            if default is _REQUIRED:
                near = suggestion(name, self.values.keys() - {name})
                raise JsonError(f"{self.where}: {name} is missing{near}")
            return default
        return check(value, kind, f"{self.where}: {name}", low=low, high=high, choices=choices)

    def list_of(
        self, name: str, kind, default=_REQUIRED, *, length: int | None = None, **bounds
    ) -> list:
        """Returns a key's list, each element checked as in `get`; `length` is the exact length."""
        values = self.get(name, list, default)
        if values is default:
            return default
        if length is not None and len(values) != length:
            raise JsonError(f"{self.where}: {name} has {len(values)} elements; expected {length}")
        return [
            check(value, kind, f"{self.where}: {name}[{index}]", **bounds)
            for index, value in enumerate(values)
        ]

    def object(self, name: str, default=_REQUIRED) -> "Object":
        """Returns a key's object as another `Object`."""
        values = self.get(name, dict, default)
        return (
            values
            if values is default and not isinstance(values, dict)
            else Object(values, f"{self.where}: {name}")
        )

    def finish(self, ignored: Iterable[str] = ()) -> None:
        """Refuses every key that was neither read nor is in `ignored`."""
        known = self.asked | set(ignored)
        for name in self.values:
            if name not in known:
                value = excerpt(self.values[name])
                raise JsonError(
                    f"{self.where}: unknown key {excerpt(name)} = {value}{suggestion(name, known)}"
                )


def check(value, kind: type | tuple[type, ...], where: str, *, low=None, high=None, choices=None):
    """Returns `value` after checking its kind and bounds; see `Object.get`."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not _is_kind(value, kinds):
        expected = " or ".join(_KINDS[kind] for kind in kinds)
        raise JsonError(f"{where} is {describe(value)}; expected {expected}")
    if choices is not None and value not in choices:
        near = suggestion(value, choices) if isinstance(value, str) else ""
        raise JsonError(
            f"{where} is {excerpt(value)}; expected one of {', '.join(map(repr, choices))}{near}"
        )
    if low is None and high is None:
        return value
    is_number = isinstance(value, int | float)
    measured, unit = (value, "") if is_number else (len(value), _length_unit(value))
    if (
        (low is not None and measured < low)
        or (high is not None and measured > high)
        or measured != measured
    ):
        bounds = (
            f"at least {low}"
            if high is None
            else f"at most {high}"
            if low is None
            else f"from {low} to {high}"
            if low != high
            else f"{low}"
        )
        raise JsonError(f"{where} is {excerpt(value)}; expected {bounds}{unit}")
    return value


def _length_unit(value) -> str:
    return " characters" if isinstance(value, str) else " elements"


def _is_kind(value, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int) and float in kinds:
        return True
    return isinstance(value, kinds)


def describe(value) -> str:
    """Returns a JSON value's type and beginning, for errors."""
    if value is None:
        return "null"
    name = {
        str: "the text",
        bool: "the truth value",
        int: "the number",
        float: "the number",
        dict: "the object",
        list: "the list",
    }
    return f"{name.get(type(value), type(value).__name__)} {excerpt(value)}"
