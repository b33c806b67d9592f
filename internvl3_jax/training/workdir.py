"""A run's directory: whether it can be used, and the configuration of the run in it.

WORKDIR/config.json   the resolved configuration. It binds once there is a checkpoint; before that
                      the next start replaces it.
WORKDIR/run.lock      held by process 0 of the run while it is alive
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
from flax.traverse_util import flatten_dict

from internvl3_jax.checkpoints import steps
from internvl3_jax.config import ConfigError, OptimizerConfig, TrainConfig, from_dict, to_dict
from internvl3_jax.io import remote_files, safe_files, strict_json
from internvl3_jax.io.checkpoint_paths import (
    check_steps_writable,
    is_checkpoint,
    is_safetensors,
)
from internvl3_jax.io.remote_files import as_path
from internvl3_jax.io.safe_files import FileError, reason
from internvl3_jax.io.terminal import one_line
from internvl3_jax.io.typed import typed
from internvl3_jax.training.config_diff import config_diff
from internvl3_jax.training.optimizer import make_schedule, warmup_steps

CONFIG, LOCK = "config.json", "run.lock"
# Files that a run writes, besides its checkpoints.
WRITTEN = ("answers.jsonl", "log.jsonl", "loss.png", "report.json", "skipped.txt")

# Fields that may change when a run is resumed, since they change neither the coming batches nor
# the coming updates: how a step is computed, and what is reported, evaluated and kept.
FREE_TO_CHANGE = (
    "mesh",
    "micro_batches",
    "remat_vision",
    "remat_language",
    "offload_optimizer",
    "loss_chunk",
    "scan_unroll",
    "attention_vision",
    "attention_language",
    "data.workers",
    "eval",
    "checkpoint",
    "logging",
    "host_check_every",
    "accept_changed_data",
)
# Fields that change the learning rate of the coming steps, and nothing else. With the schedule
# "wsd" they may change where the steps done so far had the same learning rates.
SCHEDULE = (
    "steps",
    "optimizer.schedule",
    "optimizer.warmup_steps",
    "optimizer.decay_fraction",
    "optimizer.final_lr_fraction",
)
# Errors of file systems without locks.
_CANNOT_LOCK = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}

log = logging.getLogger(__name__)


# --- the directory -------------------------------------------------------------------------------


def named(name: str) -> pathlib.Path:
    """Returns the directory that --workdir means; creates nothing.

    Raises:
      FileError: No run can be in it.
    """
    if "://" in name:
        path = as_path(name)
        remote_files.exists(path)  # raises if the storage cannot be reached
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
            folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists()
        )
    except (RuntimeError, OSError) as error:
        # An unknown user after ~, or a name that is too long.
        raise FileError(f"{one_line(name)}: cannot be a --workdir ({reason(error)})") from error
    if not nearest.is_dir():
        raise FileError(f"{one_line(str(nearest))}: is a file; name a directory as --workdir")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise FileError(
            f"{one_line(str(nearest))}: cannot be written to; "
            f"name another --workdir, or change its permissions"
        )
    check_steps_writable(path)
    return path


@contextlib.contextmanager
def held(workdir: pathlib.Path) -> Iterator[None]:
    """Creates the directory if it is missing and locks it for this process.

    Raises:
      FileError: It holds a model, or cannot be created.
      safe_files.InUse: Another process, which the error names, has locked it.
    """
    if is_checkpoint(workdir) or is_safetensors(workdir):
        raise FileError(
            f"{one_line(str(workdir))}: holds a model, not a training run; name another --workdir"
        )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(
            f"{one_line(str(workdir))}: cannot be created ({reason(error)}); name another --workdir"
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
            "%s: the file system has no locks; do not start a second run in this directory",
            workdir,
        )
    with contextlib.closing(_Closing(lock)):
        yield


class _Closing:
    def __init__(self, lock):
        self.close = lock.release


# --- the newest step -----------------------------------------------------------------------------


# --- the configuration ---------------------------------------------------------------------------


def resolved(config: TrainConfig) -> TrainConfig:
    """Returns the configuration with a number of warm-up steps in place of a fraction."""
    return _with_warmup(config, warmup_steps(config.optimizer, config.steps))


def _with_warmup(config: TrainConfig, count: int) -> TrainConfig:
    optimizer = dataclasses.replace(config.optimizer, warmup_steps=count, warmup_fraction=0.0)
    return dataclasses.replace(config, optimizer=optimizer)


def same_run(config: TrainConfig, workdir: pathlib.Path, newest: int | None) -> TrainConfig:
    """Returns the resolved configuration with which a run begins or is resumed.

    Args:
      newest: The newest complete step. Without one the configuration in the directory does not
        bind.

    Raises:
      FileError: The directory belongs to something else than a run.
      ConfigError: The run in it has another configuration; the error names the fields.
    """
    path = workdir / CONFIG
    saved = _read(path) if path.exists() else None
    if newest is None or saved is None:
        foreign = [name for name in WRITTEN if (workdir / name).exists()]
        if newest is None and saved is None and foreign:
            raise FileError(
                f"{workdir / foreign[0]} exists, but {workdir} holds no run ({CONFIG}); "
                f"name another --workdir"
            )
        return resolved(config)

    # A warm-up fraction counts the steps that the run began with, also after it was lengthened.
    config = _with_warmup(
        config, warmup_steps(config.optimizer, _first_length(workdir, newest, saved))
    )
    given = json.loads(json.dumps(to_dict(config)))
    bound, wanted = (flatten_dict(fields, sep=".") for fields in (saved, given))
    changed = [
        name
        for name in bound | wanted
        if bound.get(name) != wanted.get(name) and not _is_free(name, config)
    ]
    if not changed:
        return config
    differences = "; ".join(
        config_diff(
            {name: bound.get(name) for name in changed},
            {name: wanted.get(name) for name in changed},
            "",
            "run",
        )
    )
    if not set(changed) <= set(SCHEDULE):
        raise ConfigError(
            f"{workdir} is a run with another configuration ({path}): {differences}; "
            f"name another --workdir, or delete it"
        )
    _check_schedule(config, saved, differences, workdir, newest)
    return config


def _first_length(workdir: pathlib.Path, newest: int, saved: dict) -> int:
    """Returns the number of steps that the run was begun with."""
    path = workdir / "checkpoints" / str(newest) / steps.TRAINING
    past = steps.read_training(workdir, newest).get("past", {}) if path.exists() else {}
    return past.get("first_length") or saved["steps"]


def _is_free(field: str, config: TrainConfig) -> bool:
    """Returns whether a dotted field may change while the run is stopped."""
    if field == "micro_batches" and config.loss.kind != "sft":
        # Each adds to the mean of the rewards, or to the window of ratios, before the next is
        # computed, and draws its own tiles to compress.
        return False
    if field == "init_from" and config.lora.rank:
        return True  # the base may have moved; its hash is checked
    return any(field == free or field.startswith(f"{free}.") for free in FREE_TO_CHANGE)


def _check_schedule(
    config: TrainConfig, saved: dict, differences: str, workdir: pathlib.Path, newest: int
) -> None:
    """Raises ConfigError unless the run's schedule allows the change; prints what it means."""
    old_optimizer = from_dict(OptimizerConfig, saved["optimizer"], str(workdir / CONFIG))
    old_steps = saved["steps"]
    refused = f"{workdir} has another learning rate schedule: {differences}"
    if {old_optimizer.schedule, config.optimizer.schedule} != {"wsd"}:
        raise ConfigError(
            f"{refused}; only runs with optimizer.schedule=wsd can be changed. Start a new run "
            f"from its weights: --config.init_from={workdir} and another --workdir"
        )
    if config.steps < newest:
        raise ConfigError(f"{refused}; step {newest} is done already, set steps to at least that")

    # Compare the learning rates of the steps that are done. Only a decay that has begun may be left
    # behind, by a longer run.
    rate = config.optimizer.learning_rate
    old, new = (
        np.asarray(make_schedule(optimizer, total, rate)(np.arange(newest)), np.float64)
        for optimizer, total in ((old_optimizer, old_steps), (config.optimizer, config.steps))
    )
    first = int(np.argmax(~np.isclose(old, new, rtol=1e-5, atol=0)))
    is_changed = not np.allclose(old, new, rtol=1e-5, atol=0)
    decay_start = old_steps - round(old_optimizer.decay_fraction * old_steps)
    if is_changed and (config.steps <= old_steps or first < decay_start):
        raise ConfigError(
            f"{refused}; the learning rate of step {first + 1}, which is done, would change"
        )
    text = f"{workdir} is resumed with another schedule: {differences}"
    if is_changed:
        text += f"; its learning rate had decayed from step {first + 1} on, and rises again"
    print(text, flush=True)


def save_config(config: TrainConfig, workdir: pathlib.Path) -> None:
    """Writes the resolved configuration to the run's directory; one of several processes does."""
    if jax.process_index():
        return
    workdir.mkdir(parents=True, exist_ok=True)
    safe_files.replace(workdir / CONFIG, json.dumps(to_dict(config), indent=1) + "\n")


def _read(path: pathlib.Path) -> dict:
    """Returns a run's configuration, with the default of each field that it was saved without.

    Raises:
      FileError: The file is not the configuration of a run.
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
