"""Resolves what a user names to a directory: a checkpoint, the newest step of a run, a released
model, a hub id.
"""

import errno
import logging
import os
import pathlib
import re
from collections.abc import Callable

from internvl3_jax.io import integrity, strict_json
from internvl3_jax.io.file_errors import FileError
from internvl3_jax.io.integrity import MANIFEST, TRAINING
from internvl3_jax.io.remote_files import as_path, is_remote
from internvl3_jax.io.safe_files import OWN, is_own
from internvl3_jax.io.terminal import one_line
from internvl3_jax.io.unfinished import check_name

# The name of a step's directory in RUN/checkpoints.
STEP = re.compile(r"0|[1-9][0-9]{0,17}")
PEFT = "adapter_config.json"  # of an adapter that PEFT saved
# Files of a hub repository that are downloaded: no weights of other formats, no images.
HUB_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*")

# owner/name, or with a branch, a tag or a commit: owner/name@revision
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_SNAPSHOT = re.compile(
    r"/models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/(?P<commit>[0-9a-f]{40})/?$"
)

_HUB_ADDRESS = re.compile(r"(?:https?://(?:www\.)?huggingface\.co|hf:/)/(?P<id>[\w.-]+/[\w.-]+)")

log = logging.getLogger(__name__)


def _exists(path: pathlib.Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def is_checkpoint(directory: pathlib.Path) -> bool:
    return (directory / MANIFEST).is_file() and (directory / "params").is_dir()


def is_safetensors(directory: pathlib.Path) -> bool:
    # A dangling link counts, so that reading it says what is missing.
    return os.path.lexists(directory / "config.json") and any(directory.glob("*.safetensors*"))


def is_peft(directory: pathlib.Path) -> bool:
    return (directory / PEFT).is_file()


def resolve_checkpoint(path: str | os.PathLike, verify: str = "sizes") -> pathlib.Path:
    """Returns the directory that a path names: itself, the newest intact step of a training run,
    or the download of a hub id.

    Args:
      path: a local path, an address in object storage or a hub id.
      verify: how closely the steps of a training run are compared; see `integrity.damage`.

    Raises:
      FileNotFoundError: there is no checkpoint; the message says what was expected.
      Damaged: every step of the training run is damaged.
    """
    if address := _HUB_ADDRESS.match(str(path)):
        raise FileNotFoundError(
            f"{one_line(str(path))} is an address of the hub; give the hub id, "
            f"{address['id']} (or with a revision, {address['id']}@main)"
        )
    directory = as_path(path)
    if is_remote(directory):
        return _find_remote(directory, verify)
    if not _exists(directory):
        if HUB_ID.fullmatch(str(path)):
            return _download(str(path))
        raise FileNotFoundError(
            f"{one_line(str(directory))} does not exist; give a checkpoint directory, a training "
            "run or a hub id (owner/name, or owner/name@revision)"
        )
    if is_checkpoint(directory):
        if strays := sorted(path.name for path in directory.glob("*.safetensors*")):
            names = one_line(", ".join(strays[:12]))
            log.warning("%s: reading params/ and ignoring %s", one_line(str(directory)), names)
        return directory
    if is_safetensors(directory):
        return directory
    runs = directory if directory.name == "checkpoints" else directory / "checkpoints"
    step = latest_step(runs.parent, verify) if runs.is_dir() else None
    if step is not None:
        return runs / str(step)
    held = (
        ", ".join(sorted(entry.name for entry in directory.iterdir())[:10])
        if directory.is_dir()
        else "a file"
    )
    snapshots = directory if directory.name == "snapshots" else directory / "snapshots"
    if snapshots.is_dir() and (inside := sorted(snapshots.iterdir())):
        raise FileNotFoundError(
            f"{directory} is a folder of the hub's cache; give a snapshot in it, {inside[-1]}, or "
            "the hub id"
        )
    raise FileNotFoundError(
        f"{directory} is not a checkpoint. Expected one of: {MANIFEST} and params/ (converted or "
        "saved here); checkpoints/STEP with these (a training run); config.json and "
        f"*.safetensors (a released model). It holds: {held or 'nothing'}"
    )


def _find_remote(directory, verify: str):
    """Resolves an address. Released models are read from local disks only."""
    if is_checkpoint(directory):
        return directory
    run = directory.parent if directory.name == "checkpoints" else directory
    step = latest_step(run, verify)
    if step is not None:
        return run / "checkpoints" / str(step)
    if (directory / "config.json").exists() and not (directory / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"{directory} is a released model; copy it to a local disk, or convert it and use the "
            "checkpoint"
        )
    raise FileNotFoundError(
        f"{directory} is neither a checkpoint nor a training run; it needs {MANIFEST} and "
        "params/, or checkpoints/STEP"
    )


def check_exists(path: str | os.PathLike) -> None:
    """Raises FileNotFoundError if a local directory does not exist. Hub ids and addresses pass.

    Reads nothing.
    """
    if "://" in str(path) or HUB_ID.fullmatch(str(path)):
        return
    directory = pathlib.Path(os.path.expanduser(path)).absolute()
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise FileNotFoundError(
            f"{one_line(str(directory))} {what}; give a checkpoint directory, a training run or a "
            "hub id (owner/name, or owner/name@revision)"
        )


def resolve_hub_dir(path: str | os.PathLike) -> pathlib.Path:
    """Returns a local directory, or the download of a hub id, of a model other than InternVL."""
    directory = pathlib.Path(os.path.expanduser(path)).absolute()
    if directory.exists():
        return directory
    if not HUB_ID.fullmatch(str(path)):
        raise FileNotFoundError(
            f"{one_line(str(directory))} does not exist; give a directory or a hub id (owner/name)"
        )
    return _download(str(path))


def _download(hub_id: str) -> pathlib.Path:
    """Downloads owner/name, or owner/name@revision (a branch, a tag or a commit)."""
    import huggingface_hub  # slow to import, and rarely needed

    name, _, revision = hub_id.partition("@")
    try:
        path = huggingface_hub.snapshot_download(
            name, revision=revision or None, allow_patterns=list(HUB_PATTERNS)
        )
    except Exception as error:  # the hub's own errors, network errors, invalid ids
        offline = getattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        why = (
            "HF_HUB_OFFLINE is set and it is not in the cache of downloads; unset it, or "
            "download it where there is a network"
            if offline
            else f"it could not be downloaded from the hub: {_short(error)}"
        )
        raise FileNotFoundError(f"{hub_id} is not a local directory, and {why}") from error
    return pathlib.Path(path)


def _short(error: BaseException) -> str:
    """Shortens a message to one line; those of the hub have many."""
    text = " ".join(str(error).split()) or type(error).__name__
    return one_line(text if len(text) <= 300 else f"{text[:297]}...")


def hub_source(directory: pathlib.Path) -> str | None:
    """Returns owner/name@commit of a directory in the hub's cache, None for any other."""
    match = _SNAPSHOT.search(str(directory))
    return f"{match['owner']}/{match['name']}@{match['commit']}" if match else None


def damage(directory: pathlib.Path, verify: str = "full", **options) -> str | None:
    """Says what is wrong with a checkpoint or a step of a training run, None if nothing is.

    It finds files that are missing or differ from what was written, and a step under another step's
    number, as made by `cp -r 2 4`.

    Args:
      directory: the checkpoint.
      verify: how closely files are compared; see `integrity.damage`.
      **options: passed on to `integrity.damage`.
    """
    if not is_checkpoint(directory):
        return f"not a complete checkpoint ({MANIFEST} or params/ is missing)"
    if verify == "none":
        return None
    # A directory that is still being written has no list of its files yet.
    if not (directory / integrity.FILES).is_file() and not is_own(directory):
        return f"{integrity.FILES} is missing"
    return integrity.damage(directory, verify, **options) or _other_step(directory)


def _other_step(directory: pathlib.Path) -> str | None:
    """Says that RUN/checkpoints/STEP holds another step than its name says, None if it does not."""
    path = directory / TRAINING
    if directory.parent.name != "checkpoints" or not STEP.fullmatch(directory.name):
        return None
    if not path.exists():
        return None
    try:
        step = strict_json.read_object(path).get("step", int)
    except FileError as error:
        return f"{TRAINING} is damaged ({error})"
    if step == int(directory.name):
        return None
    return f"{TRAINING} says that this is step {step}; a copy of a step keeps its number"


def latest_step(
    run: str | os.PathLike,
    verify: str = "full",
    damage: Callable[[pathlib.Path, str], str | None] = damage,
) -> int | None:
    """Returns the newest intact step under RUN/checkpoints, None if none was ever completed.

    Skipped entries are named in the log.

    Args:
      run: the training run's directory.
      verify: how closely files are compared; see `integrity.damage`. Steps older than the result
        are not read.
      damage: says what is wrong with a step.

    Raises:
      Damaged: there are steps, and every one is damaged.
    """
    directory = as_path(run) / "checkpoints"
    check_name(directory)
    for entry in sorted(directory.iterdir()) if directory.is_dir() else []:
        if not is_step(entry):
            log.warning(
                "ignoring %s: not a complete checkpoint (a write was interrupted or is under way)",
                one_line(str(entry)),
            )
    steps = completed_steps(run)[::-1]
    wrong = None
    for step in steps:
        wrong = damage(directory / str(step), verify)
        if wrong is None:
            return step
        log.warning("ignoring %s: %s", one_line(str(directory / str(step))), wrong)
    if steps:
        raise integrity.Damaged(
            f"{one_line(str(directory))}: every step is damaged (the oldest, {steps[-1]}: "
            f"{wrong}); restore one from a copy, or move the directory away to start again"
        )
    return None


def completed_steps(run: str | os.PathLike) -> list[int]:
    """Returns the completed steps under RUN/checkpoints in ascending order, damaged or not."""
    directory = as_path(run) / "checkpoints"
    entries = directory.iterdir() if directory.is_dir() else ()
    return sorted(int(entry.name) for entry in entries if is_step(entry))


def check_steps_writable(run: pathlib.Path) -> None:
    """Raises FileError if a local RUN/checkpoints exists and steps cannot be saved in it."""
    directory = run / "checkpoints"
    if not os.path.lexists(directory):
        return
    name = one_line(str(directory))
    if not directory.is_dir():
        raise FileError(f"{name}: is not a directory, so no step can be saved; move it away")
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        raise FileError(f"{name}: cannot be written to; change its permissions")


def is_step(entry: pathlib.Path) -> bool:
    """Returns whether an entry of RUN/checkpoints is a completed step.

    The name decides; in object storage files.json does.
    """
    return STEP.fullmatch(entry.name) is not None and (
        not is_remote(entry) or (entry / integrity.FILES).exists() or not (entry / OWN).exists()
    )
