"""What a run leaves for people: log.jsonl, the loss curve, and the report of its held-out scores."""

import dataclasses
import json
import pathlib
import platform
import sys
import uuid

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from internvl3_jax.config import TrainConfig, to_dict


class Log:
    """WORKDIR/log.jsonl, one row per logged step; also the terminal and, if the configuration asks, TensorBoard, W&B and a profile.

    Opened at a step, it drops the rows after it, which are about to be written anew. Of several processes one writes; every one of them
    profiles its devices.
    """

    def __init__(self, workdir: pathlib.Path, config: TrainConfig, step: int, writes: bool = True):
        self.writes = writes
        if not writes:
            config = dataclasses.replace(config, tensorboard=False, wandb="")
        self.path, self.config = workdir / "log.jsonl", config
        rows = self.rows() if self.path.exists() else []
        if writes:
            self.path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
        self.progress = _progress()
        self.task = self.progress.add_task("training", total=config.steps, completed=step, loss=float("nan"))
        self.sinks = [*_tensorboard(workdir, config), *_wandb(workdir, config)]
        self.profiling = False

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

    def write(self, step: int, values: dict[str, float]) -> None:
        if not self.writes:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for write, _ in self.sinks:
            write(step, values)
        if "loss" in values:
            self.progress.update(self.task, completed=step, loss=values["loss"])
        if not sys.stdout.isatty():
            shown = ("loss", "held_out", "tokens_per_second", "tiles_per_second", "input_wait", "mfu", "seconds")
            text = " ".join(f"{name} {values[name]:.4g}" for name in shown if name in values)
            print(f"step {step}/{self.config.steps} {text}", flush=True)

    def profile(self, step: int) -> None:
        """Starts or ends the profile of `profile_steps` before a step."""
        import jax

        first, last = self.config.profile_steps or (0, 0)
        if step == first:
            jax.profiler.start_trace(str(self.path.parent / "profile"))
            self.profiling = True
        elif self.profiling and step == last + 1:
            self._stop_profile()

    def _stop_profile(self) -> None:
        import jax

        jax.profiler.stop_trace()
        self.profiling = False

    def rows(self) -> list[dict]:
        return _rows(self.path)

    def draw(self) -> None:
        """WORKDIR/loss.png"""
        from matplotlib.figure import Figure  # only here: the numbers are in log.jsonl without it

        rows = [row for row in self.rows() if "loss" in row]
        figure = Figure(figsize=(7, 3.5), layout="constrained")
        axes = figure.subplots()
        axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], linewidth=1, label="training")
        if held_out := [row for row in self.rows() if "held_out" in row]:
            axes.plot([row["step"] for row in held_out], [row["held_out"] for row in held_out], marker=".", label="held out")
            axes.legend()
        axes.set(xlabel="step", ylabel="loss", yscale="log")
        axes.grid(alpha=0.3, which="both")
        figure.savefig(self.path.parent / "loss.png", dpi=120)


def _rows(path: pathlib.Path) -> list[dict]:
    # A line that a killed run left unfinished does not end with a brace.
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("loss {task.fields[loss]:.4f}"), disable=not sys.stdout.isatty())


def _tensorboard(workdir: pathlib.Path, config: TrainConfig) -> list:
    """[(write, close)] or nothing; close takes whether the run broke off."""
    if not config.tensorboard:
        return []
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard=True needs tensorboardX: pip install 'internvl3-jax[logging]'") from error
    writer = SummaryWriter(str(workdir / "tensorboard"))

    def write(step, values):
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return [(write, lambda broke_off: writer.close())]


def _wandb(workdir: pathlib.Path, config: TrainConfig) -> list:
    if not config.wandb:
        return []
    try:
        import wandb
    except ImportError as error:
        raise ImportError("wandb=PROJECT needs wandb: pip install wandb") from error
    # Kept beside the run, so that it goes on there too: runs are told apart by their directory, not by the last part of its name.
    path = workdir / "wandb" / "id"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        path.write_text(uuid.uuid4().hex)
    run = wandb.init(
        project=config.wandb, dir=workdir, id=path.read_text(), name=str(workdir), resume="allow", config=to_dict(config)
    )
    return [(lambda step, values: run.log(values, step=step), lambda broke_off: run.finish(exit_code=int(broke_off)))]


def write(workdir: pathlib.Path, config: TrainConfig, scores: dict[str, float]) -> None:
    """WORKDIR/report.json: scores on held-out handwriting, steps, seconds, machine and versions."""
    import jax

    last = [row for row in _rows(workdir / "log.jsonl") if "loss" in row][-1]
    report = {
        "held_out": {name: round(value, 4) for name, value in scores.items()},
        "questions_per_task": config.evaluate_per_task,
        "steps": config.steps,
        "last_loss": last["loss"],
        "training_seconds": round(last["seconds"], 1),
        "machine": f"{platform.machine()}, {jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }
    (workdir / "report.json").write_text(json.dumps(report, indent=1) + "\n")


def table(scores: dict[str, float]) -> str:
    return "\n".join(["held-out handwriting"] + [f"  {name:<8} {100 * value:6.2f} %" for name, value in scores.items()])
