"""Asks a model the questions of a task: many at once, resumed after a kill.

`answer` is the one place where a model is run.
"""

import collections
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

from internvl3_jax.evaluate import frames, prompts
from internvl3_jax.evaluate.loaders.videos import shown_subtitles
from internvl3_jax.evaluate.task import Row
from internvl3_jax.evaluate.variant import Variant
from internvl3_jax.inference import answering
from internvl3_jax.inference.answer_file import AnswerFile
from internvl3_jax.inference.answerer import as_json, with_name
from internvl3_jax.inference.asked import Asked
from internvl3_jax.inference.chat import Chat
from internvl3_jax.inference.engine.engine import Engine
from internvl3_jax.positions import UNITS
from internvl3_jax.reward.best_of_n import Choice

_NOTE_SECONDS = 60  # between two lines about the progress, where stderr is not a terminal


@dataclasses.dataclass(frozen=True)
class Question:
    """A question to a model.

    Attributes:
      text: with a place for each image.
      images: paths, bytes or PIL images.
      name: what errors call it.
      changes: options of `Chat` for it alone.
    """

    text: str
    images: Sequence[Any]
    name: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def answer(chat: Chat, questions: Iterable[Question], options: dict, rows: int) -> Iterator[dict]:
    """Yields the answers to questions in their order. One enters when another one has ended.

    Args:
      options: of `Chat`, for all of them.
      rows: answers that decode together.

    Yields:
      A dict with "text", "prompt_tokens", "position" (of the last token of the prompt),
      "new_tokens", "tiles", "seconds" and "finish".

    Raises:
      ValueError, OSError: a question cannot be asked, after the answers to those before it; the
        message names it.
    """
    engine, waiting, problem = chat.engines.with_rows(rows), iter(questions), None
    asked: collections.deque[Asked] = collections.deque()
    while True:
        # As many again as decode are ready to enter.
        while problem is None and _num_open(asked) < 2 * rows:
            try:
                question = next(waiting, None)
                if question is None:
                    break
                asked.append(_ask(chat, engine, question, options))
            except (ValueError, OSError) as error:
                problem = error
        if not asked:
            break
        if asked[0].ticket.finish is None:
            engine.step()
        while asked and asked[0].ticket.finish is not None:
            yield answer_row(asked.popleft())
    if problem is not None:
        raise problem


def _ask(chat: Chat, engine: Engine, question: Question, options: dict) -> Asked:
    options = options | question.changes
    try:
        changed = chat.options.with_changes(options)
    except ValueError as error:
        raise ValueError(with_name(question.name, error)) from error
    prompt = chat.prepare(question.text, question.images, where=question.name, **options)
    return chat.ask(engine, prompt, changed)


def answer_row(one: Asked) -> dict:
    """Returns a finished answer as `answer` yields it; raises the error that ended it."""
    row, prompt = as_json(one.answer()), one.ticket.request.prompt
    position = {"position": float(prompt.positions[-1]) / UNITS}
    return row | position | {"new_tokens": len(row.pop("token_ids"))}


def _num_open(asked: Iterable[Asked]) -> int:
    return sum(one.ticket.finish is None for one in asked)


def choose_best(choose: Callable[..., list], questions: Sequence[Question], options: dict):
    """Returns the best of several answers to each question, as dicts.

    choose: as of `Answerer`.
    """
    chosen: list[Choice] = []
    for changes, group in itertools.groupby(questions, key=lambda question: question.changes):
        part = list(group)
        pairs = [(question.text, question.images) for question in part]
        names = [question.name for question in part]
        chosen += choose(pairs, names=names, **options | changes)
    return [
        choice.as_json() | {"finish": choice.candidates[choice.best].finish} for choice in chosen
    ]


def make_question(variant: Variant, row: Row) -> Question:
    """Returns the question of a row, with its images or the frames of its video."""
    images, task = row.load_images(), variant.task
    if row.video is not None:
        images, indices, fps = frames.read_video(
            row.video, task.frame_rule, variant.frames, row.clip
        )
        if "cues" in row.values and fps:
            row.values["subtitles"] = shown_subtitles(row.values["cues"], indices, fps)
    text = prompts.build(task, row, len(images), variant.reasoning)
    return Question(text, images, row.where, row.changes)


def questions_ahead(variant: Variant, rows: Sequence[Row], ahead: int) -> Iterator[Question]:
    """Yields the questions of rows; a thread reads the images of the next `ahead` ones."""
    with futures.ThreadPoolExecutor(1) as reader:
        read: collections.deque[futures.Future] = collections.deque()
        left = iter(rows)
        try:
            while True:
                for row in itertools.islice(left, ahead - len(read)):
                    read.append(reader.submit(make_question, variant, row))
                if not read:
                    return
                yield read.popleft().result()
        finally:
            for future in read:
                future.cancel()


@dataclasses.dataclass
class TaskAnswerer:
    """Answers the rows of a task; has what `answering.answer_file` needs of an `Answerer`."""

    chat: Chat
    variant: Variant
    total: int
    batch_size: int = 8
    hosts: bool = False
    choose: Callable[..., list] | None = None
    _began: tuple[float, int] | None = None
    _noted: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def uses_engine(self) -> bool:
        """Returns whether questions enter one by one."""
        return self.choose is None

    @property
    def requests_per_batch(self) -> int:
        return max(1, self.batch_size // (self.variant.best_of or 1))

    def rows(self, batch: Sequence[dict], first: int) -> list[dict]:
        """Returns the output's rows of some requests. first: number of the first one, from 1.

        Raises:
          ValueError, OSError: a question cannot be asked.
        """
        self._note(first)
        asked = [make_question(self.variant, request["row"]) for request in batch]
        found = choose_best(self.choose, asked, self.variant.options())
        return [
            request["asked"] | {"input": question.text} | row
            for request, question, row in zip(batch, asked, found, strict=True)
        ]

    def stream(self, requests: Sequence[dict], first: int) -> Iterator[list[dict]]:
        """Yields the output's rows one by one, in the order of the requests.

        Raises:
          ValueError, OSError: a question cannot be asked.
        """
        texts: list[str] = []

        def remembered() -> Iterator[Question]:
            rows = [request["row"] for request in requests]
            for question in questions_ahead(self.variant, rows, self.batch_size):
                texts.append(question.text)
                yield question

        found = answer(self.chat, remembered(), self.variant.options(), self.batch_size)
        for number, (request, row) in enumerate(zip(requests, found, strict=True)):
            self._note(first + number)
            yield [request["asked"] | {"input": texts[number]} | row]

    def _note(self, first: int) -> None:
        """Prints how much is done and how long the rest takes, once a minute."""
        now = time.monotonic()
        if self._began is None:
            self._began = now, first
        if sys.stderr.isatty() or now - self._noted < _NOTE_SECONDS or first == self._began[1]:
            return
        self._noted = now
        each = (now - self._began[0]) / (first - self._began[1])
        minutes = each * (self.total - first + 1) / 60
        answering.note(
            f"{self.variant.name}: {first - 1} of {self.total} answered, {minutes:.0f} min left"
        )


def requests_of(rows: Sequence[Row]) -> list[dict]:
    """Returns the rows as requests of an `AnswerFile`."""
    return [
        {
            "prompt": row.question,
            "image": [],
            "video": [],
            "document": [],
            "options": {},
            "id": row.id,
            "where": row.where,
            "asked": {"id": row.id, "prompt": row.question},
            "row": row,
        }
        for row in rows
    ]


def run(
    answerer: TaskAnswerer, rows: Sequence[Row], path, settings: dict, first_host: bool
) -> list[dict] | None:
    """Answers the rows that a file does not hold yet.

    Args:
      path: of the file of answers.
      settings: what the answers depend on.
      first_host: whether this process writes.

    Returns:
      The file's answers; None on the other hosts.
    """
    requests = requests_of(rows)
    if not first_host:
        answering.answer_file(answerer, requests, None, settings)
        return None
    with AnswerFile(path) as output:
        answering.answer_file(answerer, requests, output, settings)
        return output.answers
