"""What a run leaves for people: log.jsonl, the loss curve, and the report of its held-out scores."""

import json
import pathlib
import platform

from internvl3_jax.config import TrainConfig


class Log:
    """WORKDIR/log.jsonl, one row per logged step. Opened at a step, it drops the rows after it, which are about to be written anew."""

    def __init__(self, workdir: pathlib.Path, step: int):
        self.path = workdir / "log.jsonl"
        rows = self.rows() if self.path.exists() else []
        self.path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))

    def write(self, step: int, values: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}")]

    def draw(self) -> None:
        """WORKDIR/loss.png"""
        from matplotlib.figure import Figure  # only here: the numbers are in log.jsonl without it

        rows = self.rows()
        figure = Figure(figsize=(7, 3.5), layout="constrained")
        axes = figure.subplots()
        axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], linewidth=1)
        axes.set(xlabel="step", ylabel="training loss", yscale="log")
        axes.grid(alpha=0.3, which="both")
        figure.savefig(self.path.parent / "loss.png", dpi=120)


def write(workdir: pathlib.Path, config: TrainConfig, scores: dict[str, float]) -> None:
    """WORKDIR/report.json: scores on held-out handwriting, steps, seconds, machine and versions."""
    import jax

    last = Log(workdir, config.steps).rows()[-1]
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
