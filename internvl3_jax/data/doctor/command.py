"""Reads every sample of the training data once, as training will, and lists what cannot be used.

    python -m internvl3_jax.data.doctor SOURCE --tokenizer CHECKPOINT

SOURCE is what data.source takes: a file of rows (.jsonl, .json, .tar, .array_record) or a meta JSON
that names several. Every image and video is decoded, a video with its largest number of frames;
every conversation is encoded. The program prints a table and writes report.json, histogram.png and
errors.tsv to SOURCE.doctor or to --report. Training leaves out the rows of errors.tsv with
data.exclude_file. The exit status is 1 if there are errors.

Errors: a row, image or video that cannot be read; tags that do not match the images; roles that do
not take turns; nothing to learn; more tokens or tiles than a row holds (a warning with --overlong
truncate or drop). Warnings: ids that occur twice; empty answers; tags without an image, which are
read as text; a length in the meta JSON that is not the number of rows.
"""

import argparse
import dataclasses
import os
import pathlib
import sys

from internvl3_jax.config import TILE_RULES, DataConfig, ProcessorConfig, from_dict
from internvl3_jax.data.doctor.examine import examine
from internvl3_jax.data.doctor.report import report_folder
from internvl3_jax.data.doctor.table import print_report
from internvl3_jax.data.text.tokenizer import Tokenizer
from internvl3_jax.data.truncation import RULES
from internvl3_jax.io import command_line
from internvl3_jax.io.checkpoint_paths import MANIFEST, resolve_checkpoint
from internvl3_jax.io.strict_json import read_object

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")


def read_processor(directory: str | os.PathLike, max_tiles: int | None) -> ProcessorConfig:
    """Returns the settings of a converted checkpoint, or else those of the released models."""
    path = pathlib.Path(directory) / MANIFEST
    processor = ProcessorConfig()
    if path.is_file():
        processor = from_dict(
            ProcessorConfig, read_object(path).get("processor", dict), f"{path}: processor"
        )
    return processor if max_tiles is None else dataclasses.replace(processor, max_tiles=max_tiles)


def find_tokenizer(path: str) -> pathlib.Path:
    """Returns the directory itself if it has a tokenizer's files, or else resolves a checkpoint."""
    directory = pathlib.Path(os.path.expanduser(path))
    if any((directory / name).is_file() for name in TOKENIZER_FILES):
        return directory
    return resolve_checkpoint(path)


def integer(low: int, high: int = 2**31 - 1):
    """Returns an argparse type: an integer within bounds."""

    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    return parse


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; returns its exit status."""
    options = _parser().parse_args(arguments)
    return command_line.call(lambda: run(options))


def _parser() -> argparse.ArgumentParser:
    parser = command_line.Parser("doctor", description=__doc__)
    flag = parser.add_argument
    flag("source", help="meta JSON, or a file of rows: .jsonl, .json, .tar, .array_record")
    flag(
        "--tokenizer",
        required=True,
        help="checkpoint, training run, released model, hub id, or a tokenizer's directory",
    )
    flag(
        "--max_tiles",
        type=integer(1, 1024),
        help="tiles of an image, or of a sample's images together; see --tiles (the checkpoint's)",
    )

    def setting(name: str, help: str = "as data.{name}", **options) -> None:
        """Adds a flag with the name and the default of a data setting."""
        text = f"{help.format(name=name)} (%(default)s)"
        flag(f"--{name}", default=getattr(DataConfig, name), help=text, **options)

    setting("tiles", "as data.tiles: what --max_tiles limits", choices=TILE_RULES)
    setting("tokens_per_row", type=integer(1))
    setting("tiles_per_row", type=integer(0))
    setting("max_frames", "frames of a video", type=integer(1, 100_000))
    setting("max_image_pixels", type=integer(0))
    setting("overlong", choices=RULES)
    flag(
        "--allow_truncated",
        action="store_true",
        help="as data.allow_truncated: use images whose end is missing",
    )
    flag(
        "--pairs",
        action="store_true",
        help="as data.pairs: rows are a question, a chosen and a rejected answer",
    )
    flag("--workers", type=integer(0, 1024), default=0, help="processes; 0: this one (%(default)s)")
    flag("--report", help="folder to write to (SOURCE.doctor, where training looks)")
    return parser


def run(options: argparse.Namespace) -> int:
    """Examines what the options name, prints the report and returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A terminal that cannot show a name shows its code.
            stream.reconfigure(errors="backslashreplace")
    config = DataConfig(
        source=options.source,
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
    folder = os.path.expanduser(options.report) if options.report else report_folder(options.source)
    directory = find_tokenizer(options.tokenizer)
    processor = read_processor(directory, options.max_tiles)
    report = examine(
        config, processor, Tokenizer.from_directory(directory), folder, options.workers
    )
    print_report(report, folder)
    return 1 if report["errors"] else 0
