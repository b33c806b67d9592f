"""Copies of a run's log elsewhere: TensorBoard, Weights & Biases, and object storage."""

import importlib
import pathlib
import tempfile
import time
import uuid
from collections.abc import Callable
from typing import NamedTuple

from internvl3_jax.config import TrainConfig, to_dict
from internvl3_jax.io import remote_files, safe_files
from internvl3_jax.io.remote_files import is_remote


class Sink(NamedTuple):
    """A receiver of the log's rows besides log.jsonl."""

    # (step, values)
    write: Callable[[int, dict], None]
    # (whether the run ended with an error)
    close: Callable[[bool], None]


def check_extras(config: TrainConfig) -> None:
    """Raises ImportError if a package is missing that the run would need later on."""
    tensorboard_remedy = "pip install -e '.[logging]', or set --config.logging.tensorboard=false"
    for wanted, setting, package, remedy in (
        (config.logging.tensorboard, "tensorboard=True", "tensorboardX", tensorboard_remedy),
        (config.logging.wandb, "wandb=PROJECT", "wandb", "pip install wandb"),
    ):
        if wanted:
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise ImportError(f"logging.{setting} needs {package}: {remedy}") from error


def tensorboard(folder: pathlib.Path, step: int) -> Sink:
    """Opens TensorBoard's files in a folder; what they hold of steps after `step` is hidden."""
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(step, values):
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Sink(write, lambda failed: writer.close())


def weights_and_biases(workdir: pathlib.Path, config: TrainConfig) -> Sink:
    """Opens the run in Weights & Biases that belongs to the directory, or a new one."""
    import wandb

    # The id is kept in the directory, so that the run is resumed there too. Runs differ by their
    # directory, not by the last part of its name. A kill may have left the file empty.
    path = workdir / "wandb" / "id"
    if not path.is_file() or not path.read_text().strip():
        path.parent.mkdir(exist_ok=True)
        safe_files.replace(path, uuid.uuid4().hex)
    # wandb uploads what it writes there.
    folder = tempfile.gettempdir() if is_remote(workdir) else workdir
    run = wandb.init(
        project=config.logging.wandb,
        dir=folder,
        id=path.read_text(),
        name=str(workdir),
        resume="allow",
        config=to_dict(config),
    )
    return Sink(
        lambda step, values: run.log(values, step=step),
        lambda failed: run.finish(exit_code=int(failed)),
    )


class Mirror:
    """A local folder that is copied to object storage, where files cannot be appended to.

    Attributes:
      local: The folder to write to.
    """

    def __init__(self, remote, seconds: float = 60.0):
        """Makes the local folder. seconds: shortest time between two copies."""
        self.remote, self.seconds, self.copied_at = remote, seconds, time.monotonic()
        self.sizes: dict[str, int] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="internvl3_jax_")
        self.local = pathlib.Path(self._folder.name)

    def copy_sometimes(self) -> None:
        """Copies if the last copy is old enough."""
        if time.monotonic() - self.copied_at > self.seconds:
            self.copy()

    def copy(self) -> None:
        """Copies the files whose size has changed."""
        sizes = {
            path.relative_to(self.local).as_posix(): path.stat().st_size
            for path in sorted(self.local.rglob("*"))
            if path.is_file()
        }
        changed = [name for name, size in sizes.items() if self.sizes.get(name) != size]
        remote_files.upload(self.local, self.remote, changed)
        self.sizes, self.copied_at = sizes, time.monotonic()

    def close(self) -> None:
        """Copies a last time and removes the local folder."""
        self.copy()
        self._folder.cleanup()
