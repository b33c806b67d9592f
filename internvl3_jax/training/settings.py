"""Reads a run's configuration from the command line.

    settings.take_overrides(sys.argv)     before absl parses the flags
    chosen = settings.load()              in main; returns a Chosen

--config FILE[:ARGUMENT] names Python code with `get_config() -> TrainConfig`, which gets ARGUMENT
as a text. A file that does not exist means the recipe of that name in the shipped configs/.
--config.FIELD=VALUE sets one field, whose type says how VALUE is read:

    --config.steps=100 --config.data.source=meta.json --config.logging.tensorboard=false
    --config.optimizer.freeze='("vision/.*",)'

A tuple may also be given by naming its field several times. Errors are UsageErrors of one line.
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
    "File with get_config() -> TrainConfig, as FILE or FILE:ARGUMENT. "
    "--config.FIELD=VALUE sets a field.",
)
_OVERRIDE = re.compile(r"--?(no)?config\.([^=]*)(?:=(.*))?", re.DOTALL)
# Field -> another field for the same thing, and the value that disables that one. Setting the first
# disables the second.
_REPLACES = {"optimizer.warmup_steps": ("optimizer.warmup_fraction", 0.0)}

# Field, text or None, and whether its name began with "no".
_overrides: list[tuple[str, str | None, bool]] = []


@dataclasses.dataclass
class Chosen:
    """The configuration of a command line.

    Attributes:
      recipe: FILE[:ARGUMENT].
      overrides: From a field to its value in the recipe and on the command line.
    """

    config: TrainConfig
    recipe: str
    overrides: dict[str, tuple]

    def overview(self, config: TrainConfig) -> str:
        """Returns a few lines with the recipe and what differs from it, for `config` as it is run."""
        changes = [
            f"  {field} = {excerpt(value)} (recipe: {excerpt(old)})"
            for field, (old, value) in self.overrides.items()
            if value != old
        ]
        steps = (
            f"  {config.steps:,} steps, of which {config.optimizer.warmup_steps:,} are warm-up; "
            f"all settings: WORKDIR/config.json"
        )
        return "\n".join([f"configuration {one_line(self.recipe)}", *changes, steps])


def take_overrides(arguments: list[str]) -> None:
    """Removes all --config.FIELD=VALUE from a command line and keeps them for `load`."""
    _overrides.clear()
    others, remaining = [], list(arguments)
    while remaining:
        argument = remaining.pop(0)
        match = _OVERRIDE.fullmatch(argument)
        if not match:
            others.append(argument)
            continue
        negated, field, text = bool(match[1]), match[2], match[3]
        # --config.FIELD VALUE, but not --config.BOOL
        if text is None and not negated and remaining and not remaining[0].startswith("-"):
            text = remaining.pop(0) if _type_of(field) is not bool else None
        _overrides.append((field, text, negated))
    arguments[:] = others


def load() -> Chosen:
    """Returns the configuration that the command line names.

    Raises:
      UsageError: There is none, or a field does not exist or cannot have its value.
    """
    name = CONFIG.value
    if not name:
        raise UsageError(
            "--config is missing; name a file of configs/, such as --config configs/tiny_digits.py"
        )
    # Read all values first; a tuple may come in parts.
    config = copy.deepcopy(read(name))
    values: dict[str, object] = {}
    for field, text, negated in _overrides:
        value = _value(config, field, text, negated)
        if isinstance(value, tuple) and field in values:
            value = values[field] + value
        values[field] = value
    overrides = {}
    for field, value in values.items():
        overrides[field] = (_get(config, field), value)
        _set(config, field, value)
        other, disabled = _REPLACES.get(field, (None, None))
        if other in values:
            raise UsageError(
                f"--config.{field} and --config.{other} say the same thing twice; give one of them"
            )
        if other:
            _set(config, other, disabled)
    return Chosen(config, name, overrides)


# --- the file ------------------------------------------------------------------------------------


def read(name: str) -> TrainConfig:
    """Returns get_config() of FILE[:ARGUMENT]; raises UsageError if that fails."""
    # A file may have a colon in its name.
    path = pathlib.Path(os.path.expanduser(name))
    file, _, argument = (str(path), "", None) if path.is_file() else name.partition(":")
    path = cli.find_recipe(pathlib.Path(os.path.expanduser(file)))
    if path.exists() and not path.is_file():
        raise UsageError(f"--config: {one_line(str(path))}: is not a regular file; name a file")
    if not path.is_file():
        folders = (path.parent, cli.home() / "configs")
        files = [file.name for folder in folders for file in folder.glob("*.py")]
        near = suggestion(path.name, files)
        raise UsageError(f"--config: {one_line(str(path))}: no such file{near}")
    arguments = [argument] if ":" in name and argument is not None else []
    with _beside(path):
        try:
            config = _module(path).get_config(*arguments)
        except (Exception, SystemExit, GeneratorExit) as error:
            raise UsageError(_located(error, path)) from error
    if not isinstance(config, TrainConfig):
        raise UsageError(
            f"--config: get_config() of {path} returned a {type(config).__name__}; "
            f"it must return a TrainConfig"
        )
    return config


def _module(path: pathlib.Path) -> types.ModuleType:
    """Runs a file as a module, whatever its suffix; writes no bytecode that could be outdated."""
    module = types.ModuleType("internvl3_jax_config_file")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    exec(
        compile(safe_files.read_bytes(path, max_bytes=1 << 20), str(path), "exec"), module.__dict__
    )
    return module


@contextlib.contextmanager
def _beside(path: pathlib.Path):
    """Lets a recipe import its neighbors and the shipped recipes, as configs.NAME."""
    folder = path.resolve().parent
    folders = (folder.parent if folder.name == "configs" else folder, cli.home())
    added = [str(root) for root in dict.fromkeys(folders) if str(root) not in sys.path]
    sys.path += added
    try:
        yield
    finally:
        for root in added:
            sys.path.remove(root)


def _located(error: BaseException, path: pathlib.Path) -> str:
    """Returns one line with the file, its line, and the error; a refusal comes without its type."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == str(path)
    ]
    line = (
        error.lineno
        if isinstance(error, SyntaxError) and error.filename == str(path)
        else lines[-1]
        if lines
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


def _type_of(path: str, config=TrainConfig):
    """Returns the annotation of a dotted field, or None if there is no such field."""
    annotation = config
    for name in path.split("."):
        fields = dataclasses.fields(annotation) if dataclasses.is_dataclass(annotation) else ()
        annotation = {field.name: field.type for field in fields}.get(name)
        if annotation is None:
            return None
    return annotation


def _value(config: TrainConfig, path: str, text: str | None, negated: bool):
    """Returns the value of --config.PATH=TEXT, read by the field's annotation."""
    kind, flag = _known(path), f"--config.{path}"
    if dataclasses.is_dataclass(kind):
        fields = ", ".join(field.name for field in dataclasses.fields(kind))
        raise UsageError(
            f"{flag} is a group of settings; set one of them, such as "
            f"{flag}.{fields.split(',')[0]} (it has {fields})"
        )
    if kind is bool:
        return _bool(flag, text, negated)
    if negated:
        raise UsageError(
            f"--noconfig.{path}: only settings that are true or false can be disabled so"
        )
    if text is None:
        raise UsageError(f"{flag} has no value; write {flag}=VALUE")
    return _parsed(flag, kind, text)


def _known(path: str):
    """Returns the annotation of a field of the command line.

    Raises:
      UsageError: There is no such field; the error suggests similar ones.
    """
    if (kind := _type_of(path)) is not None:
        return kind
    text = f"--config.{one_line(path)}: there is no such setting"
    group = path.rpartition(".")[0]
    if similar := _similar_fields(path):
        text += f"; did you mean {' or '.join(map(repr, similar))}?"
    elif dataclasses.is_dataclass(kind := _type_of(group)):
        text += f"; {group} has {', '.join(field.name for field in dataclasses.fields(kind))}"
    raise UsageError(text)


def _similar_fields(path: str) -> list[str]:
    """Returns the dotted fields that a misspelled or misplaced name may mean, at most three."""
    group, _, name = path.rpartition(".")
    is_group = dataclasses.is_dataclass(_type_of(group))

    def score(field: str) -> float:
        of_group, _, last = field.rpartition(".")
        # Whole names of one group are similar by the group alone.
        pairs = [(name, last), (path.replace(".", "_"), field.replace(".", "_"))][: 2 - is_group]
        similarity = max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
        least = 0.75 if is_group and of_group != group else 0.65
        return 0.0 if similarity < least else similarity + 0.1 * bool(group and of_group == group)

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
        (kind,) = (part for part in typing.get_args(kind) if part is not types.NoneType)
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
    """Reads Python's notation of a tuple or list, or a single element as it is."""
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
