"""Converts checkpoints between the released safetensors layouts and ours.

python -m convert SRC DST                       released model (directory or hub id) -> checkpoint
python -m convert SRC DST --to internvl|hf      checkpoint or run -> original code / transformers
python -m convert LORA_RUN DST [--to ...]       adapters merged into their base, and verified
python -m convert SRC DST --adapter DIR [...]   the same for a model and a PEFT directory
python -m convert RUN_OR_PEFT DST --to peft-hf|peft-internvl    only the adapters, for PEFT
python -m convert SRC DST --quantize int8|fp8   checkpoint for inference with weights of fewer bits
python -m convert --llm DIR --vision DIR DST    language model + InternViT -> new model
"""

import argparse
import logging
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from convert.compose import open_parts
from convert.open import Adapted, export_adapter, open_model, open_run, open_with_peft
from convert.quantized import Quantization
from convert.run import convert
from internvl3_jax.checkpoints.checkpoint import load
from internvl3_jax.checkpoints.hf.assemble import DTYPES, ConversionError
from internvl3_jax.data.text.tokenizer import Tokenizer
from internvl3_jax.data.text.tokenizer_files import MERGES, with_merges
from internvl3_jax.inference import quality
from internvl3_jax.io import command_line
from internvl3_jax.io.checkpoint_paths import resolve_checkpoint, resolve_hub_dir
from internvl3_jax.io.terminal import excerpt
from internvl3_jax.model import weights
from internvl3_jax.model.ops.quantize import FORMATS


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    started = time.perf_counter()
    dtype = None if options.dtype == "keep" else options.dtype
    try:
        options.target = check_target(options.target, options.overwrite)
        if options.to and options.to.startswith("peft-"):
            return export(options)
        if options.llm:
            parts = resolve_hub_dir(options.llm), resolve_hub_dir(options.vision)
            model = open_parts(*parts, dtype, options.seed, options.allow_nonfinite)
        else:
            model = open_source(options, dtype)
        if options.tokenizer_merges:
            model.files = with_merges(model.files, options.tokenizer_merges)
            model.tokenizer = Tokenizer.from_files(model.files, str(options.target))
        merges = isinstance(model, Adapted)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
        )
        quantize = None
        if options.quantize:
            weights.check(options.quantize, where="--quantize")
            quantize = Quantization(options.quantize, options.quantize_tower)
        with Progress(*columns) as progress:
            hashes = convert(
                model,
                options.target,
                to=options.to,
                quantize=quantize,
                check=quality_check(options) if options.check_quality else None,
                verify=options.verify or merges,
                shard_size=options.shard_size,
                overwrite=options.overwrite,
                sources=[
                    path
                    for path in (options.llm, options.vision, options.adapter, options.base)
                    if path
                ],
                advance=_advance(progress),
            )
    except (ValueError, OSError, ImportError) as error:
        where = (
            f"{options.target}: "
            if isinstance(error, OSError) and error.errno and not error.filename
            else ""
        )
        print(f"error: {where}{command_line.message(error)}", file=sys.stderr)
        return 1
    if options.llm:
        print(model.origins())
    what = f"{options.to} safetensors" if options.to else "checkpoint"
    if not options.llm and model.directory.parent.name == "checkpoints":
        what += f" of step {model.directory.name}"
    checked = "; every tensor read again, hashes equal" if options.verify or merges else ""
    what += f", adapters of {len(model.pairs)} stacked layers merged" if merges else ""
    what += f" with {options.quantize} weights" if options.quantize else ""
    print(
        f"{options.target}: {what}, {len(hashes)} tensors, {model.dtype}, "
        f"{time.perf_counter() - started:.1f} s{checked}"
    )
    return 0


def open_source(options: argparse.Namespace, dtype: str | None):
    """Opens SRC as a model, with the adapter of --adapter merged."""
    directory = resolve_checkpoint(options.source)
    if options.base and options.adapter:
        raise ConversionError(
            "--base is for a LoRA run and --adapter for a full model: give one of them"
        )
    if options.base:
        return open_run(
            directory, dtype, options.accept_fingerprint, options.base, options.allow_nonfinite
        )
    model = open_model(
        directory,
        None if options.adapter else dtype,
        options.accept_fingerprint,
        options.allow_nonfinite,
    )
    return (
        open_with_peft(model, pathlib.Path(options.adapter), dtype, options.allow_nonfinite)
        if options.adapter
        else model
    )


def quality_check(options: argparse.Namespace) -> Callable[[pathlib.Path], None]:
    """Returns a function that compares a written checkpoint with SRC; it raises ConversionError."""
    thresholds = options.max_kl, options.min_agreement

    def check(written: pathlib.Path) -> None:
        dtype = quality.default_dtype()
        accept = {"accept_fingerprint": options.accept_fingerprint}
        measured = quality.measure(
            lambda: load(written, dtype=dtype),
            lambda: load(options.source, dtype=dtype, base=options.base, **accept),
        )
        print(measured.table(*thresholds))
        if not measured.passes(*thresholds):
            raise ConversionError(
                f"{options.quantize} weights are further from the original than --max_kl and "
                "--min_agreement allow, so nothing is written; choose another format or other "
                "thresholds"
            )

    return check


def check_target(target: str, overwrite: bool) -> pathlib.Path | str:
    """Returns DST as a path or address; ValueError or OSError if it cannot be written."""
    if not target.strip() or "\0" in target:
        raise ConversionError(f"DST is {excerpt(target)}; name a directory to write")
    if "://" in target:
        return target
    try:
        path = pathlib.Path(target).expanduser().absolute()
    except RuntimeError as error:
        raise ConversionError(f"DST {excerpt(target)}: {error}; write the full path") from error
    if any(len(os.fsencode(part)) > 200 for part in path.parts):
        raise ConversionError(
            f"DST {excerpt(target)}: a name has more than 200 bytes; choose a shorter one"
        )
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(
            f"{path} exists; choose another place or allow overwriting (--overwrite)"
        )
    parent = next((place for place in path.parents if os.path.lexists(place)), path)
    if not parent.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {parent} is not a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: {parent} is not writable")
    return path


def export(options: argparse.Namespace) -> int:
    layout = options.to.removeprefix("peft-")
    count = export_adapter(options.source, options.target, layout, options.base, options.overwrite)
    print(f"{options.target}: PEFT adapter for the {layout} layout, {count} tensors")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_line.Parser("convert", description=__doc__)
    parser.add_argument(
        "paths", nargs="+", metavar="SRC DST", help="with --llm and --vision only DST"
    )
    result = parser.add_argument_group("Result").add_argument
    result(
        "--to",
        choices=("internvl", "hf", "peft-internvl", "peft-hf"),
        help="write safetensors of this layout, or adapters for it, instead of a checkpoint",
    )
    result("--dtype", choices=("keep", *DTYPES), default="keep", help="of the parameters (keep)")
    result(
        "--shard_size",
        type=parse_size,
        default="5GB",
        metavar="SIZE",
        help="most bytes in one safetensors file (5GB)",
    )
    result("--overwrite", action="store_true", help="replace DST if it exists")
    result(
        "--tokenizer_merges",
        choices=MERGES,
        help="rules of merges.txt that DST's tokenizer uses; 'slow' leaves out those that begin "
        "with #, as transformers 4.37 did",
    )

    adapters = parser.add_argument_group("Adapters").add_argument
    adapters("--adapter", metavar="DIR", help="PEFT directory to merge into SRC")
    adapters(
        "--base",
        metavar="DIR",
        help="path of the base of a LoRA run or PEFT adapter, if not the recorded one",
    )

    quantized = parser.add_argument_group("Weights of fewer bits")
    quantized.add_argument(
        "--quantize",
        choices=FORMATS,
        help="write the kernels of decoder layers and head in this format, for inference alone",
    )
    quantized.add_argument(
        "--quantize_tower",
        action="store_true",
        help="with --quantize, those of the vision tower and the projector, too",
    )
    quantized.add_argument(
        "--check_quality",
        action="store_true",
        help="with --quantize, write only what answers as SRC does, within the next two",
    )
    quality.add_thresholds(quantized)

    composed = parser.add_argument_group("New model").add_argument
    composed(
        "--llm", metavar="DIR", help="directory or hub id of a Qwen2.5 or InternLM3 language model"
    )
    composed(
        "--vision",
        metavar="DIR",
        help="directory or hub id of an InternViT or of an InternVL model",
    )
    composed("--seed", type=int, default=0, metavar="N", help="of the random projector (0)")
    _add_checks(parser.add_argument_group("Checks"))
    return parser


def _add_checks(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--verify",
        action="store_true",
        help="read source and result again and compare sha256 hashes",
    )
    group.add_argument(
        "--accept_fingerprint",
        action="store_true",
        help="convert although files disagree with how it was made",
    )
    group.add_argument(
        "--allow_nonfinite",
        action="store_true",
        help="convert weights that are NaN or infinite, which is an error otherwise",
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    options = parser.parse_args(arguments)
    if bool(options.llm) != bool(options.vision):
        parser.error("--llm and --vision belong together")
    if len(options.paths) != (1 if options.llm else 2):
        parser.error("expected DST alone with --llm and --vision, SRC and DST without them")
    options.source, options.target = options.paths[0], options.paths[-1]
    if options.quantize and options.to:
        parser.error(
            "--quantize writes a checkpoint, and --to another layout, which has no such weights; "
            "leave one of them out"
        )
    if options.quantize_tower and not options.quantize:
        parser.error("--quantize_tower is about --quantize; give that, too, such as int8")
    if options.check_quality and (not options.quantize or options.adapter or options.llm):
        parser.error("--check_quality compares SRC with --quantize; it takes no --adapter or --llm")
    if options.tokenizer_merges and options.to and options.to.startswith("peft-"):
        parser.error("--tokenizer_merges is for a model, and --to peft-... writes none")
    return options


def parse_size(text: str) -> int:
    """Returns the bytes of "5GB", "200MB" or "1000000"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write it as 5GB or 200MB")
    size = int(float(match[1][:20]) * 1000 ** " KMGT".index(match[2].upper() or " "))
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is too small; write it as 5GB or 200MB")
    return size


def _advance(progress: Progress):
    """Shows each phase of a conversion as a separate bar."""
    tasks = {}

    def advance(phase: str, done: int, total: int) -> None:
        if phase not in tasks:
            tasks[phase] = progress.add_task(phase, total=total)
        progress.update(tasks[phase], completed=done)

    return advance


if __name__ == "__main__":
    sys.exit(main())
