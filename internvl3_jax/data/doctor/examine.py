"""Reads and encodes every row of the training data and collects what is wrong with each."""

import collections
import dataclasses
import datetime
import multiprocessing
import pathlib
import platform
import warnings
from collections.abc import Iterator, Sequence

import numpy as np

from internvl3_jax.config import DataConfig, ProcessorConfig
from internvl3_jax.data.doctor.report import claim_folder, summary, write_report
from internvl3_jax.data.example import ExampleBuilder
from internvl3_jax.data.pairs import PairError
from internvl3_jax.data.sources.catalog import open_sources
from internvl3_jax.data.sources.mixture import Selection
from internvl3_jax.data.sources.row_fields import is_empty_answer
from internvl3_jax.data.text.chat_template import IMAGE_TAG, Message
from internvl3_jax.data.text.media_tags import VIDEO_TAG
from internvl3_jax.data.text.tokenizer import Tokenizer
from internvl3_jax.data.truncation import TooLong
from internvl3_jax.io.terminal import one_line

LONGEST = 1000  # characters of a reason
CHUNK = 64  # rows per task of a worker


@dataclasses.dataclass
class Finding:
    """The result of examining one row. tokens and tiles are 0 if it cannot be read."""

    row: int
    tokens: int = 0
    tiles: int = 0
    images: int = 0
    id: str | None = None
    error: str = ""  # one line
    warning: str = ""
    has_empty_answer: bool = False
    literal_tags: int = 0  # <image> and <video> of human turns without an image for them


class Examiner:
    """Examines rows; each worker process has its own."""

    def __init__(
        self,
        config: DataConfig,
        processor: ProcessorConfig,
        tokenizer: Tokenizer,
        sources: list | None = None,
    ):
        # Videos have their largest number of frames.
        self.builder = ExampleBuilder(
            dataclasses.replace(config, min_frames=config.max_frames), processor, tokenizer
        )
        with warnings.catch_warnings():
            # The main process reports these warnings.
            warnings.simplefilter("ignore")
            self.sources = open_sources(config) if sources is None else sources

    def examine(self, number: int, row: int) -> Finding:
        """Reads and encodes a row as training does."""
        finding, builder = Finding(row), self.builder
        try:
            conversation = builder.read(self.sources[number], row, np.random.default_rng((0, row)))
            tiles = builder.count(conversation)
            full = builder.encode_all(conversation.messages, tiles)
            finding.id, finding.images = conversation.id, len(tiles)
            finding.has_empty_answer = is_empty_answer(conversation.messages)
            finding.literal_tags = literal_tags(conversation.messages, len(tiles))
            finding.tokens, finding.tiles = len(full.tokens), sum(tiles)
            encoded, kept = builder.encode(conversation, tiles)
            if builder.config.pairs:
                finding.tokens += len(builder.rejected(conversation, encoded).tokens)
            if len(encoded.tokens) < len(full.tokens):
                finding.warning = (
                    f"cut from {len(full.tokens):,} to {len(encoded.tokens):,} tokens, "
                    f"{len(tiles)} to {kept} images"
                )
        except Exception as error:
            # Whatever a decoder raises is an error of that row and does not end the examination.
            if isinstance(error, TooLong) and builder.config.overlong == "drop":
                finding.warning = _describe(error)
            else:
                finding.error = _describe(error)
            if isinstance(error, PairError) and not builder.config.pairs:
                finding.error += "; run the doctor with --pairs"
        return finding


def literal_tags(messages: Sequence[Message], images: int) -> int:
    """Counts the tags of human turns that stay text: those beyond the number of images, videos."""
    contents = [message["content"] for message in messages if message["role"] == "user"]
    image_tags, video_tags = (
        sum(content.count(tag) for content in contents) for tag in (IMAGE_TAG, VIDEO_TAG)
    )
    return max(0, image_tags - images) + video_tags


def _describe(error: Exception) -> str:
    """Describes an error in one line, without control characters of terminals."""
    known = isinstance(error, ValueError | OSError)
    text = " ".join((str(error) if known else f"{type(error).__name__}: {error}").split())
    return (
        one_line(text[: LONGEST + 1]) if len(text) <= LONGEST else f"{one_line(text[:LONGEST])}..."
    )


def examine_all(examiner: Examiner, workers: int) -> Iterator[tuple[int, list[Finding]]]:
    """Yields (source number, findings) of all rows that training reads, in order, in chunks."""
    tasks = []
    for number, source in enumerate(examiner.sources):
        rows = len(Selection(number, len(source), min(1.0, source.repeat)))
        tasks += [
            (number, range(start, min(rows, start + CHUNK))) for start in range(0, rows, CHUNK)
        ]
    if not workers:
        yield from (
            (number, [examiner.examine(number, row) for row in rows]) for number, rows in tasks
        )
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, _start_worker, (examiner,)) as pool:
        yield from pool.imap(_examine_chunk, tasks)


_worker: Examiner | None = None  # of a worker process


def _start_worker(examiner: Examiner) -> None:
    global _worker
    _worker = examiner


def _examine_chunk(task: tuple[int, range]) -> tuple[int, list[Finding]]:
    return task[0], [_worker.examine(task[0], row) for row in task[1]]


class Summary:
    """Collects the findings of one source."""

    def __init__(self, name: str, rows: int):
        self.name, self.rows = name, rows
        self.tokens, self.tiles, self.images = [], [], 0
        self.errors: list[tuple[str, int, str]] = []
        self.warnings: list[tuple[int, str]] = []
        self.empty_answers: list[int] = []
        self.literal_tags: list[int] = []  # rows
        self.ids: collections.Counter = collections.Counter()

    def add(self, finding: Finding) -> None:
        if finding.error:
            self.errors.append((self.name, finding.row, finding.error))
        if finding.warning:
            self.warnings.append((finding.row, finding.warning))
        if finding.tokens:
            self.tokens.append(finding.tokens)
            self.tiles.append(finding.tiles)
        if finding.has_empty_answer:
            self.empty_answers.append(finding.row)
        if finding.literal_tags:
            self.literal_tags.append(finding.row)
        self.images += finding.images
        if finding.id is not None:
            self.ids[finding.id] += 1

    def report(self) -> dict:
        duplicates = {id: count for id, count in self.ids.items() if count > 1}
        return {
            "rows": self.rows,
            "errors": len(self.errors),
            "shortened_or_dropped": len(self.warnings),
            "images": self.images,
            "tokens": summary(np.asarray(self.tokens, np.int64)),
            "tiles": summary(np.asarray(self.tiles, np.int64)),
            "empty_answers": len(self.empty_answers),
            "first_empty_answers": self.empty_answers[:10],
            "literal_tags": len(self.literal_tags),
            "first_literal_tags": self.literal_tags[:10],
            "duplicate_ids": len(duplicates),
            "first_duplicate_ids": dict(list(duplicates.items())[:10]),
            "first_errors": [{"row": row, "reason": reason} for _, row, reason in self.errors[:10]],
            "first_warnings": [
                {"row": row, "reason": reason} for row, reason in self.warnings[:10]
            ],
        }


def examine(
    config: DataConfig,
    processor: ProcessorConfig,
    tokenizer: Tokenizer,
    folder: str,
    workers: int = 0,
) -> dict:
    """Examines all of `config.source`, writes the report to `folder` and returns it."""
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sources = open_sources(config)
    claim_folder(pathlib.Path(folder))
    examiner = Examiner(config, processor, tokenizer, sources)
    summaries = [Summary(s.name, len(Selection(0, len(s), min(1.0, s.repeat)))) for s in sources]
    with Progress(
        *Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn()
    ) as progress:
        bar = progress.add_task("samples", total=sum(summary.rows for summary in summaries))
        for number, findings in examine_all(examiner, workers):
            for finding in findings:
                summaries[number].add(finding)
            progress.advance(bar, len(findings))
    report = {
        "meta": config.source,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "settings": {
            "data": dataclasses.asdict(config),
            "processor": dataclasses.asdict(processor),
        },
        "errors": sum(len(summary.errors) for summary in summaries),
        "warnings": [str(warning.message) for warning in caught],
        "sources": {summary.name: summary.report() for summary in summaries},
    }
    errors = [error for summary in summaries for error in summary.errors]
    numbers = [
        np.asarray([n for s in summaries for n in getattr(s, name)], np.int64)
        for name in ("tokens", "tiles")
    ]
    write_report(pathlib.Path(folder), report, errors, *numbers)
    return report
