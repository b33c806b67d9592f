"""Predicts memory use and a lower bound of the step time by AOT compilation, without the hardware.

    python -m internvl3_jax.fit --config configs/sft.py:8b --topology v5e:16x16
    python -m internvl3_jax.fit --config configs/sft.py:8b --topology h100:1x16x8
    ... --config.micro_batches=2    any field of the config, as in train.py
    ... --analytic                  in seconds, without a compiler
    ... --search                    the fastest settings that fit
    ... --config.mesh.tensor=8 --infer
                                    generation instead of the train step; --weights int8 as infer.py
    ... --config configs/lora.py:8b --topology h100:1x1x1 --config.lora.quantize=nf4

It compiles train.py's own step, from shapes. docs/fit.md explains the output. Exit status 0: the
run fits; 1: it does not; 2: the arguments are wrong.
"""

import json
import os
import pathlib
import sys

# Before jax is imported: libtpu or a CUDA plugin may be installed, but there is no device.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from absl import flags

from internvl3_jax.fit import advice, generation, gpu_time, report, search
from internvl3_jax.fit.compilation import compile_for
from internvl3_jax.fit.kernels import read as read_kernels
from internvl3_jax.fit.lowering import Requests, lower_train_step
from internvl3_jax.fit.memory import estimate
from internvl3_jax.fit.per_device import per_device
from internvl3_jax.fit.step_cost import times, train_cost
from internvl3_jax.fit.topology import GPUS, parse
from internvl3_jax.io import command_line, safe_files
from internvl3_jax.model import lora
from internvl3_jax.model.ops.quantize import FORMATS
from internvl3_jax.parallel.sharding import make_mesh
from internvl3_jax.training import checks, settings

flags.adopt_module_key_flags(settings)
TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "Devices, such as v5e:16x16, v5p:4x4x8, tpu7x:4x4x4 or h100:1x16x8.",
    required=True,
)
ANALYTIC = flags.DEFINE_bool("analytic", False, "Use only the analysis; no compiler is needed.")
SEARCH = flags.DEFINE_bool(
    "search", False, "Find the fastest mesh, remat and number of micro-batches that fit."
)
CONFIRM = flags.DEFINE_integer(
    "confirm", 3, "With --search: compile the fastest settings, up to this number, until one fits."
)
INFER = flags.DEFINE_bool("infer", False, "Predict generation instead of the train step.")
ROWS = flags.DEFINE_integer("infer_rows", 8, "With --infer: answers generated together.")
PROMPT = flags.DEFINE_integer(
    "infer_prompt", 4096, "With --infer: tokens of each prompt, images included."
)
NEW = flags.DEFINE_integer("infer_new", 1024, "With --infer: tokens of each answer.")
TILES = flags.DEFINE_integer("infer_tiles", 8, "With --infer: tiles encoded per call.")
WEIGHTS = flags.DEFINE_enum(
    "weights", None, list(FORMATS), "With --infer: format of quantized kernels, as of infer.py."
)
TOWER = flags.DEFINE_bool(
    "quantize_tower", False, "With --infer and --weights: the tower's kernels, too."
)
CACHE = flags.DEFINE_enum(
    "cache", None, ["int8"], "With --infer: keys and values in 8 bits, as of infer.py."
)
JSON = flags.DEFINE_string("json", "", "Also write the prediction to this JSON file.")
TEXT = flags.DEFINE_string("text", "", "Also write the compiled program to this file.")
# Flags by the headings of --help.
SECTIONS = {
    "Run": ["config", "topology", "analytic"],
    "Search": ["search", "confirm"],
    "Generation": [
        *("infer", "infer_rows", "infer_prompt", "infer_new", "infer_tiles"),
        *("weights", "quantize_tower", "cache"),
    ],
    "Output": ["json", "text"],
}


def main(argv) -> int:
    if len(argv) > 1:
        raise command_line.UsageError(
            f"unexpected argument {argv[1]!r}; fields of the config are --config.FIELD=VALUE"
        )
    # Check all arguments before any work.
    json_path, text_path = (_output_path(flag) for flag in (JSON, TEXT))
    topology, config = parse(TOPOLOGY.value), settings.load().config
    checks.validate(config)
    if config.model.flash:
        raise command_line.UsageError(
            "model.flash is true: the analysis does not know Flash models; take the size without"
        )
    config = lora.freeze_base(config)
    if topology.chip is None and (SEARCH.value or ANALYTIC.value):
        raise ValueError(
            f"--topology is {topology.name}; --search and --analytic need an accelerator, such as "
            "v5e:4x4"
        )

    for flag, needed in ((WEIGHTS, INFER), (CACHE, INFER), (TOWER, WEIGHTS)):
        if flag.value and not needed.value:
            raise command_line.UsageError(f"--{flag.name} is about --{needed.name}; give that, too")
    if INFER.value:
        quantized = (WEIGHTS.value, TOWER.value, CACHE.value)
        requests = Requests(ROWS.value, PROMPT.value, NEW.value, TILES.value, *quantized)
        fits, row = generation.answer(config, topology, requests, ANALYTIC.value, print)
    elif SEARCH.value:
        fits, row = find_fastest(config, topology, text_path)
    else:
        fits, row = predict_step(config, topology, text_path)
    if json_path:
        safe_files.replace(json_path, json.dumps(row, indent=1) + "\n")
    return 0 if fits else 1


def _output_path(flag) -> pathlib.Path | None:
    """Returns the file of --json or --text, or None; raises ValueError if it cannot be written."""
    if not flag.value:
        return None
    path = pathlib.Path(os.path.expanduser(flag.value))
    if os.path.lexists(path):
        raise ValueError(f"--{flag.name} is {path}, which exists; name another file, or remove it")
    if not path.parent.is_dir():
        raise ValueError(f"--{flag.name} is {path}: there is no folder {path.parent}; make it")
    return path


def predict_step(config, topology, text_path: pathlib.Path | None = None) -> tuple[bool, dict]:
    """Prints the prediction for the train step; returns (whether it fits, a dict for JSON)."""
    # 1) The analysis.
    device = per_device(config, topology)
    memory = estimate(device)
    cost = train_cost(device, memory)
    print(report.heading(config, topology, device.mesh, "train step"))
    print(report.settings(config), flush=True)

    # 2) The compiler.
    compiled = None
    if not ANALYTIC.value:
        mesh = make_mesh(config.mesh, topology.devices())
        compiled = compile_for(lower_train_step(config, mesh), topology)
        if text_path:
            safe_files.replace(text_path, compiled.text)
    if topology.chip is None:
        lines = [*report.memory_lines(memory, None, compiled), *report.collective_lines(compiled)]
        print("\n".join(lines))
        return True, {"compiler": report.compiler_row(compiled)}

    # 3) Both together: the compiler decides where it was asked.
    is_compiled = compiled is not None and not compiled.out_of_memory
    available = compiled.available if compiled else topology.chip.usable
    fits = compiled.fits if compiled else memory.peak <= available
    step_times = times(cost, topology, compiled.collectives if is_compiled else None)
    lines = report.memory_lines(memory, available, compiled)
    lines += report.time_lines(cost, step_times, compiled)
    if is_compiled and topology.kind in GPUS and topology.count == 1:
        program = read_kernels(compiled.text)
        predicted = gpu_time.predict(program, cost, config, topology.chip)
        lines += report.gpu_lines(program, predicted)
    if is_compiled:
        lines += report.collective_lines(compiled)
        lines += report.alive_lines(compiled) if device.tpu else []
    if not fits:
        changes = advice.changes(config, topology, memory)
        lines += report.advice_lines(changes, memory.peak, available)
    print("\n".join(lines))
    return fits, report.row(device, memory, cost, step_times, compiled)


def find_fastest(config, topology, text_path: pathlib.Path | None) -> tuple[bool, dict]:
    """Prints the fastest settings and what the compiler says of the first ones.

    Returns:
      Whether a setting fits, and a dict for JSON.
    """
    fitting, tried, smallest = search.search(config, topology)
    print(f"train step on {topology.name}: {topology.count} devices")
    print("\n".join(report.search_lines(fitting, tried, smallest, shown=10)), flush=True)
    row = {"tried": tried, "fit": len(fitting), "best": [setting.flags for setting in fitting[:10]]}
    if ANALYTIC.value or not fitting:
        return bool(fitting), row
    for setting in fitting[: CONFIRM.value]:
        print(f"\n{setting.text}")
        fits, confirmed = predict_step(
            advice.with_flags(config, setting.flags), topology, text_path
        )
        if fits:
            return True, row | {"confirmed": confirmed | {"flags": setting.flags}}
    return False, row


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    settings.take_overrides(sys.argv)
    command_line.run(main, ImportError, failed=command_line.USAGE, sections=SECTIONS)
