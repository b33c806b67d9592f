"""Reads every sample of a training mixture once, before training does, and says what is wrong with
which.

    python -m internvl3_jax.data.doctor META --tokenizer CHECKPOINT [--tokens_per_row 16384] [--tiles_per_row 48]

It opens and decodes all pictures and videos, counts tags, tiles and tokens, and encodes every
conversation as training will. Of a video it takes the largest number of frames. It prints a table
and writes report.json, histogram.png and errors.tsv to META.doctor or another folder; errors.tsv
can be given to training as data.exclude_file. The exit status is 1 if there are errors.

Errors: a row, picture or video that cannot be read; tags that do not match the pictures; roles that
do not take turns; nothing to learn; more tokens or tiles than a row holds (with --overlong truncate
or drop: a warning). Warnings: ids that occur twice; empty answers; a length in the meta JSON that
is not the number of rows.
"""

import argparse
import collections
import dataclasses
import datetime
import multiprocessing
import os
import pathlib
import platform
import sys
import warnings
from collections.abc import Iterator

import numpy as np

from internvl3_jax.config import TILE_RULES, DataConfig, ProcessorConfig, from_dict
from internvl3_jax.data.doctor.report import claim_folder, report_folder, summary, write_report
from internvl3_jax.data.doctor.table import print_report
from internvl3_jax.data.example import ExampleBuilder
from internvl3_jax.data.pairs import PairError
from internvl3_jax.data.sources.catalog import open_sources
from internvl3_jax.data.sources.mixture import Selection
from internvl3_jax.data.sources.row_fields import is_empty_answer
from internvl3_jax.data.text.tokenizer import Tokenizer
from internvl3_jax.data.truncation import RULES, TooLong
from internvl3_jax.io import command_line
from internvl3_jax.io.checkpoint_paths import MANIFEST, resolve_checkpoint
from internvl3_jax.io.strict_json import read_object
from internvl3_jax.io.terminal import one_line

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
LONGEST = 1000  # characters of a reason
CHUNK = 64  # rows that a worker takes at a time


@dataclasses.dataclass
class Finding:
    """What is known of one sample. tokens and tiles are 0 if it cannot be read."""

    row: int
    tokens: int = 0
    tiles: int = 0
    pictures: int = 0
    id: str | None = None
    error: str = ""  # one line
    warning: str = ""
    has_empty_answer: bool = False


class Examiner:
    """Examines rows; every worker process has its own."""

    def __init__(
        self,
        config: DataConfig,
        processor: ProcessorConfig,
        tokenizer: Tokenizer,
        sources: list | None = None,
    ):
        # Videos at their longest.
        self.preparer = ExampleBuilder(
            dataclasses.replace(config, min_frames=config.max_frames), processor, tokenizer
        )
        with warnings.catch_warnings():
            # the main process reports what opening the sources warns of
            warnings.simplefilter("ignore")
            self.sources = open_sources(config) if sources is None else sources

    def examine(self, number: int, row: int) -> Finding:
        finding, preparer = Finding(row), self.preparer
        try:
            conversation = preparer.read(self.sources[number], row, np.random.default_rng((0, row)))
            tiles = preparer.count(conversation)
            whole = preparer.encode_all(conversation.messages, tiles)
            finding.id, finding.pictures = conversation.id, len(tiles)
            finding.has_empty_answer = is_empty_answer(conversation.messages)
            finding.tokens, finding.tiles = len(whole.tokens), sum(tiles)
            encoded, kept = preparer.encode(conversation, tiles)
            if preparer.config.pairs:
                finding.tokens += len(preparer.rejected(conversation, encoded).tokens)
            if len(encoded.tokens) < len(whole.tokens):
                finding.warning = f"cut from {len(whole.tokens):,} to {len(encoded.tokens):,} tokens, {len(tiles)} to {kept} pictures"
        except Exception as error:
            # a row that a decoder trips over is an error of that row, and not the end of the
            # examination
            if isinstance(error, TooLong) and preparer.config.overlong == "drop":
                finding.warning = _told(error)
            else:
                finding.error = _told(error)
            if isinstance(error, PairError) and not preparer.config.pairs:
                finding.error += "; for the doctor: give --pairs"
        return finding


def _told(error: Exception) -> str:
    """One line of an error, without what could drive a terminal."""
    known = isinstance(error, ValueError | OSError)
    text = " ".join((str(error) if known else f"{type(error).__name__}: {error}").split())
    return (
        one_line(text[: LONGEST + 1]) if len(text) <= LONGEST else f"{one_line(text[:LONGEST])}..."
    )


def examine_all(examiner: Examiner, workers: int) -> Iterator[tuple[int, list[Finding]]]:
    """(source number, findings) of all rows that training reads, in order, a chunk at a time."""
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
    """Gathers the findings of one source."""

    def __init__(self, name: str, rows: int):
        self.name, self.rows = name, rows
        self.tokens, self.tiles, self.pictures = [], [], 0
        self.errors: list[tuple[str, int, str]] = []
        self.warnings: list[tuple[int, str]] = []
        self.empty_answers: list[int] = []
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
        self.pictures += finding.pictures
        if finding.id is not None:
            self.ids[finding.id] += 1

    def report(self) -> dict:
        duplicates = {id: count for id, count in self.ids.items() if count > 1}
        return {
            "rows": self.rows,
            "errors": len(self.errors),
            "shortened_or_dropped": len(self.warnings),
            "pictures": self.pictures,
            "tokens": summary(np.asarray(self.tokens, np.int64)),
            "tiles": summary(np.asarray(self.tiles, np.int64)),
            "empty_answers": len(self.empty_answers),
            "first_empty_answers": self.empty_answers[:10],
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


def read_processor(directory: str | os.PathLike, max_tiles: int | None) -> ProcessorConfig:
    """That of a converted checkpoint, or the released models' for a directory of a tokenizer alone."""
    path = pathlib.Path(directory) / MANIFEST
    processor = ProcessorConfig()
    if path.is_file():
        processor = from_dict(
            ProcessorConfig, read_object(path).get("processor", dict), f"{path}: processor"
        )
    return processor if max_tiles is None else dataclasses.replace(processor, max_tiles=max_tiles)


def find_tokenizer(path: str) -> pathlib.Path:
    """The directory that a user means: one with a tokenizer's files, or what `resolve_checkpoint`
    finds.
    """
    directory = pathlib.Path(os.path.expanduser(path))
    if any((directory / name).is_file() for name in TOKENIZER_FILES):
        return directory
    return resolve_checkpoint(path)


def whole(low: int, high: int = 2**31 - 1):
    """argparse's type of a whole number within bounds."""

    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    return parse


def main(arguments: list[str] | None = None) -> int:
    parser = command_line.Parser("doctor", description=__doc__)
    flag = parser.add_argument
    flag("meta", help="meta JSON")
    flag(
        "--tokenizer",
        required=True,
        help="checkpoint, training run, released model, hub id, or a tokenizer's directory",
    )
    flag(
        "--max_tiles",
        type=whole(1, 1024),
        help="tiles of an image, or of a sample's images together; see --tiles (the checkpoint's)",
    )
    flag(
        "--tiles",
        default=DataConfig.tiles,
        choices=TILE_RULES,
        help="as data.tiles: whose the limit is (%(default)s)",
    )
    flag(
        "--tokens_per_row",
        type=whole(1),
        default=DataConfig.tokens_per_row,
        help="as data.tokens_per_row (%(default)s)",
    )
    flag(
        "--tiles_per_row",
        type=whole(0),
        default=DataConfig.tiles_per_row,
        help="as data.tiles_per_row (%(default)s)",
    )
    flag(
        "--max_frames",
        type=whole(1, 100_000),
        default=DataConfig.max_frames,
        help="of a video (%(default)s)",
    )
    flag(
        "--max_image_pixels",
        type=whole(0),
        default=DataConfig.max_image_pixels,
        help="as data.max_image_pixels (%(default)s)",
    )
    flag(
        "--allow_truncated",
        action="store_true",
        help="as data.allow_truncated: images whose end is missing are used",
    )
    flag(
        "--overlong",
        default=DataConfig.overlong,
        choices=RULES,
        help="as data.overlong (%(default)s)",
    )
    flag(
        "--pairs",
        action="store_true",
        help="as data.pairs: rows are a question, a chosen and a rejected answer",
    )
    flag("--workers", type=whole(0, 1024), default=0, help="processes; 0: this one")
    flag("--report", help="folder to write to (META.doctor, where training looks)")
    options = parser.parse_args(arguments)
    return command_line.call(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # a terminal that cannot show a name shows its code
            stream.reconfigure(errors="backslashreplace")
    config = DataConfig(
        source=options.meta,
        tokenizer=options.tokenizer,
        tokens_per_row=options.tokens_per_row,
        tiles_per_row=options.tiles_per_row,
        tiles=options.tiles,
        max_frames=options.max_frames,
        max_image_pixels=options.max_image_pixels,
        allow_truncated=options.allow_truncated,
        overlong=options.overlong,
        pairs=options.pairs,
    )
    folder = os.path.expanduser(options.report) if options.report else report_folder(options.meta)
    found = find_tokenizer(options.tokenizer)
    processor = read_processor(found, options.max_tiles)
    report = examine(config, processor, Tokenizer.from_directory(found), folder, options.workers)
    print_report(report, folder)
    return 1 if report["errors"] else 0
