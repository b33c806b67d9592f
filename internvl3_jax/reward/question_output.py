"""The output of a program that makes rows from questions, and which questions are finished.

    OUTPUT        the rows, training data for train.py
    OUTPUT.done   a line per finished question: its id and fingerprint, the number of its rows, and
                  counts; or, in place of the counts, the error for which it has no rows

A killed run resumes after the last finished question.
"""

import contextlib
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from internvl3_jax.inference.answerer import with_name
from internvl3_jax.inference.resumable import Rows, read_rows
from internvl3_jax.io import jsonl
from internvl3_jax.io.terminal import one_line
from internvl3_jax.reward.questions import Question


class Result(NamedTuple):
    """Rows that were made of one question.

    Attributes:
      question: that was asked.
      rows: of the output.
      counts: numbers for OUTPUT.done.
      error: why there are no rows; "" if the question could be asked.
    """

    question: Question
    rows: Sequence[dict] = ()
    counts: dict[str, int] | None = None
    error: str = ""


def done_path(output: pathlib.Path) -> pathlib.Path:
    return output.with_name(f"{output.name}.done")


def results_or_errors(
    batch: Sequence[Question],
    make: Callable[[Sequence[Question]], list[Result]],
    on_error: str,
) -> list[Result]:
    """Makes the results of a batch; after an error one question at a time, to learn which it is.

    Args:
      on_error: "note" gives a question that cannot be asked an error in place of rows; "stop"
        raises ValueError.
    """
    try:
        return make(batch)
    except (ValueError, OSError) as error:
        if len(batch) > 1:
            return [
                result
                for question in batch
                for result in results_or_errors([question], make, on_error)
            ]
        text = with_name(batch[0].where, error)
        if on_error == "stop":
            raise ValueError(text) from error
        return [Result(batch[0], error=one_line(text))]


class QuestionOutput:
    """A context manager that appends results.

    Args:
      path: the output.
      questions: all questions of the run, in their order.
      fingerprint: of a question (see `questions.fingerprint`).
      row_keys: keys that every row has.
      program: whose output it is, for messages.

    Attributes:
      finished: a dict per finished question, as in OUTPUT.done.

    Raises:
      ValueError: the files have lines that this program does not write, or rows of other questions,
        of another checkpoint or of other settings. Nothing is changed.
    """

    def __init__(
        self,
        path: pathlib.Path,
        questions: Sequence[Question],
        fingerprint: Callable[[Question], str],
        row_keys: Sequence[str],
        program: str,
    ):
        self.path, self.done, self.program = path, done_path(path), program
        self._fingerprint = fingerprint
        self._rows, self._done = self._read(questions, row_keys)
        self.finished = self._done.rows
        for line, question in zip(self.finished, questions, strict=False):
            # An image that could not be read may have been replaced meanwhile.
            same = line["fingerprint"] == fingerprint(question) or "error" in line
            if not same or line["id"] != question.id:
                raise ValueError(
                    f"{path} has rows of other questions or images, of another --checkpoint or of "
                    f"other settings ({question.where or question.id}); move it and {self.done} "
                    "away or name another --output"
                )
        self._stack = contextlib.ExitStack()

    def _read(self, questions: Sequence[Question], row_keys: Sequence[str]) -> tuple[Rows, Rows]:
        """Returns the complete lines of both files; the rows without those of unfinished
        questions.
        """
        check_own(self.path, row_keys, self.program)
        if _is_new(self.path):
            return Rows(self.path, [], [], b""), Rows(self.done, [], [], b"")
        rows, done = read_rows(self.path), read_rows(self.done)
        count = sum(line["rows"] for line in done.rows)
        if len(done.rows) > len(questions) or count > len(rows.rows):
            raise ValueError(
                f"{self.path} has {len(rows.rows)} rows; {self.done} says {count} of "
                f"{len(done.rows)} questions, and {len(questions)} are asked; move both away or "
                "name another --output"
            )
        return Rows(self.path, rows.rows[:count], rows.sizes[:count], rows.tail), done

    def __enter__(self) -> "QuestionOutput":
        self._rows.warn_of_tail()
        self._done.warn_of_tail()
        self._file = self._stack.enter_context(jsonl.Appender(self.path, sum(self._rows.sizes)))
        self._done_file = self._stack.enter_context(
            jsonl.Appender(self.done, sum(self._done.sizes))
        )
        return self

    def __exit__(self, *exception) -> None:
        self._stack.__exit__(*exception)

    def add(self, results: Sequence[Result]) -> None:
        """Appends results; they are on the disk when this returns."""
        # Rows first: rows of a question that is not finished are cut off when the run resumes.
        self._file.write([jsonl.dumps(row) for result in results for row in result.rows])
        lines = [self._line(result) for result in results]
        self._done_file.write([jsonl.dumps(line) for line in lines])
        self.finished += lines

    def correct(self, results: dict[int, Result]) -> None:
        """Replaces lines of OUTPUT.done that have an error, by index, and appends their rows."""
        self._file.write([jsonl.dumps(row) for result in results.values() for row in result.rows])
        for index, result in results.items():
            self.finished[index] = self._line(result)
        lines = [jsonl.dumps(line) for line in self.finished]
        self._done_file.__exit__(None, None, None)
        jsonl.rewrite(self.done, lines)
        self._done_file.keep = sum(len(line.encode("utf-8")) + 1 for line in lines)
        self._done_file.__enter__()

    def _line(self, result: Result) -> dict:
        line = {
            "id": result.question.id,
            "fingerprint": self._fingerprint(result.question),
            "rows": len(result.rows),
        }
        return line | ({"error": result.error} if result.error else result.counts or {})


def check_own(path: pathlib.Path, row_keys: Sequence[str], program: str) -> None:
    """Checks the form of an output and of its OUTPUT.done, if they exist, without the questions.

    Raises:
      ValueError: one of them is missing, or has lines that `program` does not write.
    """
    if _is_new(path):
        return
    done = done_path(path)
    try:
        rows, finished = read_rows(path), read_rows(done)
        own = all(set(row_keys) <= row.keys() for row in rows.rows)
        own &= all(_is_done_line(line) for line in finished.rows)
        own &= rows.tail_is_torn() and finished.tail_is_torn()
        reason = ""
    except (OSError, ValueError) as error:
        own, reason = False, f" ({error})"
    if not own:
        raise ValueError(
            f"{path} and {done} are not both of {program}{reason}; name another --output"
        )


def _is_new(path: pathlib.Path) -> bool:
    """Returns whether nothing was written yet; a kill may have left an empty OUTPUT alone."""
    empty = not path.exists() or (path.is_file() and not os.path.getsize(path))
    return empty and not done_path(path).exists()


def _is_done_line(line: dict) -> bool:
    return (
        "id" in line
        and isinstance(line.get("fingerprint"), str)
        and isinstance(line.get("rows"), int)
        and not isinstance(line.get("rows"), bool)
        and line["rows"] >= 0
    )


def read_done(output: pathlib.Path) -> list[dict]:
    """Returns the lines of OUTPUT.done."""
    return read_rows(done_path(output)).rows


def make_rows(
    output: QuestionOutput,
    questions: Sequence[Question],
    batches: Callable[[Sequence[Question]], list[list[Question]]],
    make: Callable[[Sequence[Question]], list[Result]],
    *,
    on_error: str = "note",
    retry_errors: bool = False,
    description: str = "",
) -> None:
    """Makes the rows of the questions that are not finished; each batch is written at once.

    Args:
      batches: cuts questions into batches.
      make: makes the results of a batch.
      on_error: as of `results_or_errors`.
      retry_errors: ask the questions again that have an error in OUTPUT.done.
      description: of the progress bar.
    """
    from rich.progress import track

    start = len(output.finished)
    if start:
        print(
            f"{output.path}: {start} of {len(questions)} questions are finished; resuming",
            file=sys.stderr,
        )
    with output:
        failed = [index for index, line in enumerate(output.finished) if "error" in line]
        for index in failed if retry_errors else ():
            (result,) = results_or_errors([questions[index]], make, on_error)
            output.correct({index: result})
        if retry_errors:
            print(f"{len(failed)} questions with an error were asked again", file=sys.stderr)
        show = sys.stderr.isatty()
        for batch in track(batches(questions[start:]), description=description, disable=not show):
            output.add(results_or_errors(batch, make, on_error))


def failures(output: pathlib.Path) -> str:
    """Returns how many questions have an error, and the first one; "" if none has."""
    lines = read_done(output)
    errors = [line["error"] for line in lines if "error" in line]
    if not errors:
        return ""
    return (
        f"{len(errors)} of {len(lines)} questions could not be asked; {done_path(output)} says why "
        f'in "error", and --retry_errors asks them again. The first: {errors[0]}'
    )
