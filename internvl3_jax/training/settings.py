"""A run's configuration from the command line: --config FILE[:ARGUMENT] and, for single fields,
--config.FIELD=VALUE.

    settings.take_overrides(sys.argv)           before absl parses the flags
    chosen = settings.load()                    in main: Chosen(config, recipe, overrides)

FILE is Python with `get_config() -> TrainConfig`; ARGUMENT goes to it as a text. If it does not
exist, the recipe of that name in the shipped configs/ is meant. A value is read by its field's
type:

    --config.steps=100   --config.data.source=meta.json   --config.logging.tensorboard=false   --config.optimizer.freeze='("vision/.*",)'

A tuple may also be given by naming its field several times. Every error is a UsageError, one line
that names field or file and line.
"""

import ast
import contextlib
import copy
import dataclasses
import difflib
import os
import pathlib
import re
import sys
import traceback
import types
import typing

from absl import flags

from internvl3_jax import cli
from internvl3_jax.config import TrainConfig
from internvl3_jax.io import safe_files
from internvl3_jax.io.command_line import UsageError, message
from internvl3_jax.io.strict_json import suggestion
from internvl3_jax.io.terminal import excerpt, one_line
from internvl3_jax.io.typed import ConfigError, typed

CONFIG = flags.DEFINE_string(
    "config",
    None,
    "File with get_config() -> TrainConfig, as FILE or FILE:ARGUMENT. --config.FIELD=VALUE sets a field.",
)
_OVERRIDE = re.compile(r"--?(no)?config\.([^=]*)(?:=(.*))?", re.DOTALL)
# Of two fields that say the same thing in two ways, naming the one switches the other off.
_REPLACES = {"optimizer.warmup_steps": ("optimizer.warmup_fraction", 0.0)}

# field, text or None, whether its name began with "no"
_overrides: list[tuple[str, str | None, bool]] = []


@dataclasses.dataclass
class Chosen:
    """What a command line says."""

    config: TrainConfig
    recipe: str  # FILE[:ARGUMENT]
    overrides: dict[str, tuple]  # field -> (value in the recipe, value)

    def overview(self, config: TrainConfig) -> str:
        """The recipe and what differs from it, in a few lines. config: as the run takes it."""
        changes = [
            f"  {field} = {excerpt(value)} (recipe: {excerpt(old)})"
            for field, (old, value) in self.overrides.items()
        ]
        steps = f"  {config.steps:,} steps, of which {config.optimizer.warmup_steps:,} are warm-up; all settings: WORKDIR/config.json"
        return "\n".join([f"configuration {one_line(self.recipe)}", *changes, steps])


def take_overrides(arguments: list[str]) -> None:
    """Removes all --config.FIELD=VALUE from a command line and keeps them for `load`."""
    _overrides.clear()
    rest, left = [], list(arguments)
    while left:
        argument = left.pop(0)
        found = _OVERRIDE.fullmatch(argument)
        if not found:
            rest.append(argument)
            continue
        negated, field, text = bool(found[1]), found[2], found[3]
        if text is None and not negated and left and not left[0].startswith("-"):
            text = left.pop(0) if _kind_of(field) is not bool else None
        _overrides.append((field, text, negated))
    arguments[:] = rest


def load() -> Chosen:
    """The configuration that the command line names. UsageError in one line if there is none, or a
    field or value makes no sense.
    """
    name = CONFIG.value
    if not name:
        raise UsageError(
            "--config is missing; name a file of configs/, such as --config configs/tiny_digits.py"
        )
    config = copy.deepcopy(read(name))
    values: dict[str, object] = {}
    for field, text, negated in _overrides:
        value = _value(config, field, text, negated)
        if isinstance(value, tuple) and field in values:
            value = values[field] + value
        values[field] = value
    changes = {}
    for field, value in values.items():
        changes[field] = (_get(config, field), value)
        _set(config, field, value)
        other, neutral = _REPLACES.get(field, (None, None))
        if other in values:
            raise UsageError(
                f"--config.{field} and --config.{other} say the same thing twice; give one of them"
            )
        if other and other not in values:
            _set(config, other, neutral)
    return Chosen(config, name, changes)


# --- the file ------------------------------------------------------------------------------------


def read(name: str) -> TrainConfig:
    """What get_config() of FILE[:ARGUMENT] returns."""
    whole = pathlib.Path(os.path.expanduser(name))
    file, _, argument = (str(whole), "", None) if whole.is_file() else name.partition(":")
    path = cli.find_recipe(pathlib.Path(os.path.expanduser(file)))
    if path.exists() and not path.is_file():
        raise UsageError(f"--config: {one_line(str(path))}: is not a regular file; name a file")
    if not path.is_file():
        folders = (path.parent, cli.home() / "configs")
        near = suggestion(
            path.name, [file.name for folder in folders for file in folder.glob("*.py")]
        )
        raise UsageError(f"--config: {one_line(str(path))}: no such file{near}")
    arguments = [argument] if ":" in name and argument is not None else []
    with _beside(path):
        try:
            config = _module(path).get_config(*arguments)
        except (Exception, SystemExit, GeneratorExit) as error:
            raise UsageError(_where_it_failed(error, path)) from error
    if not isinstance(config, TrainConfig):
        raise UsageError(
            f"--config: get_config() of {path} returned a {type(config).__name__}; it must return a TrainConfig"
        )
    return config


def _module(path: pathlib.Path) -> types.ModuleType:
    """Whatever its name ends with; nothing is kept beside it, so that what was edited a moment ago
    is what is read.
    """
    module = types.ModuleType("internvl3_jax_config_file")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    exec(
        compile(safe_files.read_bytes(path, max_bytes=1 << 20), str(path), "exec"), module.__dict__
    )
    return module


@contextlib.contextmanager
def _beside(path: pathlib.Path):
    """A file of configs/ imports its neighbors as configs.NAME, and any file imports the shipped
    recipes so, wherever the program was started.
    """
    folder = path.resolve().parent
    folders = (folder.parent if folder.name == "configs" else folder, cli.home())
    added = [str(place) for place in dict.fromkeys(folders) if str(place) not in sys.path]
    sys.path += added
    try:
        yield
    finally:
        for place in added:
            sys.path.remove(place)


def _where_it_failed(error: BaseException, path: pathlib.Path) -> str:
    """One line: what a get_config() or recipe refuses as it says it, any other error with its kind
    and the line in the file.
    """
    own = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == str(path)
    ]
    line = (
        error.lineno
        if isinstance(error, SyntaxError) and error.filename == str(path)
        else own[-1]
        if own
        else None
    )
    text = error.msg if isinstance(error, SyntaxError) else message(error)
    kind = (
        ""
        if type(error) in (ValueError, ConfigError) or isinstance(error, OSError)
        else f"{type(error).__name__}: "
    )
    return f"--config: {one_line(str(path))}{f' line {line}' if line else ''}: {kind}{text}"


# --- fields --------------------------------------------------------------------------------------


def _kind_of(path: str, config=TrainConfig):
    """The annotation of a dotted field; None if there is no such field."""
    kind = config
    for name in path.split("."):
        fields = (
            {field.name: field.type for field in dataclasses.fields(kind)}
            if dataclasses.is_dataclass(kind)
            else {}
        )
        if name not in fields:
            return None
        kind = fields[name]
    return kind


def _value(config: TrainConfig, path: str, text: str | None, negated: bool):
    """The value of --config.PATH=TEXT by the field's annotation."""
    kind, flag = _known(path), f"--config.{path}"
    if dataclasses.is_dataclass(kind):
        fields = ", ".join(field.name for field in dataclasses.fields(kind))
        raise UsageError(
            f"{flag} is a group of settings; set one of them, such as {flag}.{fields.split(',')[0]} (it has {fields})"
        )
    if kind is bool:
        return _bool(flag, text, negated)
    if negated:
        raise UsageError(
            f"--noconfig.{path}: only settings that are true or false can be switched off so"
        )
    if text is None:
        raise UsageError(f"{flag} has no value; write {flag}=VALUE")
    return _parsed(flag, kind, text)


def _known(path: str):
    """The annotation of a field that was named on the command line; UsageError suggests another
    name if there is none.
    """
    if (kind := _kind_of(path)) is not None:
        return kind
    text = f"--config.{one_line(path)}: there is no such setting"
    group = path.rpartition(".")[0]
    if similar := _similar_fields(path):
        text += f"; did you mean {' or '.join(map(repr, similar))}?"
    elif dataclasses.is_dataclass(kind := _kind_of(group)):
        text += f"; {group} has {', '.join(field.name for field in dataclasses.fields(kind))}"
    raise UsageError(text)


def _similar_fields(path: str) -> list[str]:
    """Returns the dotted fields that a misspelt or misplaced name may mean, at most three."""
    group, _, name = path.rpartition(".")

    def score(field: str) -> float:
        of_group, _, last = field.rpartition(".")
        pairs = (name, last), (path.replace(".", "_"), field.replace(".", "_"))
        similarity = max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
        return 0.0 if similarity < 0.6 else similarity + 0.1 * bool(group and of_group == group)

    scores = {field: score(field) for field in _all_fields(TrainConfig)}
    best = max(scores.values())
    return [field for field, value in scores.items() if value == best > 0][:3]


def _all_fields(cls, start: str = ""):
    for field in dataclasses.fields(cls):
        yield f"{start}{field.name}"
        if dataclasses.is_dataclass(field.type):
            yield from _all_fields(field.type, f"{start}{field.name}.")


def _bool(flag: str, text: str | None, negated: bool) -> bool:
    known = {
        "true": True,
        "t": True,
        "1": True,
        "yes": True,
        "false": False,
        "f": False,
        "0": False,
        "no": False,
    }
    value = True if text is None else known.get(text.lower())
    if value is None:
        raise UsageError(f"{flag} is {excerpt(text)}; it must be true or false")
    return value is not negated


def _parsed(flag: str, kind, text: str):
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        if text in ("None", "none"):
            return None
        (kind,) = (one for one in typing.get_args(kind) if one is not types.NoneType)
    if kind is str:
        return text
    try:
        if typing.get_origin(kind) is tuple:
            return _tuple(flag, kind, text)
        value = kind(text)
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        wanted = {int: "a whole number", float: "a number"}.get(kind, "a list")
        raise UsageError(f"{flag} is {excerpt(text)}; it must be {wanted}") from error
    return _checked(flag, kind, value)


def _tuple(flag: str, kind, text: str) -> tuple:
    """From Python's spelling of a tuple or list, or from one element as it is."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        value = text
    if not isinstance(value, list | tuple):
        element = typing.get_args(kind)[0]
        value = (text if element is str and not isinstance(value, str) else value,)
    return _checked(flag, kind, value)


def _checked(flag: str, kind, value):
    try:
        return typed(value, kind, flag)
    except ConfigError as error:
        raise UsageError(str(error)) from error


def _get(config, path: str):
    for name in path.split("."):
        config = getattr(config, name)
    return config


def _set(config, path: str, value) -> None:
    *groups, last = path.split(".")
    setattr(_get(config, ".".join(groups)) if groups else config, last, value)
