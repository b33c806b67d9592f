"""Answers a file of requests: several at once, resumed after a kill. A request that cannot be answered
gets an "error" in place of its answer.
"""

import sys
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from internvl3_jax.checkpoints.param_hash import tree_hash
from internvl3_jax.checkpoints.storage import by_path
from internvl3_jax.config import to_dict
from internvl3_jax.inference.answer import Stopwatch
from internvl3_jax.inference.answer_file import AnswerFile
from internvl3_jax.inference.answerer import Answerer, with_name
from internvl3_jax.inference.requests import name_of
from internvl3_jax.io.terminal import printable

ON_ERROR = ("note", "stop")


def weights_hash(checkpoint, adapter: str | None = None) -> str:
    """Returns a hash of the parameters that answer; it does not depend on how they are sharded."""
    base = tree_hash(by_path(checkpoint.params))
    if adapter is None:
        return base
    chosen = checkpoint.adapters[adapter]
    return f"{base}+{tree_hash(by_path({'lora': chosen.lora, 'whole': chosen.whole}))}"


def model_settings(checkpoint, adapter: str | None) -> dict:
    """Returns what answers depend on besides questions and options: parameters, dtype, and the
    rules for tiles and prompts.
    """
    processor = {
        f"processor.{name}": value for name, value in to_dict(checkpoint.processor).items()
    }
    return {
        "weights": weights_hash(checkpoint, adapter),
        "dtype": checkpoint.model.dtype.name,
    } | processor


def answer_file(
    answerer: Answerer,
    requests: Sequence[dict],
    output: AnswerFile | None,
    settings: dict,
    *,
    retry_errors: bool = False,
    stats: bool = False,
) -> None:
    """Answers the requests that the output does not hold yet, and reports on stderr.

    Args:
      output: None on all hosts but the first.
      settings: what the answers depend on.
      retry_errors: ask the requests again that have an error in the output.
      stats: print the totals of this run.

    Raises:
      FileError: the output holds other answers.
      ValueError: at the end, if any row of the output has an error.
    """
    # Find out where an earlier run stopped.
    if output is not None:
        output.start(requests, settings)
    answered = len(output.answers) if output is not None else 0
    if answerer.hosts:
        answered = int(multihost_utils.broadcast_one_to_all(np.int32(answered)))
    if answered and output is not None:
        note(f"{output.path} holds {answered} of {len(requests)} answers; resuming with the rest")
        if any("run" not in row for row in output.answers):
            note(
                f"warning: {output.path} does not say how some of them were made; they are taken "
                "as made with these settings"
            )

    # Answer.
    watch = Stopwatch(answerer.chat.generator.compile_clock)
    if retry_errors:
        note(f"{ask_again(answerer, requests, output)} requests with an error were asked again")
    answer_from(answerer, requests, output, answered)

    # Report.
    if output is None:
        return
    if stats:
        watch.stop()
        note(totals(output.answers[answered:], watch.seconds, watch.compile_seconds))
    note(f"{len(requests) - answered} answers written to {output.path}")
    if failed := failures(requests, output.answers):
        raise ValueError(f"{output.path}: {failed}")


def ask_again(answerer: Answerer, requests: Sequence[dict], output: AnswerFile) -> int:
    """Asks the requests again that have an error in the output, and replaces their rows.

    Returns:
      how many requests that were.
    """
    failed = [index for index, row in enumerate(output.answers) if "error" in row]
    size = answerer.requests_per_batch
    for start in range(0, len(failed), size):
        indices = failed[start : start + size]
        rows = answerer.rows([requests[index] for index in indices], indices[0] + 1)
        output.correct(dict(zip(indices, rows, strict=True)))
    return len(failed)


def answer_from(
    answerer: Answerer, requests: Sequence[dict], output: AnswerFile | None, start: int
) -> None:
    """Answers the requests from index `start` on; appends them to the output, if any."""
    from rich.progress import Progress

    show = sys.stderr.isatty() and output is not None
    with Progress(disable=not show) as progress:
        task = progress.add_task("answering", total=len(requests) - start)
        for rows in _rows_from(answerer, requests, start):
            if output is not None:
                output.add(rows)
            progress.advance(task, len(rows))


def _rows_from(answerer: Answerer, requests: Sequence[dict], start: int) -> Iterator[list[dict]]:
    if answerer.uses_engine:
        yield from answerer.stream(requests[start:], start + 1)
        return
    size = answerer.requests_per_batch
    for index in range(start, len(requests), size):
        yield answerer.rows(requests[index : index + size], index + 1)


def failures(requests: Sequence[dict], rows: Sequence[dict]) -> str:
    """Returns how many rows have an error, and the first one; "" if none has."""
    failed = [index for index, row in enumerate(rows) if "error" in row]
    if not failed:
        return ""
    first = with_name(name_of(requests[failed[0]]), ValueError(rows[failed[0]]["error"]))
    return (
        f"{len(failed)} of {len(rows)} requests could not be answered; their lines say why in "
        f'"error", and --retry_errors asks them again. The first: {first}'
    )


def totals(rows: Sequence[dict], seconds: float, compile_seconds: float = 0.0) -> str:
    """Returns the number of answers and tokens of this run, and the tokens per second.

    Args:
      seconds: of the run.
      compile_seconds: part of them that went into compilation, which the rate leaves out.
    """
    tokens = sum(row.get("new_tokens", len(row.get("token_ids", ()))) for row in rows)
    cut = sum(row.get("finish") == "length" for row in rows)
    more = f"; {cut} were cut off by --max_new_tokens" if cut else ""
    unanswered = sum(row.get("finish") == "reasoning" for row in rows)
    more += f"; {unanswered} have reasoning that was cut off and no answer" if unanswered else ""
    compiled = f", of which compilation took {compile_seconds:.3f} s" if compile_seconds else ""
    return (
        f"{len(rows)} answers, {tokens:,} new tokens in {seconds:.3f} s{compiled}; "
        f"{tokens / max(seconds - compile_seconds, 1e-9):.1f} tokens/s{more}"
    )


def note(text: str) -> None:
    """Prints a line to stderr on the first host."""
    if jax.process_index() == 0:
        print(printable(text), file=sys.stderr)
