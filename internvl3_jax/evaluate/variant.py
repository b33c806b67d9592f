"""One run of a task: its V2PE step, number of frames, reasoning, and best of how many."""

import dataclasses
import pathlib
from collections.abc import Sequence

from internvl3_jax.evaluate.task import Task

SMALL = ("1B", "2B")  # the card's runs of these sizes did not ask for reasoning


@dataclasses.dataclass(frozen=True)
class Variant:
    """A run of a task.

    Attributes:
      delta: V2PE step such as "1/4"; None: the checkpoint's own.
      frames: of a video; None for images.
      reasoning: whether the prompt asks for reasoning.
      best_of: number of answers that a critic chooses among; None: one answer.
      most_tokens: of an answer, where it is less than the task's limit; None: the task's.
    """

    task: Task
    delta: str | None = None
    frames: int | None = None
    reasoning: bool = False
    best_of: int | None = None
    most_tokens: int | None = None

    @property
    def name(self) -> str:
        """Returns the name of its files, such as mlvu.16_frames.delta_1_4."""
        parts = [self.task.name]
        parts += [f"{self.frames}_frames"] if self.frames else []
        parts += ["reasoning"] if self.reasoning else []
        parts += [f"best_of_{self.best_of}"] if self.best_of else []
        parts += [f"delta_{self.delta.replace('/', '_')}"] if self.delta else []
        return ".".join(parts)

    def options(self) -> dict:
        """Returns the options of `Chat` that the program's protocol fixes."""
        tiles = {
            "kit": {"tiles": "per image", "max_total_tiles": 64, "max_tiles": self.task.max_tiles},
            "own": {"tiles": "shared", "max_total_tiles": 0, "max_tiles": self.task.max_tiles},
            "model": {},
        }
        tokens = min(self.task.max_new_tokens, self.most_tokens or self.task.max_new_tokens)
        options = {"max_new_tokens": tokens} | tiles[self.task.share]
        return options | ({"delta": self.delta} if self.delta else {})

    def settings(self) -> dict:
        """Returns what the answers depend on besides the model and the data."""
        return self.options() | {
            "prompt": self.task.prompt,
            "frames": self.frames,
            "frame_rule": self.task.frame_rule,
            "reasoning": self.reasoning,
            "best_of": self.best_of,
        }


def variants(
    tasks: Sequence[Task],
    deltas: Sequence[str | None] = (None,),
    frames: Sequence[int] = (),
    reasoning: str = "auto",
    size: str | None = None,
    best_of: int | None = None,
    most_tokens: int | None = None,
) -> list[Variant]:
    """Returns the runs of tasks, one for each delta and number of frames.

    Args:
      frames: in place of the tasks' own numbers of frames.
      reasoning: "on", "off", or "auto": as in the card's runs, which asked models above 2B for
        reasoning in the reasoning tasks; and always with `best_of`.
      size: of the card; None is treated as a large one.
    """
    found = []
    for task in tasks:
        asked = {"on": True, "off": False}.get(reasoning, task.reasons and size not in SMALL)
        asked = (asked or best_of is not None) and task.reasons
        counts = (tuple(frames) or task.frames) if task.frames else (None,)
        found += [
            Variant(task, delta, count, asked, best_of, most_tokens)
            for delta in deltas
            for count in counts
        ]
    return found


def answers_path(output: pathlib.Path, variant: Variant) -> pathlib.Path:
    """Returns the path of a run's answers."""
    return output / "answers" / f"{variant.name}.jsonl"
