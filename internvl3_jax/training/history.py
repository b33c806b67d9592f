"""History of a run (seconds, losses, base) and the message at its end."""

import dataclasses
import math
import pathlib

from internvl3_jax.checkpoints import steps
from internvl3_jax.config import TrainConfig, from_dict
from internvl3_jax.io import jsonl, strict_json
from internvl3_jax.io.command_line import message
from internvl3_jax.training.console import duration
from internvl3_jax.training.run_log import LOG, read_rows


@dataclasses.dataclass
class RunHistory:
    """Numbers and texts that are saved with every step.

    Attributes:
      seconds: Time trained so far, over all starts of the run.
      first_length: Number of steps that the run was begun with, before it was lengthened.
      best: Lowest eval loss so far.
      best_step: Step of that loss; 0 if there was no evaluation.
      eval_data: Evaluation data that `best` is of; see `eval_identity`.
      frozen: Hash of the frozen parameters.
      base: `adapters.base_hash` of a LoRA run's base.
      base_path: Checkpoint of that base.
    """

    seconds: float = 0.0
    first_length: int = 0
    best: float = float("inf")
    best_step: int = 0
    eval_data: str = ""
    frozen: str = ""
    base: str = ""
    base_path: str = ""

    def saved(self) -> dict:
        """Returns JSON values, which have no infinity."""
        return dataclasses.asdict(self) | {"best": self.best if math.isfinite(self.best) else None}

    @classmethod
    def of_saved(cls, values: dict) -> "RunHistory":
        """Returns the history from `saved`.

        Raises:
          ConfigError: A value is of a wrong type; the error names it.
        """
        known = {name: value for name, value in values.items() if (name, value) != ("best", None)}
        return from_dict(cls, known, "past")

    def set_eval_data(self, eval_data: str) -> None:
        """Sets what the coming evaluations are of; losses of other data are forgotten."""
        if self.eval_data != eval_data:
            self.best, self.best_step, self.eval_data = float("inf"), 0, eval_data

    def note_eval(self, step: int, loss: float) -> None:
        """Records an evaluation."""
        if loss < self.best:
            self.best, self.best_step = loss, step


def eval_identity(config: TrainConfig) -> str:
    """Returns what eval losses must share to be compared: the data and how many batches of them."""
    return f"{config.eval.source}, {config.eval.batches} batches"


# --- the end of a run ----------------------------------------------------------------------------


def is_finished(config: TrainConfig, step: int | None) -> bool:
    """Returns whether the newest complete step is the run's last."""
    return step == config.steps


def farewell(config: TrainConfig, workdir: pathlib.Path) -> str:
    """Returns what to say of a finished run: its time, its best step, and what to do next."""
    training = strict_json.Object(
        steps.read_training(workdir, config.steps),
        str(workdir / "checkpoints" / str(config.steps) / steps.TRAINING),
    )
    history = RunHistory.of_saved(training.get("past", dict, {}))
    text = f"{workdir} is finished: step {config.steps} of {config.steps}"
    if history.seconds:
        text += f", trained for {duration(history.seconds)}"

    # The best step is proposed, if it was kept.
    chosen = workdir
    if config.eval.source and history.best_step:
        text += f"; the lowest eval loss, {history.best:.4g}, is that of step {history.best_step}"
        best = workdir / "checkpoints" / str(history.best_step)
        if history.best_step != config.steps and best.is_dir():
            chosen = best
        elif history.best_step != config.steps:
            text += " (not kept: checkpoint.keep_best is off)"
    return (
        f"{text}\n"
        f"ask it:    python infer.py --checkpoint {chosen}\n"
        f"export it: python -m convert {chosen} DIRECTORY --to hf{_log_warning(config, workdir)}"
    )


def _log_warning(config: TrainConfig, workdir: pathlib.Path) -> str:
    """Returns a line about a log that is incomplete, or "". A finished run does not rewrite it."""
    path = workdir / LOG
    try:
        reached = max((row["step"] for row in read_rows(path)), default=0)
        if reached >= config.steps and not jsonl.torn(path):
            return ""
        problem = f"is damaged or incomplete: its last row is of step {reached} of {config.steps}"
    except (ValueError, OSError) as error:
        problem = f"cannot be read ({message(error)})"
    return f"\nwarning: {path} {problem}; the checkpoints are complete"
