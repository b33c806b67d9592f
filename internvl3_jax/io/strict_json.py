"""Strict, bounded reading of JSON. Every JSON that people hand in or that a crash may have damaged
is read here.

`loads` refuses what Python's parser lets pass and what eats the machine: NaN and infinities, a key
that occurs twice in an object, numbers beyond a float's range, nesting beyond `MAX_DEPTH`, text
that is not UTF-8. `Object` reads the keys of one object with their types and ranges. Every error is
a JsonError, one line that names the file and, where it is known, the line or the key.
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

# of a JSON file, by default; a tokenizer.json has about 11 MB, an index of the 78B model 100 kB
MAX_BYTES = 256 << 20
MAX_DEPTH = 64
MAX_DIGITS = 400  # of a number

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
    """JSON that cannot be used. The message names the file and the line or key."""


def loads(data: bytes | str, where: str):
    """The value of a JSON text.

    Args:
      data: bytes in UTF-8, with or without a byte order mark, or a text.
      where: what errors call it, usually the file's path.

    Raises:
      JsonError: it is not JSON by the rules at the top of this file.
    """
    text = decode(data, where) if isinstance(data, bytes) else data
    _check_depth(text, where)

    wrong = []  # what is no number, until the object that it is in is complete and its key is known

    def number(digits: str, kind: Callable):
        if len(digits) > MAX_DIGITS:
            wrong.append(f"a number of {len(digits):,} digits; at most {MAX_DIGITS} are read")
            return math.nan
        value = kind(digits)
        if isinstance(value, float) and not math.isfinite(value):
            wrong.append(f"the number {excerpt(digits)[1:-1]} is too large")
        return value

    def constant(name: str):
        wrong.append(f"{name} is no JSON number; write a finite number or null")
        return math.nan

    def pairs(items: list[tuple[str, object]]):
        if wrong:
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
        if wrong:
            raise JsonError(f"{where}: {_path_to_wrong(value) or ''}{wrong[0]}")
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
    """An object that holds what is no number."""

    path: str  # to it: "a: b: "


def _path_to_wrong(value) -> str | None:
    if isinstance(value, _Wrong):
        return value.path
    if isinstance(value, list):
        return next((path for path in map(_path_to_wrong, value) if path is not None), None)
    return "" if isinstance(value, float) and not math.isfinite(value) else None


def decode(data: bytes, where: str) -> str:
    """Bytes in UTF-8 to text, without a byte order mark. JsonError says what else they are."""
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
    """The value of a local JSON file. JsonError if it is missing, no regular file, too large, or
    not strict JSON.
    """
    return loads(read_bytes(path, max_bytes=max_bytes), str(path))


def read_object(path: str | os.PathLike, *, max_bytes: int = MAX_BYTES) -> "Object":
    """The object that a JSON file holds."""
    return Object(read(path, max_bytes=max_bytes), str(path))


def suggestion(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" for a misspelt name, or nothing."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


class Object:
    """One JSON object, read key by key; remembers the names that were asked for, so that `finish`
    can refuse the rest.

    Args:
      values: what `loads` gave; JsonError unless it is an object.
      where: file, or file and key, as errors name it.
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
        """A key's value; null counts as absent.

        Args:
          kind: str, bool, int, float (takes whole numbers), dict or list, or several of them. A
              bool is never a number.
          default: for an absent key; without it the key must be there.
          low, high: bounds of a number, or of the length of a text, list or object; both inclusive.
          choices: all values that are allowed.

        Raises:
          JsonError: naming the key, its value and what was expected.
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
        """A key's list, every element checked as by `get`. length: how many elements it must have."""
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
        """A key's object as another `Object`."""
        values = self.get(name, dict, default)
        return (
            values
            if values is default and not isinstance(values, dict)
            else Object(values, f"{self.where}: {name}")
        )

    def finish(self, ignored: Iterable[str] = ()) -> None:
        """Refuses every key that was neither asked for nor is in `ignored`."""
        known = self.asked | set(ignored)
        for name in self.values:
            if name not in known:
                value = excerpt(self.values[name])
                raise JsonError(
                    f"{self.where}: unknown key {excerpt(name)} = {value}{suggestion(name, known)}"
                )


def check(value, kind: type | tuple[type, ...], where: str, *, low=None, high=None, choices=None):
    """`value`, if it has the kind and lies within the bounds; see `Object.get`. JsonError
    otherwise.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not _is_kind(value, kinds):
        raise JsonError(
            f"{where} is {describe(value)}; expected {' or '.join(_KINDS[one] for one in kinds)}"
        )
    if choices is not None and value not in choices:
        near = suggestion(value, choices) if isinstance(value, str) else ""
        raise JsonError(
            f"{where} is {excerpt(value)}; expected one of {', '.join(map(repr, choices))}{near}"
        )
    if low is None and high is None:
        return value
    is_number = isinstance(value, int | float)
    measured, unit = (value, "") if is_number else (len(value), " long")
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
        )
        raise JsonError(f"{where} is {excerpt(value)}; expected {bounds}{unit}")
    return value


def _is_kind(value, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int) and float in kinds:
        return True
    return isinstance(value, kinds)


def describe(value) -> str:
    """A JSON value's type with its beginning, as errors show it."""
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
