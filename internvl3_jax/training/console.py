"""Progress of a run for people: a line per logged step or, in a terminal, a bar with that line.

    step 400/1700 23.5% | ETA 6m29s | loss 0.1526 | eval loss 0.2011 (step 400) | lr 1.79e-03 |
    4,921 tokens/s | 0.295 s/step | MFU 41.2%

Under MPO the line also has the mean reward margin and the accuracy of the chosen answers.
"""

import sys
import time
import warnings

import rich.console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

# A smaller share of the time that steps wait for data is not worth a column.
_SLOW_INPUT = 0.05


class Console:
    """Prints the progress of one process, or nothing.

    Attributes:
      steps: Last step of the run.
      enabled: Whether this process prints.
    """

    def __init__(self, steps: int, step: int, enabled: bool = True):
        """Prepares the bar. step: number of steps that are done already."""
        self.steps, self.enabled = steps, enabled
        self.started_at, self.first_step = time.perf_counter(), step
        self.eval_values: dict[str, float] = {}
        self.eval_step = 0
        self.bar = _Bar(disable=not (enabled and sys.stdout.isatty()))
        self.task = self.bar.add_task("training", total=steps, completed=step)

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self.bar.stop()

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if not self.enabled:
            return
        if self.bar.disable:
            print(text, flush=True)
        else:
            self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def start_clock(self) -> None:
        """Starts the clock of the ETA; called when the first step is compiled."""
        self.started_at = time.perf_counter()

    def update(self, step: int, values: dict[str, float]) -> None:
        """Shows a row of the log; an evaluation gets a line of its own, and a column from then on.

        Args:
          step: The step that was logged.
          values: Names as in log.jsonl.
        """
        if not self.enabled:
            return
        if "eval_loss" in values:
            self.eval_values, self.eval_step = values, step
            columns = [f"eval loss {values['eval_loss']:.4g}", *_reward_columns(values, "eval_")]
            self.say(f"step {step}/{self.steps} | {' | '.join(columns)}")
        if "loss" not in values:
            return
        line = " | ".join(self._columns(step, values))
        if self.bar.disable:
            print(line, flush=True)
        self.bar.line = line
        self.bar.update(self.task, completed=step)

    def _columns(self, step: int, values: dict[str, float]) -> list[str]:
        columns = [f"step {step}/{self.steps} {100 * step / self.steps:.1f}%"]
        done = step - self.first_step
        if done and step < self.steps:
            per_step = (time.perf_counter() - self.started_at) / done
            columns.append(f"ETA {duration(per_step * (self.steps - step))}")
        columns += [f"loss {values['loss']:.4g}", *_reward_columns(values)]
        if self.eval_values:
            columns.append(f"eval loss {self.eval_values['eval_loss']:.4g} (step {self.eval_step})")
        formats = {
            "learning_rate": "lr {:.2e}",
            "tokens_per_second": "{:,.0f} tokens/s",
            "step_seconds": "{:.3g} s/step",
            "mfu": "MFU {:.1%}",
        }
        columns += [form.format(values[name]) for name, form in formats.items() if name in values]
        if values.get("input_wait", 0.0) >= _SLOW_INPUT:
            columns.append(f"waiting for data {values['input_wait']:.0%}")
        if "skipped" in values:
            columns.append(f"{values['skipped']:,} samples skipped")
        return columns


def shorten_warnings() -> None:
    """Shows the warnings of this repository as one line, without a file and line of code."""
    default = warnings.formatwarning

    def format_warning(message, category, filename, lineno, line=None):
        if category is UserWarning:
            return f"warning: {message}\n"
        return default(message, category, filename, lineno, line)

    warnings.formatwarning = format_warning


class _Bar(Progress):
    """rich's progress bar with a line of text below, which wraps in a narrow terminal."""

    line = ""

    def __init__(self, **options):
        percent = TextColumn("{task.percentage:>5.1f}%")
        columns = TextColumn("{task.description}"), BarColumn(None), percent
        # rich's own console keeps the width that the terminal had when it was first used.
        super().__init__(*columns, console=rich.console.Console(), **options)

    def get_renderables(self):
        yield from super().get_renderables()
        if self.line:
            yield Text(self.line)


def duration(seconds: float) -> str:
    """Returns a time with its two largest units, such as "45s", "6m29s", "3h07m" or "2d04h"."""
    seconds = round(seconds)
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86_400
    if days:
        return f"{days}d{hours % 24:02}h"
    if hours:
        return f"{hours}h{minutes % 60:02}m"
    return f"{minutes}m{seconds % 60:02}s" if minutes else f"{seconds}s"


def _reward_columns(values: dict[str, float], prefix: str = "") -> list[str]:
    """Returns MPO's columns: margin of the rewards, and how often the chosen answer's is higher."""
    name = prefix.replace("_", " ")
    formats = {"reward_margin": "margin {:.3g}", "reward_accuracy": "accuracy {:.1%}"}
    return [
        f"{name}{form.format(values[prefix + key])}"
        for key, form in formats.items()
        if prefix + key in values
    ]
