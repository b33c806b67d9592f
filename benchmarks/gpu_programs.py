"""Counts the kernels of the programs for an H100, by its compiler. Needs no GPU.

    python benchmarks/gpu_programs.py --output results.json [--only "train 1b"]

For each program: launches, bytes, loops without a known number of iterations (before each iteration
of which the host waits for the device), peak memory, and for train steps the time that
internvl3_jax/fit/gpu_time.py predicts. The programs are those of train.py and of the Generator,
compiled from shapes, in bfloat16, with this package's compiler options.

Needs jax's CUDA plugin and cuDNN's library, both without a driver:

    pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt nvidia-cudnn-cu13
"""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"
import jax

from internvl3_jax.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from internvl3_jax.fit import gpu_time, kernels, topology
from internvl3_jax.fit.lowering import Requests, lower_generation, lower_train_step
from internvl3_jax.fit.memory import estimate
from internvl3_jax.fit.per_device import per_device
from internvl3_jax.fit.step_cost import train_cost
from internvl3_jax.inference.programs import TOKENS_PER_CALL
from internvl3_jax.model_config import ProcessorConfig
from internvl3_jax.parallel.sharding import make_mesh
from internvl3_jax.sizes import SIZES

TOPOLOGY = "h100:1x1x1"
# A row of four samples with 12 tiles each; as many samples are allowed as in the recipes.
TOKENS, TILES, SAMPLES, ALLOWED = 16_384, 48, 4, 64
REMAT = (
    ("full", "full"),
    ("attention", "attention"),
    ("attention", "dots"),
    ("dots", "attention"),
    ("dots", "dots"),
)
PROMPT, NEW = 3_840, 256
TRAIN = {
    f"train {size}, remat {vision} (tower), {language} (decoder)": (size, vision, language)
    for size in ("1b", "2b")
    for vision, language in REMAT
}
# Without loops over the layers (scan_unroll): slow to compile.
UNROLLED = {
    f"train {size}, unrolled, remat {vision} (tower), {language} (decoder)": (
        size,
        vision,
        language,
    )
    for size, vision, language in (("1b", "dots", "dots"), ("2b", "attention", "dots"))
}
# Fewer bits than bfloat16; the name of a program ends with it.
FEW = {
    "": {},
    ", int8": {"weights": "int8"},
    ", fp8": {"weights": "fp8"},
    ", int8 with int8 cache": {"weights": "int8", "cache": "int8"},
}
GENERATION = {
    f"{program} {size}, {count} {'tiles' if program == 'encode' else 'rows'}{few}": (
        program,
        size,
        count,
        few,
    )
    for program, size, count, few in (
        ("encode", "1b", 1, ""),
        ("encode", "1b", 8, ""),
        ("encode", "1b", 13, ""),
        ("prefill", "1b", 1, ""),
        ("prefill", "1b", 2, ""),
        ("prefill", "8b", 1, ""),
        ("prefill", "8b", 64, ""),
        ("decode", "1b", 1, ""),
        ("decode", "2b", 1, ""),
        ("decode", "8b", 1, ""),
        ("decode", "8b", 64, ""),
        ("decode", "1b", 1, ", int8"),
        ("decode", "2b", 1, ", int8"),
        ("decode", "8b", 1, ", int8"),
        ("decode", "8b", 64, ", int8"),
        ("decode", "8b", 64, ", int8 with int8 cache"),
        ("decode", "8b", 1, ", int8 with int8 cache"),
        ("decode", "8b", 1, ", fp8"),
        ("prefill", "8b", 1, ", int8"),
    )
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, help="JSON file for the results")
    parser.add_argument("--only", default="", help="compile the programs whose name contains this")
    parser.add_argument("--layers", type=int, help="layers of tower and decoder, for trials")
    arguments = parser.parse_args(argv)
    names = [name for name in (*TRAIN, *UNROLLED, *GENERATION) if arguments.only in name]
    if not names:
        parser.error(f"no program's name contains {arguments.only!r}")
    if arguments.output and not is_own(arguments.output):
        parser.error(f"{arguments.output} exists and is not of this program; name another file")
    rows = {}
    for name in names:
        rows[name] = measure(name, arguments.layers)
        print(f"{name}: {json.dumps(rows[name])}", flush=True)
        if arguments.output:
            save(arguments.output, rows)
    return 0


def is_own(path: pathlib.Path) -> bool:
    """Returns whether the file may be replaced: it does not exist, or this program wrote it."""
    if not os.path.lexists(path):
        return True
    try:
        return {"programs", "target"} <= set(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return False


def save(path: pathlib.Path, rows: dict) -> None:
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "target": TOPOLOGY,
        "programs": rows,
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure(name: str, layers: int | None = None) -> dict:
    """Compiles a program and returns its counts."""
    target = topology.parse(TOPOLOGY)
    mesh = make_mesh(MeshConfig(), target.devices()[:1])
    began = time.perf_counter()
    is_train = name in TRAIN or name in UNROLLED
    if is_train:
        config = train_config(*(TRAIN | UNROLLED)[name], layers)
        if name in UNROLLED:
            config = dataclasses.replace(config, scan_unroll=config.model.language.num_layers)
        lowered, calls = lower_train_step(config, mesh), 1
    else:
        program, size, count, few = GENERATION[name]
        config = train_config(size, "none", "none", layers)
        tiles, rows = (count, 1) if program == "encode" else (8, count)
        requests = Requests(rows=rows, prompt=PROMPT, new=NEW, tiles=tiles, **FEW[few])
        lowered = lower_generation(config, mesh, requests)[program]
        calls = TOKENS_PER_CALL if program == "decode" else 1
    compiled = lowered.compile(target.options())
    program, memory = kernels.read(compiled.as_text()), compiled.memory_analysis()
    row = {
        "launches": round(program.launches / calls),
        "gigabytes": round(program.bytes / calls / 1e9, 3),
        "unknown_loops": len(program.unknown_loops),
        "argument_gigabytes": round(memory.argument_size_in_bytes / 1e9, 2),
        "peak_gigabytes": round(memory.peak_memory_in_bytes / 1e9, 2),
        "temporary_gigabytes": round(memory.temp_size_in_bytes / 1e9, 2),
        "by_kind": {
            kind: [
                round(program.select(kind).launches / calls),
                round(program.select(kind).bytes / calls / 1e9, 3),
            ]
            for kind in ("attention", "product", "copy", "elementwise")
        },
        "compile_seconds": round(time.perf_counter() - began),
    }
    if is_train:
        device = per_device(config, target)
        cost = train_cost(device, estimate(device), SAMPLES)
        predicted = gpu_time.predict(program, cost, config, target.chip)
        tower = program.select(scope=r"transpose\(jvp.*vision/")
        row["tower_backward_elementwise_gigabytes"] = round(
            (tower.select("elementwise").bytes + tower.select("copy").bytes) / 1e9, 1
        )
        row["predicted_seconds"] = {
            field: round(value, 3) for field, value in dataclasses.asdict(predicted).items()
        } | {"total": round(predicted.total, 3)}
    return row


def train_config(size: str, vision: str, language: str, layers: int | None) -> TrainConfig:
    model = SIZES[size]
    if layers:
        model = dataclasses.replace(
            model,
            vision=dataclasses.replace(model.vision, num_layers=layers),
            language=dataclasses.replace(model.language, num_layers=layers),
        )
    return TrainConfig(
        model=model,
        processor=ProcessorConfig(),
        data=DataConfig(
            rows=1, tokens_per_row=TOKENS, tiles_per_row=TILES, samples_per_row=ALLOWED
        ),
        optimizer=OptimizerConfig(),
        steps=1000,
        compute_dtype="bfloat16",
        remat_vision=vision,
        remat_language=language,
    )


if __name__ == "__main__":
    sys.exit(main())
