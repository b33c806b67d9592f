"""Computes the card's numbers from answers: one result for each run of a task."""

import collections
import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence

from internvl3_jax.evaluate import card, marks, metrics
from internvl3_jax.evaluate.task import Loaded, Mark
from internvl3_jax.evaluate.task_table import KNOWN_MD5
from internvl3_jax.evaluate.variant import Variant


@dataclasses.dataclass
class Result:
    """Scores of a run.

    Attributes:
      scores: name -> number on the card's scale; columns first, then subtotals.
      answered, rows: number of answers and of the data's rows.
      unreadable: share of answers that the rule could not read.
      cut: share of answers that max_new_tokens cut off.
      files: name -> (MD5, whether it is the one that VLMEvalKit states; None if it states none).
      counts: column -> number of answers, of a task whose rows name the columns; else empty.
      problem: why there is no score; "" if there is one.
      written: name of the file for a server or judge; "" if none.
    """

    variant: Variant
    scores: dict[str, float]
    answered: int
    rows: int
    unreadable: float
    cut: float
    files: dict[str, tuple[str, bool | None]]
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    problem: str = ""
    written: str = ""
    marks: list[Mark] = dataclasses.field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Returns whether all rows were answered."""
        return self.answered == self.rows


def score(
    variant: Variant,
    loaded: Loaded,
    answers: Sequence[dict],
    files: dict[str, tuple[str, bool | None]],
) -> Result:
    """Returns the result of a run.

    Args:
      answers: of the first rows, in their order.
      files: of `digests`.
    """
    task, rows = variant.task, loaded.rows[: len(answers)]
    texts = [answer["text"] for answer in answers]
    found = [marks.mark(task.scorer, row, text) for row, text in zip(rows, texts, strict=True)]
    scores, problem = {}, ""
    if task.scorer == "none":
        problem = "scored by a server" if task.exact == "server" else "scored by a judge"
    else:
        try:
            scores = metrics.METRICS[task.metric](task, rows, texts, found)
        except (ValueError, IndexError) as error:
            problem = f"no score: {error}"
    count, counts = max(1, len(answers)), {}
    if task.metric == "by_task":
        counts = dict(collections.Counter(row.values["task"] for row in rows))
    return Result(
        variant,
        scores,
        len(answers),
        len(loaded.rows),
        sum(not mark.readable for mark in found) / count,
        sum(answer.get("finish") == "length" for answer in answers) / count,
        files,
        counts,
        problem,
        marks=found,
    )


def digests(files: Sequence[str]) -> dict[str, tuple[str, bool | None]]:
    """Returns name -> (MD5, whether it is the known one) of files."""
    found = {}
    for path in map(pathlib.Path, files):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "md5").hexdigest()
        known = KNOWN_MD5.get(path.name)
        found[path.name] = digest, None if known is None else known == digest
    return found


def best_scores(results: Sequence[Result]) -> dict[str, float]:
    """Returns column -> the best number among runs with different numbers of frames.

    Only runs that answered every row count.
    """
    best: dict[str, float] = {}
    for result in results:
        for column in result.variant.task.columns:
            value = result.scores.get(column)
            if value is not None and result.whole:
                best[column] = max(value, best.get(column, value))
    return best


def group_scores(scores: dict[str, float]) -> dict[str, float]:
    """Returns group -> Overall, for the groups of the card of which all columns are there."""
    overall = {name: group.overall(scores) for name, group in card.GROUPS.items()}
    return {name: value for name, value in overall.items() if value is not None}
