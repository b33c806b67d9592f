"""From what a user names to a directory: a checkpoint, the newest step of a run, a released model, a hub id."""

import json
import logging
import os
import pathlib
import re

MANIFEST = "internvl3_jax.json"
FILES = "files.json"  # of a step of a training run: path -> size of every other file
PEFT = "adapter_config.json"  # of an adapter as PEFT saves it
# What is downloaded of a hub repository: no weights of other formats, no pictures.
HUB_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*")

log = logging.getLogger(__name__)


def is_checkpoint(directory: pathlib.Path) -> bool:
    return (directory / MANIFEST).is_file() and (directory / "params").is_dir()


def is_safetensors(directory: pathlib.Path) -> bool:
    return (directory / "config.json").is_file() and any(directory.glob("*.safetensors*"))


def is_peft(directory: pathlib.Path) -> bool:
    return (directory / PEFT).is_file()


def find(path: str | os.PathLike) -> pathlib.Path:
    """The directory that a user's path means: itself, the newest step of a training run, or a download of a hub id.

    Raises:
      FileNotFoundError: saying what was looked for.
    """
    directory = pathlib.Path(path).expanduser().absolute()
    if not directory.exists():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
            return _download(str(path))
        raise FileNotFoundError(
            f"{directory} does not exist; give a checkpoint directory, a training run or a hub id (owner/name)"
        )
    if is_checkpoint(directory) or is_safetensors(directory):
        return directory
    runs = directory if directory.name == "checkpoints" else directory / "checkpoints"
    step = latest_step(runs.parent) if runs.is_dir() else None
    if step is not None:
        return runs / str(step)
    held = ", ".join(sorted(entry.name for entry in directory.iterdir())[:10]) if directory.is_dir() else "a file"
    raise FileNotFoundError(
        f"{directory} is no checkpoint. Expected one of: {MANIFEST} and params/ (converted or saved here); checkpoints/STEP with these "
        f"(a training run); config.json and *.safetensors (a released model). It holds: {held or 'nothing'}"
    )


def find_released(path: str | os.PathLike) -> pathlib.Path:
    """A local directory as it is, or the download of a hub id: for models that are no InternVL."""
    directory = pathlib.Path(path).expanduser().absolute()
    return directory if directory.exists() else _download(str(path))


def _download(hub_id: str) -> pathlib.Path:
    from huggingface_hub import snapshot_download  # takes long to import, and little needs it

    try:
        return pathlib.Path(snapshot_download(hub_id, allow_patterns=list(HUB_PATTERNS)))
    except Exception as error:  # the hub's own errors, network errors, bad ids: all end here
        raise FileNotFoundError(
            f"{hub_id} is no local directory, and it could not be downloaded from the hub: {error}"
        ) from error


def damage(directory: pathlib.Path) -> str | None:
    """What is wrong with a step of a training run: not complete, or a file missing or of another size than was written. None if nothing."""
    if not is_checkpoint(directory):
        return "not a complete checkpoint (a write was interrupted, or is under way)"
    if not (directory / FILES).is_file():
        return None  # saved as a plain checkpoint
    try:
        sizes = json.loads((directory / FILES).read_text())
    except ValueError:
        return f"{FILES} is damaged"
    for name, size in sizes.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, {size} were written"
    return None


def latest_step(run: str | os.PathLike) -> int | None:
    """The newest undamaged step under RUN/checkpoints, None if there is none. Directories that are passed over are named in the log."""
    directory = pathlib.Path(run) / "checkpoints"
    steps = []
    for entry in sorted(directory.iterdir()) if directory.is_dir() else []:
        wrong = (
            damage(entry) if entry.name.isdigit() else "not a complete checkpoint (a write was interrupted, or is under way)"
        )
        if wrong:
            log.warning("ignoring %s: %s", entry, wrong)
        else:
            steps.append(int(entry.name))
    return max(steps, default=None)
