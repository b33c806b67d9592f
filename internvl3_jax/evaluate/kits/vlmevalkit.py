"""Runs VLMEvalKit with a checkpoint of this package.

    python -m internvl3_jax.evaluate.kits.vlmevalkit --checkpoint DIR -- --data MMStar \\
        --mode infer --work-dir runs/kit
    python -m internvl3_jax.evaluate.kits.vlmevalkit --checkpoint DIR --delta 1/4 \\
        --run_py VLMEvalKit/run.py -- --data MMStar --judge exact_matching

Options after -- are those of the kit's run.py; --model is added. LMUData is the folder of
its tables, which the kit downloads if they are missing. docs/evaluation.md has more.
"""

import functools
import importlib.util
import pathlib
import runpy
import sys

from internvl3_jax.evaluate.kits.asked_model import CACHE
from internvl3_jax.io import command_line
from internvl3_jax.io.command_line import UsageError
from internvl3_jax.io.terminal import one_line


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; returns its exit status."""
    options = _parser().parse_args(arguments)
    return command_line.call(lambda: run(options))


def _parser():
    parser = command_line.Parser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="as of internvl3_jax.evaluate")
    parser.add_argument("--name", default="internvl3_jax", help="of the model (%(default)s)")
    parser.add_argument("--run_py", type=pathlib.Path, help="run.py of a clone of VLMEvalKit")
    parser.add_argument("--delta", help="V2PE step, such as 1/4 (the checkpoint's own)")
    parser.add_argument("--max_tiles", type=int, help="of an image (the benchmark's)")
    parser.add_argument("--max_new_tokens", type=int, help="longest answer, where it may be longer")
    parser.add_argument(
        "--reasoning",
        choices=("auto", "on", "off"),
        default="auto",
        help="ask for reasoning in the reasoning tasks; auto: above 2B, as for the card (auto)",
    )
    parser.add_argument("--batch_size", type=int, default=8, help="answers together (%(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of parameters and computation (float32 on a CPU, elsewhere as stored)",
    )
    parser.add_argument("--devices", type=int, help="number of devices to shard the model over (1)")
    parser.add_argument(
        "--fsdp", type=int, default=1, help="of these, to shard the width over (%(default)s)"
    )
    parser.add_argument(
        "--compilation_cache",
        default=CACHE,
        help="directory that keeps compiled programs; empty: none (%(default)s)",
    )
    parser.add_argument("kit", nargs="*", help="after --: options of run.py")
    return parser


def run(options) -> int:
    """Registers the model and runs the kit's run.py. Raises UsageError if there is none."""
    given = vars(options).copy()
    name, run_py, kit = (given.pop(key) for key in ("name", "run_py", "kit"))
    if run_py is not None and not run_py.is_file():
        raise UsageError(f"--run_py {one_line(str(run_py))}: no such file")
    if run_py is not None:
        sys.path.insert(0, str(run_py.resolve().parent))
    if importlib.util.find_spec("vlmeval") is None:
        raise UsageError("VLMEvalKit is not installed; install it, or name --run_py of a clone")
    if run_py is None and importlib.util.find_spec("vlmeval.run") is None:
        raise UsageError("this VLMEvalKit has no vlmeval.run; give --run_py, of a clone of it")
    if "--model" in kit:
        raise UsageError("--model is added; --name chooses the name of the model")
    register(name, **given)
    nproc = [] if "--api-nproc" in kit else ["--api-nproc", str(2 * options.batch_size)]
    sys.argv = ["run.py", *kit, "--model", name, *nproc]
    if run_py is None:
        runpy.run_module("vlmeval.run", run_name="__main__")
    else:
        runpy.run_path(str(run_py), run_name="__main__")
    return 0


def register(name: str, **arguments) -> None:
    """Makes a model known to VLMEvalKit by a name. arguments: of `InternVL3JAX`."""
    import vlmeval.vlm
    from vlmeval.config import supported_VLM

    from internvl3_jax.evaluate.kits.vlmevalkit_model import InternVL3JAX

    vlmeval.vlm.InternVL3JAX = InternVL3JAX  # for --config of run.py, which looks there
    supported_VLM[name] = functools.partial(InternVL3JAX, **arguments)


if __name__ == "__main__":
    sys.exit(main())
