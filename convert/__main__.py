"""Converts checkpoints between the released safetensors layouts and ours.

python -m convert SRC DST                        released model (directory or hub id) -> checkpoint; the layout is detected
python -m convert SRC DST --to internvl|hf       checkpoint or training run -> what the original code / transformers load
python -m convert --llm DIR --vision DIR DST     language model + InternViT -> new model with a random projector
"""

import argparse
import logging
import re
import sys
import time

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from convert.assemble import DTYPES
from convert.compose import open_parts
from convert.run import convert
from convert.source import open_model
from internvl3_jax.find import find, find_released


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    started = time.perf_counter()
    dtype = None if options.dtype == "keep" else options.dtype
    try:
        if options.llm:
            model = open_parts(find_released(options.llm), find_released(options.vision), dtype, options.seed)
        else:
            model = open_model(find(options.source), dtype, options.accept_fingerprint)
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress:
            hashes = convert(
                model,
                options.target,
                to=options.to,
                verify=options.verify,
                shard_size=options.shard_size,
                overwrite=options.overwrite,
                advance=_advance(progress),
            )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.llm:
        print(model.origins())
    what = f"{options.to} safetensors" if options.to else "checkpoint"
    checked = "; every tensor read again, hashes equal" if options.verify else ""
    print(f"{options.target}: {what}, {len(hashes)} tensors, {model.dtype}, {time.perf_counter() - started:.1f} s{checked}")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="SRC DST", help="with --llm and --vision only DST")
    parser.add_argument("--to", choices=("internvl", "hf"), help="write safetensors of this layout instead of a checkpoint")
    parser.add_argument("--dtype", choices=("keep", *DTYPES), default="keep")
    parser.add_argument("--verify", action="store_true", help="read source and result again and compare sha256 hashes")
    parser.add_argument("--shard_size", type=parse_size, default="5GB", help="most bytes in one safetensors file (5GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    parser.add_argument(
        "--accept_fingerprint", action="store_true", help="convert although files disagree with how it was made"
    )
    parser.add_argument("--llm", help="directory or hub id of a Qwen2.5 or InternLM3 language model")
    parser.add_argument("--vision", help="directory or hub id of an InternViT or of an InternVL model")
    parser.add_argument("--seed", type=int, default=0, help="of the random projector")
    options = parser.parse_args(arguments)
    if bool(options.llm) != bool(options.vision):
        parser.error("--llm and --vision belong together")
    if len(options.paths) != (1 if options.llm else 2):
        parser.error("expected DST alone with --llm and --vision, SRC and DST without them")
    options.source, options.target = options.paths[0], options.paths[-1]
    return options


def parse_size(text: str) -> int:
    """Bytes of "5GB", "200MB", "1000000"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it as 5GB or 200MB")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


def _advance(progress: Progress):
    """Shows each phase of a conversion as a bar of its own."""
    tasks = {}

    def advance(phase: str, done: int, total: int) -> None:
        if phase not in tasks:
            tasks[phase] = progress.add_task(phase, total=total)
        progress.update(tasks[phase], completed=done)

    return advance


if __name__ == "__main__":
    sys.exit(main())
