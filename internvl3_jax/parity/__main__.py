"""Writes numbers of the model, and compares any engine with them.

    python -m internvl3_jax.parity pack --output DIR                    tiny models
    python -m internvl3_jax.parity pack --output DIR --checkpoint PATH  goldens of a checkpoint
    python -m internvl3_jax.parity check DIR --engine jax               this package
    python -m internvl3_jax.parity check DIR --engine transformers      PyTorch
    python -m internvl3_jax.parity check DIR --engine http --url URL    a server
    python -m internvl3_jax.parity check DIR --engine command --command "python ENGINE.py"

`check` exits with 0 if all cases are equal, with 1 if one differs or there is an error, and with 2
if the command line is wrong. All engines but jax need numpy alone, and what they run.
"""

import argparse
import pathlib
import sys

from internvl3_jax import cli
from internvl3_jax.parity.check import check_model
from internvl3_jax.parity.compare import TOLERANCES
from internvl3_jax.parity.folder import PackedModel, PackError, read_manifest
from internvl3_jax.parity.tiny_config import FAMILIES

ENGINES = ("jax", "transformers", "http", "command")
LAYOUTS = ("internvl", "hf")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    # Not io.command_line, whose imports are more than numpy.
    parser = argparse.ArgumentParser(
        "python -m internvl3_jax.parity",
        description=cli.as_typed(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command_name", required=True)
    pack = commands.add_parser("pack", help="write a pack", allow_abbrev=False)
    pack.add_argument("--output", type=pathlib.Path, required=True, help="new folder")
    pack.add_argument("--checkpoint", help="checkpoint, run, released directory or hub id")
    pack.add_argument(
        "--dtype", choices=tuple(TOLERANCES), default="float32", help="of --checkpoint's run"
    )
    pack.add_argument(
        "--family",
        action="append",
        default=[],
        choices=tuple(FAMILIES),
        help="one of the tiny models; repeatable; default: all",
    )
    pack.add_argument("--seed", type=int, default=0, help="of the weights and images")
    check = commands.add_parser("check", help="compare an engine", allow_abbrev=False)
    check.add_argument("folder", type=pathlib.Path, metavar="DIR", help="the pack")
    check.add_argument("--engine", choices=ENGINES, required=True)
    check.add_argument("--checkpoint", help="of a pack that holds no weights")
    check.add_argument("--layout", choices=LAYOUTS, help="hf for transformers, else internvl")
    check.add_argument("--model", help="name of one model of the pack")
    check.add_argument("--case", action="append", default=[], help="name of one case; repeatable")
    check.add_argument(
        "--dtype", choices=tuple(TOLERANCES), help="of the engine; default: of the goldens"
    )
    check.add_argument("--url", help="of --engine http, such as http://localhost:8000/v1")
    check.add_argument("--served_name", help="of the model of --engine http")
    check.add_argument(
        "--ours",
        action="store_true",
        help="the server is internvl3_jax.serve, which has fields for frames and V2PE steps",
    )
    check.add_argument("--command", help="of --engine command")
    options = parser.parse_args(arguments)
    if options.command_name == "check":
        for engine, flag in (("http", "url"), ("command", "command")):
            if (options.engine == engine) != bool(getattr(options, flag)):
                parser.error(f"--engine {engine} and --{flag} belong together")
    elif options.family and options.checkpoint:
        parser.error("--family is for tiny models; leave it out with --checkpoint")
    elif options.dtype != "float32" and not options.checkpoint:
        parser.error("--dtype is for --checkpoint; tiny models are computed in float32")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        return pack(options) if options.command_name == "pack" else check(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def pack(options: argparse.Namespace) -> int:
    from internvl3_jax.parity.pack import write_pack

    families = tuple(options.family or FAMILIES)

    def report(model: PackedModel) -> None:
        print(f"{model.name}: {model.dtype}, {len(model.cases)} cases", flush=True)

    write_pack(options.output, options.checkpoint, options.dtype, options.seed, families, report)
    print(f"{options.output}: written")
    return 0


def check(options: argparse.Namespace) -> int:
    models = read_manifest(options.folder)
    if options.model:
        names = ", ".join(model.name for model in models)
        models = [model for model in models if model.name == options.model]
        if not models:
            raise PackError(f"{options.folder} has no model {options.model!r}; it has {names}")
    if options.engine == "http" and len(models) > 1:
        names = ", ".join(model.name for model in models)
        raise PackError(f"a server has one model; name it with --model, one of {names}")
    results = []
    for model in models:
        layout = options.layout or ("hf" if options.engine == "transformers" else "internvl")
        dtype = options.dtype or model.dtype
        print(f"{model.name}, {options.engine}, {dtype}:")
        engine = open_engine(options, model, layout, dtype)
        try:
            results += check_model(options.folder, model, engine, dtype, options.case)
        finally:
            if hasattr(engine, "close"):
                engine.close()
    failed = sum(not result.passed for result in results)
    left_out = sum(result.is_left_out for result in results)
    print(f"{len(results) - failed - left_out} equal, {failed} not, {left_out} left out")
    return 1 if failed else 0


def open_engine(options: argparse.Namespace, model: PackedModel, layout: str, dtype: str):
    """Returns the engine of the command line for a model."""
    checkpoint = options.checkpoint
    if checkpoint is None and model.checkpoints:
        checkpoint = str(options.folder / model.checkpoints[layout])
    if options.engine == "http":
        from internvl3_jax.parity.http_engine import HttpEngine

        return HttpEngine(options.url, options.served_name, options.ours)
    if options.engine == "command":
        from internvl3_jax.parity.command_engine import CommandEngine

        return CommandEngine(options.command, checkpoint)
    if checkpoint is None:
        raise PackError(f"{options.folder} holds no weights; name them with --checkpoint")
    if options.engine == "transformers":
        from internvl3_jax.parity.transformers_engine import TransformersEngine

        return TransformersEngine(checkpoint, model, dtype)
    from internvl3_jax.parity.jax_engine import JaxEngine

    return JaxEngine(checkpoint, dtype)


if __name__ == "__main__":
    sys.exit(main())
