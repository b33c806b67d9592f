"""Tasks, rows of their data, and marks of answers."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

EXACTNESS = {
    "rule": "the card's rule, without a judge",
    "reasoning": "the card's prompt; a rule reads the final answer where a judge did",
    "server": "labels are hidden; a file for the benchmark's server is written",
    "judge": "a judge gives the marks; a file for VLMEvalKit or the official program is written",
}


@dataclasses.dataclass(frozen=True)
class Task:
    """One benchmark of the card, as data. Names are keys of the tables of the modules named here.

    Attributes:
      name: as --tasks calls it.
      columns: of the card, that its metric gives.
      group: table of the card.
      files: below --data; each is read by the loader.
      loader: of loaders/.
      prompt: of prompts.py.
      scorer: of marks.py; "none" writes a file for others to score.
      metric: of metrics.py.
      exact: key of EXACTNESS.
      program: whose protocol it is: "own", "kit", or "official".
      max_tiles: of an image.
      share: how several images share it: "kit", "own", or "model": as the checkpoint says, which
        also has the number of tiles.
      max_new_tokens: longest answer.
      frames: numbers of frames; the best one is the card's. Empty: no video.
      frame_rule: of frames.py.
      reasons: whether the card's run asked for reasoning (for models above 2B).
      file_name: of the file that is written for a server or judge.
      file_form: of submissions.py.
      arguments: of the loader, by name.
      note: what is open or differs.
    """

    name: str
    columns: tuple[str, ...]
    group: str
    files: tuple[str, ...]
    loader: str
    prompt: str
    scorer: str = "none"
    metric: str = "mean"
    exact: str = "rule"
    program: str = "kit"
    max_tiles: int = 6
    share: str = "kit"
    max_new_tokens: int = 4096
    frames: tuple[int, ...] = ()
    frame_rule: str = ""
    reasons: bool = False
    file_name: str = ""
    file_form: str = ""
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""


@dataclasses.dataclass
class Row:
    """One question.

    Attributes:
      id: unique in the task.
      where: "FILE row N (index X)", for messages.
      question: as the file has it.
      answer: the reference, in the form that the scorer takes; None if labels are hidden.
      options: letter -> text, empty options left out.
      values: other columns or keys of the file.
      load_images: returns the images, each a path, bytes or PIL image.
      check: raises FileError if a file of the row is missing.
      video: path of a video, or None.
      clip: [start, end] in seconds, or for the frame rule "clues" several of them.
      changes: options of `Chat` for this question alone.
    """

    id: str
    where: str
    question: str
    answer: Any = None
    options: dict[str, str] = dataclasses.field(default_factory=dict)
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    load_images: Callable[[], list] = list
    check: Callable[[], object] | None = None
    video: str | None = None
    clip: Any = None
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """The rows of a task, and the files that they come from.

    Attributes:
      imageless: number of rows that are left out because they have no image.
    """

    rows: list[Row]
    files: tuple[str, ...]
    imageless: int = 0


@dataclasses.dataclass(frozen=True)
class Mark:
    """The mark of one answer.

    Attributes:
      value: usually 0 or 1; None leaves the row out of the mean.
      read: what was read of the answer, for the report.
      readable: whether the rule could read it.
      values: further numbers of a scorer with several, such as VCR.
    """

    value: float | None
    read: Any = None
    readable: bool = True
    values: tuple = ()
