"""Converts dataclasses of settings to dicts and back, checked against their annotations.

Annotations are int, float (takes whole numbers), str, bool, tuple[X, ...], X | None and other
dataclasses. Values from files (manifests, adapters, config.json of a run) and from a configuration
in Python are checked by the same function, `typed`.
"""

import dataclasses
import math
import types
import typing

from internvl3_jax.io.strict_json import check, describe, suggestion

LONGEST = 10_000  # elements of a tuple
_LARGEST = 2**63 - 1


class ConfigError(ValueError):
    """An invalid setting. The message names it, its value and what it may be, in one line each."""


def to_dict(config) -> dict:
    return dataclasses.asdict(config)


def from_dict(cls, values, where: str = ""):
    """Returns a dataclass from `to_dict`'s output, or from its JSON.

    Raises:
      ConfigError: a field is unknown, missing, of a wrong type or not finite; the message names it.
    """
    named, where = bool(where), where or cls.__name__
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: is {describe(values)}; expected an object")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise ConfigError(f"{where}: unknown field {name!r}{suggestion(name, fields)}")
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = typed(values[name], field.type, f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: field {name!r} is missing")
    try:
        return cls(**arguments)
    except ValueError as error:  # from __post_init__, which does not know the file
        raise ConfigError(f"{where}: {error}" if named else str(error)) from error


def typed(value, kind, where: str):
    """Returns a value that matches an annotation, with lists as tuples and dicts as dataclasses.

    ConfigError names `where` if it does not match.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and types.NoneType in arguments:
            return None
        (kind,) = (argument for argument in arguments if argument is not types.NoneType)
        return typed(value, kind, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} is {describe(value)}; expected a list")
        if len(value) > LONGEST:
            raise ConfigError(f"{where} has {len(value):,} elements; at most {LONGEST:,} are read")
        return tuple(
            typed(element, arguments[0], f"{where}[{index}]") for index, element in enumerate(value)
        )
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else from_dict(kind, value, where)
    try:
        check(value, kind, where)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} is {value}; expected a finite number")
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise ConfigError(f"{where} is a number of more than 63 bits")
    return value
