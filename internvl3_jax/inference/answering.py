"""Answers a file of requests: several at once, resumed after a kill. A request that cannot be answered
gets an "error" in place of its answer.
"""

import collections
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from internvl3_jax.checkpoints.param_hash import tree_hash
from internvl3_jax.checkpoints.storage import by_path
from internvl3_jax.config import to_dict
from internvl3_jax.data.batch import Prompt
from internvl3_jax.inference.answer_file import AnswerFile
from internvl3_jax.inference.asked import Asked
from internvl3_jax.inference.chat import Answer, Chat
from internvl3_jax.inference.requests import image_hashes, name_of, paths_of
from internvl3_jax.io.terminal import one_line, printable
from internvl3_jax.parallel import multihost

ON_ERROR = ("note", "stop")
FIELDS = ("text", "token_ids", "prompt_tokens", "tiles", "seconds", "finish")


def as_json(answer: Answer) -> dict:
    """Returns the fields of an answer that --json and --requests write."""
    fields = {name: getattr(answer, name) for name in FIELDS}
    if answer.reasoning is not None:
        fields["reasoning"] = answer.reasoning
    if answer.boxes:
        fields["boxes"] = [dataclasses.asdict(box) for box in answer.boxes]
    if answer.plan is not None:
        fields["plan"] = dataclasses.asdict(answer.plan)
    return fields


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


@dataclasses.dataclass
class Answerer:
    """Turns requests into rows of the output.

    Attributes:
      chat: prepares the requests and, without `choose`, answers them.
      choose: answers a list of (question, images) pairs, called `names` in errors, with the best of
        `candidates` answers each. Each result has `as_json()`. None: one answer each.
      candidates: answers that `choose` generates for each question.
      on_error: "note" writes a row with the error for a request that cannot be answered; "stop"
        raises ValueError.
      batch_size: answers that decode together, in a power of two of rows.
      hosts: whether several hosts answer together.
    """

    chat: Chat
    choose: Callable[..., list] | None = None
    candidates: int = 1
    on_error: str = "note"
    batch_size: int = 8
    hosts: bool = False

    @property
    def requests_per_batch(self) -> int:
        return max(1, self.batch_size // self.candidates)

    def rows(self, batch: Sequence[dict], first: int) -> list[dict]:
        """Returns the output's rows of some requests. first: number of the first one, from 1."""
        if self.choose is None and not self.chat.options.prompt_lookup:
            return [row for rows in self.stream(batch, first) for row in rows]
        prompts, results = self._prepare(batch, first)
        # Answer together; after an error one by one, to learn which request it is.
        try:
            results |= dict(zip(prompts, self._answers(batch, prompts), strict=True))
        except (ValueError, OSError):
            results |= self._one_by_one(batch, prompts)
        return [_row(request, results[index]) for index, request in enumerate(batch)]

    def stream(self, requests: Sequence[dict], first: int) -> Iterator[list[dict]]:
        """Yields the output's rows in the order of the requests, each as soon as it and those
        before it are there. A request enters the engine when another one has ended.
        """
        engine = self.chat.engines.with_rows(self.batch_size)
        rows: collections.deque[dict | _Open] = collections.deque()
        entered = 0
        while entered < len(requests) or rows:
            # As many again as decode are ready to enter.
            while entered < len(requests) and _num_open(rows) < 2 * self.batch_size:
                batch = requests[entered : entered + self.batch_size]
                prompts, results = self._prepare(batch, first + entered)
                for index, request in enumerate(batch):
                    if index in results:
                        rows.append(_row(request, results[index]))
                    else:
                        asked = self.chat.ask(engine, prompts[index], self.chat.options)
                        rows.append(_Open(request, asked))
                entered += len(batch)
            engine.step()
            for index, row in enumerate(rows):
                if isinstance(row, _Open) and row.asked.ticket.finish is not None:
                    rows[index] = self._finished(row)
            ready = []
            while rows and not isinstance(rows[0], _Open):
                ready.append(rows.popleft())
            if ready:
                yield ready

    def _finished(self, row: "_Open") -> dict:
        try:
            result = as_json(row.asked.answer())
        except (ValueError, OSError) as error:
            result = self._error_row(row.request, error)
        return _row(row.request, result)

    def _prepare(self, batch: Sequence[dict], first: int) -> tuple[dict, dict]:
        """Returns index -> prompt, and index -> error of the requests that cannot be read, so that
        one of them does not spoil the batch.
        """
        prompts, results = {}, {}
        for index, request in enumerate(batch):
            try:
                prompts[index] = self._prompt(request)
            except (ValueError, OSError) as error:
                results[index] = self._error_row(request, error)
        if self.hosts:
            multihost.assert_same_on_all_hosts(
                first, {"requests that cannot be read": str(sorted(results))}, seconds=3600
            )
        return prompts, results

    def _prompt(self, request: dict) -> Prompt:
        videos, documents = request["video"], request["document"]
        if self.choose and (videos or documents):
            raise ValueError("--best_of takes images alone; ask this without it")
        inputs = request["image"], videos, documents
        return self.chat.prepare(request["prompt"], *inputs, where=name_of(request))

    def _one_by_one(self, batch: Sequence[dict], prompts: dict) -> dict[int, dict]:
        results = {}
        for index, prompt in prompts.items():
            try:
                (results[index],) = self._answers(batch, {index: prompt})
            except (ValueError, OSError) as error:
                results[index] = self._error_row(batch[index], error)
        return results

    def _answers(self, batch: Sequence[dict], prompts: dict) -> list[dict]:
        if not prompts:
            return []
        if self.choose is None:
            return [as_json(answer) for answer in self.chat.answer_many(list(prompts.values()))]
        requests = [batch[index] for index in prompts]
        pairs = [(request["prompt"], request["image"]) for request in requests]
        return [
            choice.as_json() for choice in self.choose(pairs, names=list(map(name_of, requests)))
        ]

    def _error_row(self, request: dict, error: Exception) -> dict:
        text = with_name(name_of(request), error)
        if self.on_error == "stop":
            raise ValueError(text) from error
        return {"error": one_line(text)}


@dataclasses.dataclass
class _Open:
    """A request in the engine."""

    request: dict
    asked: Asked


def _num_open(rows: Iterable) -> int:
    return sum(isinstance(row, _Open) for row in rows)


def _row(request: dict, result: dict) -> dict:
    return request["asked"] | _image_fields(request) | result


def with_name(name: str, error: Exception) -> str:
    """Returns the message of an error, with the name of the request in front if it lacks it."""
    text = str(error)
    return text if text.startswith(name) else f"{name}: {text}"


def _image_fields(request: dict) -> dict:
    """Returns hashes of the images, then of the videos and the documents."""
    paths = paths_of(request)
    return {"image_sha256": image_hashes(paths)} if paths else {}


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
    began = time.perf_counter()
    if retry_errors:
        note(f"{ask_again(answerer, requests, output)} requests with an error were asked again")
    answer_from(answerer, requests, output, answered)

    # Report.
    if output is None:
        return
    if stats:
        note(totals(output.answers[answered:], time.perf_counter() - began))
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
    if answerer.choose is None and not answerer.chat.options.prompt_lookup:
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


def totals(rows: Sequence[dict], seconds: float) -> str:
    """Returns the number of answers and tokens of this run, and the tokens per second."""
    tokens = sum(row.get("new_tokens", len(row.get("token_ids", ()))) for row in rows)
    cut = sum(row.get("finish") == "length" for row in rows)
    more = f"; {cut} were cut off by --max_new_tokens" if cut else ""
    unanswered = sum(row.get("finish") == "reasoning" for row in rows)
    more += f"; {unanswered} have reasoning that was cut off and no answer" if unanswered else ""
    return (
        f"{len(rows)} answers, {tokens:,} new tokens in {seconds:.3f} s, "
        f"{tokens / max(seconds, 1e-9):.1f} tokens/s{more}"
    )


def note(text: str) -> None:
    """Prints a line to stderr on the first host."""
    if jax.process_index() == 0:
        print(printable(text), file=sys.stderr)
