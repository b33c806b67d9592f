"""Measures this package on one NVIDIA GPU, compares it with PyTorch on the same card, and checks
its numbers.

    python benchmarks/gpu.py --output /tmp/gpu                     everything, at most 9 minutes
    python benchmarks/gpu.py --output /tmp/gpu                     again: what is still missing
    python benchmarks/gpu.py --output /tmp/gpu --parts ceilings,correctness
    python benchmarks/gpu.py --output /tmp/gpu --retry             also what failed
    python benchmarks/gpu.py --output /tmp/smoke --smoke           tiny shapes on a CPU

Each part is a process of its own with a time limit, the most valuable first. Each case writes a
line to OUTPUT/results.jsonl as soon as it is known; a case that fails or hangs writes its error,
and the rest continues. At the end OUTPUT/summary.md compares with PyTorch and with the card's
measured ceilings. OUTPUT has at most five files: these two, results.json, log.txt, and
autotune.tar.gz, the compiler's measured choices, which a later call loads.

Needs jax with CUDA, flax, optax, orbax-checkpoint, torch, transformers (which brings tokenizers and
safetensors), jaxtyping and pillow; not grain, av, tensorboardX, rich or sentencepiece. Where a
machine without network lacks jaxtyping (which needs wadler-lindig) or pillow, carry the wheels:

    pip download --no-deps -d wheels jaxtyping wadler-lindig pillow        here
    pip install --no-index --no-deps --target site wheels/*.whl            there
    PYTHONPATH=site python benchmarks/gpu.py --output results
"""

import argparse
import dataclasses
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_parts import runner, summary
from benchmarks.gpu_parts.part import Part

PACKAGE = "benchmarks.gpu_parts"
NO_TRITON = "--xla_gpu_enable_triton_gemm=false"
SMOKE_SECONDS = 3600
# {autotune} is the folder of the compiler's measured choices.
OWN_AUTOTUNE = "--xla_gpu_per_fusion_autotune_cache_dir={autotune}/compile"

# The most valuable first. PyTorch runs between ours, on the same warm card.
PARTS = (
    Part("ceilings", f"{PACKAGE}.ceilings", "", 30),
    Part("correctness", f"{PACKAGE}.correctness", "", 150),
    Part("inference 1b", f"{PACKAGE}.inference", "1b", 130),
    Part("torch 1b", f"{PACKAGE}.torch_inference", "1b", 60),
    Part("train 1b", f"{PACKAGE}.training", "1b", 90),
    Part("torch train 1b", f"{PACKAGE}.torch_training", "1b", 45),
    Part("inference 8b", f"{PACKAGE}.inference", "8b", 95),
    Part("torch 8b", f"{PACKAGE}.torch_inference", "8b", 60),
    Part("compile 1b measuring", f"{PACKAGE}.compiling", "1b", 60, OWN_AUTOTUNE),
    Part("compile 1b loading", f"{PACKAGE}.compiling", "1b", 45, OWN_AUTOTUNE),
    Part("engine 1b", f"{PACKAGE}.engine", "1b", 150),
    Part("train 2b", f"{PACKAGE}.training", "2b", 70),
    Part("torch train 2b", f"{PACKAGE}.torch_training", "2b", 50),
    Part("torch compiled 1b", f"{PACKAGE}.torch_compiled", "1b", 150),
    Part("inference 2b", f"{PACKAGE}.inference", "2b", 120),
    Part("torch 2b", f"{PACKAGE}.torch_inference", "2b", 45),
    Part("inference 1b without triton", f"{PACKAGE}.inference", "1b", 80, NO_TRITON),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--minutes", type=float, default=9, help="for the whole call (9)")
    parser.add_argument("--parts", default="", help="comma-separated names; all if empty")
    parser.add_argument("--retry", action="store_true", help="run failed cases again")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--list", action="store_true", help="print the names of the parts")
    options = parser.parse_args(argv)
    if options.list:
        print("\n".join(part.name for part in PARTS))
        return 0

    names = [name.strip() for name in options.parts.split(",") if name.strip()]
    if unknown := set(names) - {part.name for part in PARTS}:
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}; --list prints the names")
    parts = [part for part in PARTS if part.name in names or not names]
    if options.smoke and not names:
        # Other sizes run the same lines.
        first = {part.target: part for part in reversed(PARTS)}
        parts = [part for part in PARTS if first[part.target] is part]

    seconds = 60 * options.minutes
    if options.smoke:  # a busy CPU may take long; nothing is measured
        seconds = max(seconds, SMOKE_SECONDS)
        parts = [dataclasses.replace(part, seconds=seconds) for part in parts]
    runner.run_parts(parts, options.output, seconds, smoke=options.smoke, retry=options.retry)
    text = summary.write(options.output)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
