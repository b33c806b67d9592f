"""What a run leaves for people: log.jsonl, answers.jsonl, the loss curve, and the report of its
held-out scores.
"""

import dataclasses
import importlib
import io
import json
import math
import pathlib
import sys
import tempfile
import time
import uuid

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from internvl3_jax.config import TrainConfig, to_dict
from internvl3_jax.io import jsonl, remote_files, safe_files
from internvl3_jax.io.remote_files import is_remote
from internvl3_jax.io.safe_files import FileError
from internvl3_jax.io.terminal import one_line

LOG, ANSWERS, CURVE = "log.jsonl", "answers.jsonl", "loss.png"


class Log:
    """WORKDIR/log.jsonl, one row per logged step; also the terminal and, if the configuration asks,
    TensorBoard, W&B and a profile.

    Opened at a step, it drops the rows after it, which are about to be written anew. Of several
    processes one writes; every one of them profiles its devices.
    """

    def __init__(self, workdir: pathlib.Path, config: TrainConfig, step: int, writes: bool = True):
        self.writes = writes
        if not writes:
            silent = dataclasses.replace(config.logging, tensorboard=False, wandb="")
            config = dataclasses.replace(config, logging=silent)
        self.path, self.config = workdir / LOG, config
        if writes:
            for name in (LOG, ANSWERS):
                cut_back(workdir / name, step)
        self.progress = _progress()
        self.task = self.progress.add_task(
            "training", total=config.steps, completed=step, loss=float("nan")
        )
        self.mirrors: list[Mirror] = []
        local = self._mirrored(workdir / "tensorboard") if config.logging.tensorboard else None
        self.sinks = [*_tensorboard(local, config, step), *_wandb(workdir, config)]
        self.profiling = False

    def _mirrored(self, folder) -> pathlib.Path:
        """The folder itself or, of one in object storage, a local one that is copied there."""
        if not is_remote(folder):
            return folder
        self.mirrors.append(Mirror(folder))
        return self.mirrors[-1].local

    def __enter__(self):
        self.progress.start()
        return self

    def __exit__(self, *exception) -> None:
        self.progress.stop()
        if self.profiling:
            self._stop_profile()
        for _, close in self.sinks:
            close(exception[0] is not None)
        if exception[0] is None and self.writes and self.rows():
            self.draw()
        remote_files.flush()
        for mirror in self.mirrors:
            mirror.close()

    def write(self, step: int, values: dict[str, float]) -> None:
        if not self.writes:
            return
        append(self.path, [{"step": step, **values}])
        for mirror in self.mirrors:
            mirror.copy_sometimes()
        for write, _ in self.sinks:
            write(step, values)
        if "loss" in values:
            self.progress.update(self.task, completed=step, loss=values["loss"])
        if not sys.stdout.isatty():
            shown = (
                "loss",
                "eval_loss",
                "tokens_per_second",
                "tiles_per_second",
                "input_wait",
                "mfu",
                "seconds",
            )
            text = " ".join(f"{name} {values[name]:.4g}" for name in shown if name in values)
            print(f"step {step}/{self.config.steps} {text}", flush=True)

    def profile(self, step: int) -> None:
        """Starts or ends the profile of `profile_steps` before a step."""
        import jax

        first, last = self.config.logging.profile_steps or (0, 0)
        if step == first:
            jax.profiler.start_trace(str(self._mirrored(self.path.parent / "profile")))
            self.profiling = True
        elif self.profiling and step == last + 1:
            self._stop_profile()

    def _stop_profile(self) -> None:
        import jax

        jax.profiler.stop_trace()
        self.profiling = False

    def rows(self) -> list[dict]:
        return read_rows(self.path)

    def draw(self) -> None:
        """Writes WORKDIR/loss.png if matplotlib can draw it: the numbers are in log.jsonl without
        it.
        """
        try:
            safe_files.replace(self.path.parent / CURVE, self._drawn())
        except ImportError:
            print(
                f"{CURVE} is left out, since matplotlib is not installed (pip install matplotlib)",
                flush=True,
            )
        except Exception as error:
            # whatever another library's version or settings raise, the run has reached its end
            print(f"{CURVE} is left out ({one_line(str(error))})", flush=True)

    def _drawn(self) -> bytes:
        from matplotlib.figure import Figure

        rows = [row for row in self.rows() if "loss" in row]
        figure = Figure(figsize=(7, 3.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(
            [row["step"] for row in rows],
            [row["loss"] for row in rows],
            linewidth=1,
            label="training",
        )
        if evals := [row for row in self.rows() if "eval_loss" in row]:
            axes.plot(
                [row["step"] for row in evals],
                [row["eval_loss"] for row in evals],
                marker=".",
                label="eval",
            )
            axes.legend()
        axes.set(xlabel="step", ylabel="loss", yscale="log")
        axes.grid(alpha=0.3, which="both")
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=120)
        return drawn.getvalue()


class Mirror:
    """A local folder whose files are copied to object storage, where nothing can be added to a
    file.
    """

    def __init__(self, remote, seconds: float = 60.0):
        self.remote, self.seconds, self.copied, self.sizes = remote, seconds, time.monotonic(), {}
        self._folder = tempfile.TemporaryDirectory(prefix="internvl3_jax_")
        self.local = pathlib.Path(self._folder.name)

    def copy_sometimes(self) -> None:
        if time.monotonic() - self.copied > self.seconds:
            self.copy()

    def copy(self) -> None:
        sizes = {
            p.relative_to(self.local).as_posix(): p.stat().st_size
            for p in sorted(self.local.rglob("*"))
            if p.is_file()
        }
        remote_files.upload(
            self.local,
            self.remote,
            [name for name, size in sizes.items() if self.sizes.get(name) != size],
        )
        self.sizes, self.copied = sizes, time.monotonic()

    def close(self) -> None:
        self.copy()
        self._folder.cleanup()


def append(path: pathlib.Path, rows: list[dict]) -> None:
    """Adds rows to a JSONL file. A number that is not finite is written as null. OSError names the
    file.
    """
    jsonl.append(path, [jsonl.dumps(_finite(row)) for row in rows])


def _finite(row: dict) -> dict:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def read_rows(path: pathlib.Path) -> list[dict]:
    """The rows of a file of `append`, each with its "step"; a last line that a kill has torn is no
    row, and no file has no rows.

    Raises:
      FileError: naming a line that a run did not write.
    """
    rows = []
    for number, line in enumerate(jsonl.whole_lines(path) if path.exists() else [], 1):
        try:
            row = json.loads(line)  # not strictly: older logs hold NaN
            if type(row["step"]) is not int:
                raise TypeError
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            advice = "move the file away, or name another --workdir"
            raise FileError(
                f"{one_line(str(path))} line {number}: is no row of a run; {advice}"
            ) from error
        rows.append(row)
    return rows


def cut_back(path: pathlib.Path, step: int) -> None:
    """Drops the rows after a step from a file of `append`, which are about to be written anew, and
    what a kill has torn.
    """
    if path.exists():
        jsonl.rewrite(
            path, [jsonl.dumps(_finite(row)) for row in read_rows(path) if row["step"] <= step]
        )


def check_extras(config: TrainConfig) -> None:
    """ImportError if a package is missing that the run would need later on; before anything is
    loaded.
    """
    for wanted, setting, package, remedy in (
        (
            config.logging.tensorboard,
            "logging.tensorboard=True",
            "tensorboardX",
            "pip install -e '.[logging]', or set --config.logging.tensorboard=false",
        ),
        (config.logging.wandb, "logging.wandb=PROJECT", "wandb", "pip install wandb"),
    ):
        if wanted:
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise ImportError(f"{setting} needs {package}: {remedy}") from error


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(
        *columns, TextColumn("loss {task.fields[loss]:.4f}"), disable=not sys.stdout.isatty()
    )


def _tensorboard(folder: pathlib.Path | None, config: TrainConfig, step: int) -> list:
    """[(write, close)] or nothing; close takes whether the run broke off. What TensorBoard has of
    steps after `step` is hidden.
    """
    if not config.logging.tensorboard:
        return []
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(step, values):
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return [(write, lambda broke_off: writer.close())]


def _wandb(workdir: pathlib.Path, config: TrainConfig) -> list:
    if not config.logging.wandb:
        return []
    import wandb

    # Kept beside the run, so that it goes on there too: runs are told apart by their directory, not
    # by the last part of its name.
    path = workdir / "wandb" / "id"
    if not path.is_file() or not path.read_text().strip():  # a kill may have left it empty
        path.parent.mkdir(exist_ok=True)
        safe_files.replace(path, uuid.uuid4().hex)
    # W&B uploads what it writes there
    folder = tempfile.gettempdir() if is_remote(workdir) else workdir
    run = wandb.init(
        project=config.logging.wandb,
        dir=folder,
        id=path.read_text(),
        name=str(workdir),
        resume="allow",
        config=to_dict(config),
    )
    return [
        (
            lambda step, values: run.log(values, step=step),
            lambda broke_off: run.finish(exit_code=int(broke_off)),
        )
    ]
