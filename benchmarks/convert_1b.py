"""Converts a full-size 1B checkpoint with random weights both ways; measures seconds and peak
resident memory of each conversion.

    python benchmarks/convert_1b.py                  writes benchmarks/results/convert_1b.json
    python benchmarks/convert_1b.py --size 2b

Each conversion is a process of its own, `python -m convert ...`, measured from start to end: the
imports of Python packages, about a quarter of a gigabyte, are in its memory, and so are pages of
files while they are mapped.
"""

import argparse
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np

from convert.config_json import to_hf
from convert.run import planned
from internvl3_jax.checkpoints.hf.safetensors import SafetensorsWriter
from internvl3_jax.config import ProcessorConfig

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from examples.tiny_digits.recipe import tokenizer as tiny_tokenizer
from internvl3_jax.sizes import SIZES

ROOT = pathlib.Path(__file__).parents[1]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def write_random(directory: pathlib.Path, size: str) -> None:
    """Writes a released model of full size in the original layout, tensor by tensor."""
    model = SIZES[size]
    directory.mkdir()
    # The weights do not depend on the tokenizer; a small one keeps the benchmark independent of
    # downloads.
    for name, content in tiny_tokenizer.build().items():
        (directory / name).write_bytes(content)
    (directory / "config.json").write_text(
        json.dumps(to_hf(model, ProcessorConfig(), "internvl", "bfloat16"))
    )
    tensors = planned(model, "internvl")
    writer = SafetensorsWriter(directory, tensors, BFLOAT16, shard_size=10**9)
    generator = np.random.default_rng(0)
    for name, shape in tensors:
        writer.write(name, generator.standard_normal(shape, np.float32).astype(BFLOAT16))
    writer.close()


def measure(*arguments: str) -> dict:
    """Runs `python -m convert`: seconds, processor seconds (which other work does not stretch),
    peak resident memory.
    """
    command = [sys.executable, "-m", "convert", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
    }


def machine() -> dict:
    names = [
        line.split(":")[1].strip()
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    packages = ("jax", "orbax-checkpoint", "numpy")
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="1b", choices=list(SIZES))
    parser.add_argument(
        "--directory",
        help="where the temporary checkpoints go; needs six times the size of the weights",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as temporary:
        root = pathlib.Path(temporary)
        # In a process of its own: a process's peak memory counts as its children's, too.
        writer = multiprocessing.get_context("spawn").Process(
            target=write_random, args=(root / "released", options.size)
        )
        writer.start()
        writer.join()
        size = sum(path.stat().st_size for path in (root / "released").glob("*.safetensors"))
        runs = {}
        for name, source, extra in (
            ("released to ours", "released", []),
            ("ours to internvl", "released to ours", ["--to", "internvl"]),
            ("ours to hf", "released to ours", ["--to", "hf"]),
            ("hf to ours in float32", "ours to hf", ["--dtype", "float32"]),
        ):
            paths = [str(root / source), str(root / name)]
            runs[name] = measure(*paths, *extra)
            print(name, runs[name], flush=True)
            runs[f"{name}, --verify"] = measure(*paths, *extra, "--verify", "--overwrite")
            print(f"{name}, --verify", runs[f"{name}, --verify"], flush=True)
    result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "size": options.size,
        "weights": {"dtype": "bfloat16", "gb": round(size / 1e9, 3)},
        "runs": runs,
    }
    path = ROOT / "benchmarks" / "results" / f"convert_{options.size}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
