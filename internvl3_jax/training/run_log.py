"""Log of a run: log.jsonl, answers.jsonl, loss.png, and progress on the screen.

WORKDIR/log.jsonl       one row per logged step and one per evaluation; metrics.py has the names
WORKDIR/answers.jsonl   answers to questions of the evaluation data
WORKDIR/loss.png        the losses, drawn when the run ends
"""

import json
import math
import pathlib

import jax

from internvl3_jax.config import TrainConfig
from internvl3_jax.io import jsonl, remote_files, safe_files
from internvl3_jax.io.remote_files import is_remote
from internvl3_jax.io.safe_files import FileError
from internvl3_jax.io.terminal import one_line
from internvl3_jax.training import log_sinks
from internvl3_jax.training.console import Console
from internvl3_jax.training.loss_curve import draw_losses

LOG, ANSWERS, CURVE = "log.jsonl", "answers.jsonl", "loss.png"


class Log:
    """WORKDIR/log.jsonl and everything else that shows a row of it.

    With several processes one of them writes; each profiles its own devices.

    Attributes:
      console: The terminal.
    """

    def __init__(self, workdir: pathlib.Path, config: TrainConfig, step: int, writes: bool = True):
        """Opens the log and drops its rows after `step`, since those steps run again.

        Args:
          step: Number of steps that are done already.
          writes: Whether this process writes files and prints.
        """
        self.path, self.config, self.writes = workdir / LOG, config, writes
        self.console = Console(config.steps, step, writes)
        self.profiling = False
        self.mirrors: list[log_sinks.Mirror] = []
        self.sinks: list[log_sinks.Sink] = []
        if not writes:
            return
        for name in (LOG, ANSWERS):
            cut_back(workdir / name, step)
        if config.logging.tensorboard:
            folder = self._mirrored(workdir / "tensorboard")
            self.sinks.append(log_sinks.tensorboard(folder, step))
        if config.logging.wandb:
            self.sinks.append(log_sinks.weights_and_biases(workdir, config))

    def _mirrored(self, folder) -> pathlib.Path:
        """Returns the folder or, if it is in object storage, a local one that is copied there."""
        if not is_remote(folder):
            return folder
        self.mirrors.append(log_sinks.Mirror(folder))
        return self.mirrors[-1].local

    def __enter__(self):
        self.console.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self.console.__exit__(*exception)
        if self.profiling:
            self._stop_profile()
        failed = exception[0] is not None
        for sink in self.sinks:
            sink.close(failed)
        if not failed and self.writes and (rows := read_rows(self.path)):
            self._draw(rows)
        remote_files.flush()
        for mirror in self.mirrors:
            mirror.close()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes a row and shows it."""
        if not self.writes:
            return
        append(self.path, [{"step": step, **values}])
        for mirror in self.mirrors:
            mirror.copy_sometimes()
        for sink in self.sinks:
            sink.write(step, values)
        self.console.update(step, values)

    def profile(self, step: int) -> None:
        """Starts or stops the profile of `logging.profile_steps`; called before each step."""
        first, last = self.config.logging.profile_steps or (0, 0)
        if step == first:
            jax.profiler.start_trace(str(self._mirrored(self.path.parent / "profile")))
            self.profiling = True
        elif self.profiling and step == last + 1:
            self._stop_profile()

    def _stop_profile(self) -> None:
        jax.profiler.stop_trace()
        self.profiling = False

    def _draw(self, rows: list[dict]) -> None:
        """Writes loss.png. A failure is only printed: the numbers are in log.jsonl without it."""
        try:
            safe_files.replace(self.path.parent / CURVE, draw_losses(rows))
        except ImportError:
            self.console.say(
                f"{CURVE} is left out, since matplotlib is not installed (pip install matplotlib)"
            )
        except Exception as error:
            # Whatever another library's version or settings raise, the run has reached its end.
            self.console.say(f"{CURVE} is left out ({one_line(str(error))})")


# --- files of rows -------------------------------------------------------------------------------


def append(path: pathlib.Path, rows: list[dict]) -> None:
    """Adds rows to a JSONL file. A number that is not finite is written as null.

    Raises:
      OSError: The file cannot be written; the error names it.
    """
    jsonl.append(path, [jsonl.dumps(_finite(row)) for row in rows])


def _finite(row: dict) -> dict:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def read_rows(path: pathlib.Path) -> list[dict]:
    """Returns the rows of a file of `append`, each with its "step".

    A last line that a kill has torn is not a row, and a file that does not exist has none.

    Raises:
      FileError: A line is not one that a run writes; the error names it.
    """
    rows = []
    for number, line in enumerate(jsonl.whole_lines(path) if path.exists() else [], 1):
        try:
            row = json.loads(line, parse_constant=_refuse)  # NaN is written as null
            if type(row["step"]) is not int:
                raise TypeError
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            advice = "move the file away, or name another --workdir"
            raise FileError(
                f"{one_line(str(path))} line {number}: is not a row of a run; {advice}"
            ) from error
        rows.append(row)
    return rows


def _refuse(constant: str):
    raise ValueError(f"{constant} is not JSON")


def cut_back(path: pathlib.Path, step: int) -> None:
    """Drops the rows after a step from a file of `append`, and what a kill has torn."""
    if path.exists():
        rows = [row for row in read_rows(path) if row["step"] <= step]
        jsonl.rewrite(path, [jsonl.dumps(_finite(row)) for row in rows])
