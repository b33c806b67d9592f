"""Asks a model the questions of a task: in batches, resumed after a kill.

`answer` is the one place where a model is run.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

from internvl3_jax.evaluate import frames, prompts
from internvl3_jax.evaluate.loaders.videos import shown_subtitles
from internvl3_jax.evaluate.task import Row
from internvl3_jax.evaluate.variant import Variant
from internvl3_jax.inference import answering
from internvl3_jax.inference.answer_file import AnswerFile
from internvl3_jax.inference.chat import Chat

_NOTE_SECONDS = 60  # between two lines about the progress, where stderr is no terminal


@dataclasses.dataclass(frozen=True)
class Question:
    """What a model is asked.

    Attributes:
      text: with a place for each image.
      images: paths, bytes or PIL images.
      name: what errors call it.
    """

    text: str
    images: Sequence[Any]
    name: str


def answer(chat: Chat, questions: Sequence[Question], options: dict, choose=None) -> list[dict]:
    """Answers questions that share their options.

    Args:
      options: of `Chat`, for all of them.
      choose: as of `Answerer`: chooses the best of several answers.

    Returns:
      A dict for each question, with "text", "prompt_tokens", "new_tokens", "tiles", "seconds" and
      "finish".

    Raises:
      ValueError, OSError: a question cannot be asked; the message names it.
    """
    if choose is not None:
        pairs = [(question.text, question.images) for question in questions]
        names = [question.name for question in questions]
        chosen = choose(pairs, names=names, **options)
        finished = [{"finish": choice.candidates[choice.best].finish} for choice in chosen]
        return [choice.as_json() | more for choice, more in zip(chosen, finished, strict=True)]
    asked = [
        chat.prepare(question.text, question.images, where=question.name, **options)
        for question in questions
    ]
    rows = map(answering.as_json, chat.answer_many(asked, **options))
    return [row | {"new_tokens": len(row.pop("token_ids"))} for row in rows]


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
    return Question(text, images, row.where)


@dataclasses.dataclass
class TaskAnswerer:
    """Answers the rows of a task; has what `answering.answer_file` needs of an `Answerer`.

    While a batch is answered, a thread reads the images of the next one.
    """

    chat: Chat
    variant: Variant
    data: Sequence[Row]
    batch_size: int = 8
    hosts: bool = False
    choose: Callable[..., list] | None = None
    _began: tuple[float, int] | None = None
    _reader: futures.ThreadPoolExecutor = dataclasses.field(
        default_factory=lambda: futures.ThreadPoolExecutor(1)
    )
    _ahead: dict[int, futures.Future] = dataclasses.field(default_factory=dict)
    _noted: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def requests_per_batch(self) -> int:
        return max(1, self.batch_size // (self.variant.best_of or 1))

    def rows(self, batch: Sequence[dict], first: int) -> list[dict]:
        """Returns the output's rows of some requests. first: number of the first one, from 1.

        Raises:
          ValueError: a question cannot be asked. What has been answered stays in the file.
        """
        self._note(first)
        asked = self._questions(first - 1)[: len(batch)]
        found = answer(self.chat, asked, self.variant.options(), self.choose)
        return [
            request["asked"] | {"input": question.text} | row
            for request, question, row in zip(batch, asked, found, strict=True)
        ]

    def _questions(self, start: int) -> list[Question]:
        """Returns the questions of the batch that begins at row `start`; reads the next ones."""
        if start not in self._ahead:
            self._read(start)
        asked = self._ahead.pop(start).result()
        following = start + self.requests_per_batch
        if following < len(self.data):
            self._read(following)
        return asked

    def _read(self, start: int) -> None:
        rows = self.data[start : start + self.requests_per_batch]
        self._ahead[start] = self._reader.submit(
            lambda: [make_question(self.variant, row) for row in rows]
        )

    def _note(self, first: int) -> None:
        """Prints how much is done and how long the rest takes, once a minute."""
        now = time.monotonic()
        if self._began is None:
            self._began = now, first
        if sys.stderr.isatty() or now - self._noted < _NOTE_SECONDS or first == self._began[1]:
            return
        self._noted = now
        each = (now - self._began[0]) / (first - self._began[1])
        minutes = each * (len(self.data) - first + 1) / 60
        answering.note(
            f"{self.variant.name}: {first - 1} of {len(self.data)} answered, {minutes:.0f} min left"
        )


def requests_of(rows: Sequence[Row]) -> list[dict]:
    """Returns the rows as requests of an `AnswerFile`."""
    return [
        {
            "prompt": row.question,
            "image": [],
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
