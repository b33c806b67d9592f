"""Reads every sample of a training mixture once, before training does, and says what is wrong with which.

    python -m internvl3_jax.data.doctor META --tokenizer CHECKPOINT [--tokens_per_row 16384] [--tiles_per_row 48]

It opens and decodes all pictures and videos, counts tags, tiles and tokens, and encodes every conversation as training will. Of a
video it takes the largest number of frames. It prints a table and writes report.json, histogram.png and errors.tsv to META.doctor
or another folder; errors.tsv can be given to training as data.drop_list. The exit status is 1 if there are errors.

Errors: a row, picture or video that cannot be read; tags that do not match the pictures; roles that do not take turns; nothing to
learn; more tokens or tiles than a row holds (with --overlong truncate or drop: a warning). Warnings: ids that occur twice; a
length in the meta JSON that is not the number of rows.
"""

import argparse
import collections
import dataclasses
import datetime
import functools
import json
import math
import multiprocessing
import pathlib
import platform
import sys
import warnings
from collections.abc import Iterator

import numpy as np

from internvl3_jax.config import DataConfig, ProcessorConfig, from_dict
from internvl3_jax.data.doctor_report import ERRORS, report_folder, summary, write_report
from internvl3_jax.data.mixture import Selection
from internvl3_jax.data.overlong import TooLong
from internvl3_jax.data.prepare import Preparer
from internvl3_jax.data.sources import open_sources
from internvl3_jax.data.tokenizer import Tokenizer

CHUNK = 64  # rows that a worker takes at a time


@dataclasses.dataclass
class Finding:
    """What is known of one sample. tokens and tiles are 0 if it cannot be read."""

    row: int
    tokens: int = 0
    tiles: int = 0
    pictures: int = 0
    id: str | None = None
    error: str = ""
    warning: str = ""


class Examiner:
    """Examines rows; every worker process has its own."""

    def __init__(self, config: DataConfig, processor: ProcessorConfig, tokenizer: Tokenizer, sources: list | None = None):
        # Videos at their longest.
        self.preparer = Preparer(dataclasses.replace(config, min_frames=config.max_frames), processor, tokenizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the main process reports what opening the sources warns of
            self.sources = open_sources(config) if sources is None else sources

    def examine(self, number: int, row: int) -> Finding:
        finding, preparer = Finding(row), self.preparer
        try:
            conversation = preparer.read(self.sources[number], row, np.random.default_rng((0, row)))
            tiles = preparer.count(conversation)
            whole = preparer.encode_all(conversation.messages, tiles)
            finding.id, finding.pictures = conversation.id, len(tiles)
            finding.tokens, finding.tiles = len(whole.tokens), sum(tiles)
            encoded, kept = preparer.encode(conversation, tiles)
            if preparer.config.pairs:
                finding.tokens += len(preparer.rejected(conversation, encoded).tokens)
            if len(encoded.tokens) < len(whole.tokens):
                finding.warning = (
                    f"cut from {len(whole.tokens):,} to {len(encoded.tokens):,} tokens, {len(tiles)} to {kept} pictures"
                )
        except (ValueError, OSError) as error:
            if isinstance(error, TooLong) and preparer.config.overlong == "drop":
                finding.warning = str(error)
            else:
                finding.error = str(error)
        return finding


def examine_all(examiner: Examiner, workers: int) -> Iterator[tuple[int, list[Finding]]]:
    """(source number, findings) of all rows that training reads, in order, a chunk at a time."""
    tasks = []
    for number, source in enumerate(examiner.sources):
        rows = len(Selection(number, len(source), min(1.0, source.repeat)))
        tasks += [(number, range(start, min(rows, start + CHUNK))) for start in range(0, rows, CHUNK)]
    if not workers:
        yield from ((number, [examiner.examine(number, row) for row in rows]) for number, rows in tasks)
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
        self.ids: collections.Counter = collections.Counter()

    def add(self, finding: Finding) -> None:
        if finding.error:
            self.errors.append((self.name, finding.row, finding.error))
        if finding.warning:
            self.warnings.append((finding.row, finding.warning))
        if finding.tokens:
            self.tokens.append(finding.tokens)
            self.tiles.append(finding.tiles)
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
            "duplicate_ids": len(duplicates),
            "first_duplicate_ids": dict(list(duplicates.items())[:10]),
            "first_errors": [{"row": row, "reason": reason} for _, row, reason in self.errors[:10]],
            "first_warnings": [{"row": row, "reason": reason} for row, reason in self.warnings[:10]],
        }


def examine(config: DataConfig, processor: ProcessorConfig, tokenizer: Tokenizer, folder: str, workers: int = 0) -> dict:
    """Examines all of `config.source`, writes the report to `folder` and returns it."""
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sources = open_sources(config)
    examiner = Examiner(config, processor, tokenizer, sources)
    summaries = [Summary(s.name, len(Selection(0, len(s), min(1.0, s.repeat)))) for s in sources]
    with Progress(*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        bar = progress.add_task("samples", total=sum(summary.rows for summary in summaries))
        for number, findings in examine_all(examiner, workers):
            for finding in findings:
                summaries[number].add(finding)
            progress.advance(bar, len(findings))
    report = {
        "meta": config.source,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "settings": {"data": dataclasses.asdict(config), "processor": dataclasses.asdict(processor)},
        "errors": sum(len(summary.errors) for summary in summaries),
        "warnings": [str(warning.message) for warning in caught],
        "sources": {summary.name: summary.report() for summary in summaries},
    }
    errors = [error for summary in summaries for error in summary.errors]
    numbers = [np.asarray([n for s in summaries for n in getattr(s, name)], np.int64) for name in ("tokens", "tiles")]
    write_report(pathlib.Path(folder), report, errors, *numbers)
    return report


def print_report(report: dict, folder: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=report["meta"])
    table.add_column("source", overflow="fold")
    for name in ("rows", "errors", "cut or dropped", "same id", "pictures", "tokens mean", "max", "tiles mean", "max"):
        table.add_column(name, justify="right")
    for name, source in report["sources"].items():
        tokens, tiles = source["tokens"], source["tiles"]
        counts = [source[key] for key in ("rows", "errors", "shortened_or_dropped", "duplicate_ids", "pictures")]
        table.add_row(name, *(f"{n:,}" for n in [*counts, tokens["mean"], tokens["max"], tiles["mean"], tiles["max"]]))
    console.print(table)
    for name, source in report["sources"].items():
        for error in source["first_errors"]:
            console.print(f"{name} row {error['row']}: {error['reason']}", markup=False, highlight=False, soft_wrap=True)
    for warning in report["warnings"]:
        console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{report['errors']:,} errors; all of them in {folder}/{ERRORS}", markup=False, soft_wrap=True)
    data = report["settings"]["data"]
    room = f"{data['tokens_per_row']:,} tokens and {data['tiles_per_row']} tiles"
    console.print(f"one pass fills at least {rows_of(report):,} rows of {room}", markup=False, soft_wrap=True)


def rows_of(report: dict) -> int:
    """Packed rows that one sample of each row of the files would fill if packing lost nothing: divided by data.rows, an epoch's steps."""
    needed = [
        sum(source[name]["sum"] for source in report["sources"].values())
        / max(1, report["settings"]["data"][f"{name}_per_row"])
        for name in ("tokens", "tiles")
    ]
    return math.ceil(max(needed))


def read_processor(directory: str, max_tiles: int | None) -> ProcessorConfig:
    """That of a converted checkpoint, or the released models' for a directory of a tokenizer alone."""
    path = pathlib.Path(directory) / "internvl3_jax.json"
    processor = ProcessorConfig()
    if path.is_file():
        processor = from_dict(ProcessorConfig, json.loads(path.read_text(encoding="utf-8"))["processor"], f"{path}: processor")
    return processor if max_tiles is None else dataclasses.replace(processor, max_tiles=max_tiles)


def main(arguments: list[str] | None = None) -> int:
    flag = functools.partial(argparse.ArgumentParser.add_argument)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag(parser, "meta", help="meta JSON")
    flag(parser, "--tokenizer", required=True, help="converted checkpoint, or a directory with a tokenizer's files")
    flag(parser, "--max_tiles", type=int, help="of a sample's pictures together, in place of the checkpoint's")
    flag(parser, "--tokens_per_row", type=int, default=DataConfig.tokens_per_row)
    flag(parser, "--tiles_per_row", type=int, default=DataConfig.tiles_per_row)
    flag(parser, "--max_frames", type=int, default=DataConfig.max_frames, help="of a video")
    flag(parser, "--overlong", default=DataConfig.overlong, choices=("error", "truncate", "drop"), help="as data.overlong")
    flag(parser, "--pairs", action="store_true", help="as data.pairs: rows are a question, a chosen and a rejected answer")
    flag(parser, "--workers", type=int, default=0, help="processes; 0: this one")
    flag(parser, "--report", help="folder to write to (META.doctor, where training looks)")
    options = parser.parse_args(arguments)
    config = DataConfig(
        source=options.meta,
        tokenizer=options.tokenizer,
        tokens_per_row=options.tokens_per_row,
        tiles_per_row=options.tiles_per_row,
        max_frames=options.max_frames,
        overlong=options.overlong,
        pairs=options.pairs,
    )
    folder = options.report or report_folder(options.meta)
    try:
        tokenizer = Tokenizer.from_directory(options.tokenizer)
        processor = read_processor(options.tokenizer, options.max_tiles)
        report = examine(config, processor, tokenizer, folder, options.workers)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_report(report, folder)
    return 1 if report["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
