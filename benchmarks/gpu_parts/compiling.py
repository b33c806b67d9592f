"""Seconds to compile the programs of inference and the train step.

The part runs twice: first with an empty folder of autotuning results, which it fills, then in a new
process that loads them.
"""

import functools
import os
import pathlib
import time

from benchmarks.gpu_parts.training import make_batch, train_config
from internvl3_jax.config import MeshConfig
from internvl3_jax.fit.lowering import Requests, lower_generation, lower_train_step
from internvl3_jax.parallel.sharding import make_mesh
from internvl3_jax.sizes import SIZES


def cases(size: str, smoke: bool) -> dict:
    model = SIZES["tiny" if smoke else size]
    batch = make_batch(model, smoke)
    config, mesh = train_config(model, batch, "full"), make_mesh(MeshConfig())
    requests = Requests(1, 64, 16, 1) if smoke else Requests(1, 3840, 256, 8)

    @functools.cache
    def generation() -> dict:
        return lower_generation(config, mesh, requests)

    programs = {name: lambda name=name: generation()[name] for name in ("decode", "prefill")}
    programs["encode"] = lambda: generation()["encode"]
    programs["train step"] = lambda: lower_train_step(config, mesh)
    return {name: functools.partial(_compile, lower) for name, lower in programs.items()}


def _compile(lower) -> dict:
    entries = _entries()
    began = time.perf_counter()
    lowered = lower()
    lower_s, began = time.perf_counter() - began, time.perf_counter()
    memory = lowered.compile().memory_analysis()
    return {
        "lower_s": lower_s,
        "compile_s": time.perf_counter() - began,
        "autotune_entries_before": entries,
        "autotune_entries_after": _entries(),
        "compiler_peak_gib": getattr(memory, "peak_memory_in_bytes", 0) / 2**30,
    }


def _entries() -> int:
    folder = os.environ.get("AUTOTUNE_FOLDER")
    path = pathlib.Path(folder, "compile") if folder else None
    return sum(file.is_file() for file in path.rglob("*")) if path else 0
