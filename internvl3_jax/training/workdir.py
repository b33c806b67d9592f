"""A run's directory: whether it can be used and is free, and the configuration that the run in it
was begun with.

WORKDIR/config.json   the resolved configuration; binding as soon as there is a checkpoint, until
then replaced by the next start's WORKDIR/run.lock      held by process 0 of a run as long as it
lives
"""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import pathlib
from collections.abc import Iterator

import jax
import numpy as np

from internvl3_jax.config import ConfigError, TrainConfig, to_dict
from internvl3_jax.io import remote_files, safe_files, strict_json
from internvl3_jax.io.checkpoint_paths import check_steps_writable, is_checkpoint, is_safetensors
from internvl3_jax.io.remote_files import as_path
from internvl3_jax.io.safe_files import FileError, reason
from internvl3_jax.io.terminal import one_line
from internvl3_jax.io.typed import typed
from internvl3_jax.training.optimizer import make_schedule, warmup_steps
from internvl3_jax.training.start import config_diff

CONFIG, LOCK = "config.json", "run.lock"
# by a run, beside its checkpoints
WRITTEN = ("answers.jsonl", "log.jsonl", "loss.png", "report.json", "skipped.txt")
_ATTENTION = ("attention_vision", "attention_language")
_MEMORY = (
    "mesh",
    "micro_batches",
    "remat_vision",
    "remat_language",
    "offload_optimizer",
    "loss_chunk",
)
_RUNNING = ("logging", "host_check_every", "accept_changed_data")
# of TrainConfig, when a run is resumed
FREE_TO_CHANGE = (*_MEMORY, "scan_unroll", *_ATTENTION, *_RUNNING)
# file systems without locks
_CANNOT_LOCK = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}

log = logging.getLogger(__name__)


# --- the directory -------------------------------------------------------------------------------


def named(name: str) -> pathlib.Path:
    """The directory that --workdir means. FileError in one line if no run can be in it; nothing is
    created.
    """
    if "://" in name:
        path = as_path(name)
        remote_files.exists(path)  # whether it can be asked at all
        return path
    try:
        path = pathlib.Path(name).expanduser()
        if not name or "\0" in name:
            raise FileError(f"--workdir is {name!r}; name a directory")
        if path.is_symlink() and not path.exists():
            raise FileError(
                f"{one_line(name)}: is a link to {os.readlink(path)}, which does not exist"
            )
        nearest = next(
            place for place in (path.absolute(), *path.absolute().parents) if place.exists()
        )
    except (RuntimeError, OSError) as error:  # an unknown user after ~, a name that is too long
        raise FileError(f"{one_line(name)}: cannot be a --workdir ({reason(error)})") from error
    if not nearest.is_dir():
        raise FileError(f"{one_line(str(nearest))}: is a file; name a directory as --workdir")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise FileError(
            f"{one_line(str(nearest))}: cannot be written to; name another --workdir, or change its permissions"
        )
    check_steps_writable(path)
    return path


@contextlib.contextmanager
def held(workdir: pathlib.Path) -> Iterator[None]:
    """The directory, made if it is missing, for this process alone. safe_files.InUse names the
    process that has it.
    """
    if is_checkpoint(workdir) or is_safetensors(workdir):
        raise FileError(
            f"{one_line(str(workdir))}: holds a model, not a training run; name another --workdir"
        )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(
            f"{one_line(str(workdir))}: cannot be made ({reason(error)}); name another --workdir"
        ) from error
    lock = safe_files.lock_at(
        workdir / LOCK, one_line(str(workdir)), lambda text: print(text, flush=True)
    )
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in _CANNOT_LOCK:
            raise
        log.warning(
            "%s: the file system has no locks; nothing keeps a second run from this directory",
            workdir,
        )
    with contextlib.closing(_Closing(lock)):
        yield


class _Closing:
    def __init__(self, lock):
        self.close = lock.release


# --- the configuration ---------------------------------------------------------------------------


def resolved(config: TrainConfig) -> TrainConfig:
    """With the number of warm-up steps in place of their fraction."""
    optimizer = dataclasses.replace(
        config.optimizer,
        warmup_steps=warmup_steps(config.optimizer, config.steps),
        warmup_fraction=0.0,
    )
    return dataclasses.replace(config, optimizer=optimizer)


def same_run(config: TrainConfig, workdir: pathlib.Path, newest: int | None) -> TrainConfig:
    """The configuration with which the run in the directory is resumed, or a new one begins; see
    `resolved`.

    A run may be lengthened where its schedule allows it (wsd). Its number of warm-up steps stays,
    where a fraction gave it.

    Args:
      newest: its newest complete step. Without one the configuration in the directory does not
          bind.

    Raises:
      ValueError: the directory is no run's, or the run in it has another configuration; the message
      says which settings differ.
    """
    path = workdir / CONFIG
    theirs = _read(path) if path.exists() else None
    if newest is None:
        if theirs is None and (foreign := [name for name in WRITTEN if (workdir / name).exists()]):
            raise FileError(
                f"{workdir / foreign[0]} exists, but {workdir} holds no run ({CONFIG}); name another --workdir"
            )
        return resolved(config)
    if theirs is None:
        return resolved(config)
    fixed = theirs["optimizer"]["warmup_steps"]
    if config.optimizer.warmup_fraction and isinstance(fixed, int) and 0 <= fixed < config.steps:
        if (
            warmup_steps(config.optimizer, theirs["steps"])
            != fixed
            != warmup_steps(config.optimizer, config.steps)
        ):
            print(
                f"{workdir} keeps its warm-up of {fixed} steps, not optimizer.warmup_fraction={config.optimizer.warmup_fraction}"
            )
        config = dataclasses.replace(
            config,
            optimizer=dataclasses.replace(
                config.optimizer, warmup_steps=fixed, warmup_fraction=0.0
            ),
        )
    config = resolved(config)
    ours = json.loads(json.dumps(to_dict(config)))
    if not (found := config_diff(_deciding(theirs), _deciding(ours), "")):
        return config
    if [
        name for name in theirs if theirs[name] != ours.get(name) and name not in FREE_TO_CHANGE
    ] == ["steps"]:
        return _lengthened(config, theirs["steps"], workdir, newest)
    raise ConfigError(
        f"{workdir} is a run with another configuration ({path}): {'; '.join(found)}. Name another --workdir, or delete it"
    )


def _lengthened(
    config: TrainConfig, before: int, workdir: pathlib.Path, newest: int
) -> TrainConfig:
    """The configuration, of which only the number of steps is another one than the run's.
    ConfigError where that is not possible.
    """
    change = f"{workdir} is a run of {before} steps, and steps is {config.steps}"
    if config.optimizer.schedule != "wsd":
        raise ConfigError(
            f"{change}: with optimizer.schedule={config.optimizer.schedule} the steps done so far would have had other learning rates. "
            f"Start a new run from its weights (--config.init_from={workdir}, another --workdir); runs with optimizer.schedule=wsd can "
            f"be lengthened"
        )
    if config.steps < newest:
        raise ConfigError(f"{change}: step {newest} is done already; set steps to at least that")
    rate = config.optimizer.learning_rate
    old, new = (
        np.asarray(make_schedule(config.optimizer, steps, rate)(np.arange(newest)), np.float64)
        for steps in (before, config.steps)
    )
    decayed = np.flatnonzero(~np.isclose(old, new, rtol=1e-5, atol=0))
    note = (
        ""
        if not len(decayed)
        else f"; from step {decayed[0] + 1} on its learning rate had decayed, and it rises again now"
    )
    print(f"{workdir} is lengthened from {before} to {config.steps} steps{note}", flush=True)
    return config


def save_config(config: TrainConfig, workdir: pathlib.Path) -> None:
    """Keeps the resolved configuration with the run; called when nothing is left that may refuse
    it. Of several processes one does.
    """
    if jax.process_index():
        return
    workdir.mkdir(parents=True, exist_ok=True)
    safe_files.replace(workdir / CONFIG, json.dumps(to_dict(config), indent=1) + "\n")


def _read(path: pathlib.Path) -> dict:
    """A run's configuration; fields that it was saved without have their defaults, which change
    nothing. FileError if it is none.
    """
    advice = (
        "if it is of this run, delete it to resume without comparing; else name another --workdir"
    )
    try:
        values = strict_json.read(path)
    except FileError as error:
        raise FileError(f"{error}; {advice}") from error
    if not isinstance(values, dict) or not {"model", "data", "optimizer", "steps"} <= values.keys():
        raise FileError(
            f"{path}: is not the configuration of a training run; name another --workdir"
        )
    return _completed(TrainConfig, values, f"{path}: ", "")


def _completed(cls, values, file: str, key: str) -> dict:
    """Adds the defaults of fields that are missing; FileError names a key of a wrong type."""
    if not isinstance(values, dict):
        raise FileError(
            f"{file}{key} is {strict_json.describe(values)}; expected an object; was it edited?"
        )
    completed = dict(values)
    for field in dataclasses.fields(cls):
        name = f"{key}.{field.name}" if key else field.name
        if dataclasses.is_dataclass(field.type):
            completed[field.name] = _completed(field.type, values.get(field.name, {}), file, name)
        elif field.name in values:
            try:
                typed(values[field.name], field.type, f"{file}{name}")
            except ConfigError as error:
                raise FileError(f"{error}; was it edited?") from error
        elif field.default is not dataclasses.MISSING:
            completed[field.name] = json.loads(json.dumps(field.default))  # as it would be saved
    return completed


def _deciding(config: dict) -> dict:
    """What decides about the numbers; the rest may change while a run stands still: other devices,
    another cut of the same update.
    """
    data = {name: value for name, value in config["data"].items() if name != "workers"}
    free = set(FREE_TO_CHANGE)
    if config.get("loss", {}).get("kind") == "mpo":
        free.discard("micro_batches")  # each adds to the rewards' mean before the next is computed
    if config.get("lora", {}).get("rank"):
        free.add("init_from")  # the base may have moved; that it is the same is seen by its hash
    return {name: value for name, value in config.items() if name not in free} | {"data": data}
