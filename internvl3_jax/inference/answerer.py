"""Turns requests into rows of an output: one by one through the engine, or in batches."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

from internvl3_jax.data.batch import Prompt
from internvl3_jax.inference.asked import Asked
from internvl3_jax.inference.chat import Answer, Chat
from internvl3_jax.inference.options import Options
from internvl3_jax.inference.requests import image_hashes, name_of, paths_of
from internvl3_jax.io.terminal import one_line
from internvl3_jax.parallel import multihost

FIELDS = ("text", "token_ids", "prompt_tokens", "tiles", "seconds", "finish")


def as_json(answer: Answer) -> dict:
    """Returns the fields of an answer that --json and --requests write."""
    fields = {name: getattr(answer, name) for name in FIELDS}
    if answer.reasoning is not None:
        fields["reasoning"] = answer.reasoning
    if answer.boxes:
        fields["boxes"] = [dataclasses.asdict(box) for box in answer.boxes]
    if answer.compressed_tiles:
        fields["compressed_tiles"] = answer.compressed_tiles
    if answer.plan is not None:
        fields["plan"] = dataclasses.asdict(answer.plan)
    return fields


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
    def uses_engine(self) -> bool:
        """Returns whether requests enter one by one, each with its own options."""
        return self.choose is None and not self.chat.options.prompt_lookup

    @property
    def requests_per_batch(self) -> int:
        return max(1, self.batch_size // self.candidates)

    def rows(self, batch: Sequence[dict], first: int) -> list[dict]:
        """Returns the output's rows of some requests. first: number of the first one, from 1."""
        if self.uses_engine:
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
                        options = self._options(request)
                        asked = self.chat.ask(engine, prompts[index], options)
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
        if request["options"] and not self.uses_engine:
            raise ValueError(
                f"{', '.join(request['options'])} of one request go with neither --best_of nor "
                "--prompt_lookup; leave out either"
            )
        self._options(request)  # checks them
        inputs = request["image"], videos, documents
        options = request["options"]
        return self.chat.prepare(request["prompt"], *inputs, where=name_of(request), **options)

    def _options(self, request: dict) -> Options:
        return self.chat.options.with_changes(request["options"])

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
