"""Whether a run fits its devices and how fast it can be at most, without having any of them.

    python -m internvl3_jax.fit --config configs/sft.py:8b --topology v5e:16x16 --config.micro_batches=2
    python -m internvl3_jax.fit --config configs/sft.py:78b --topology v5p:4x4x8 --analytic    seconds, and no compiler
    python -m internvl3_jax.fit --config configs/sft.py:8b --topology h100:1x16x8
    python -m internvl3_jax.fit --config configs/sft.py:78b --topology v5p:2x2x2 --config.mesh.tensor=8 --infer
    python -m internvl3_jax.fit --config configs/sft.py:8b --topology v5e:16x16 --search
    python -m internvl3_jax.fit --config configs/lora.py:8b --topology h100:1x1x1 --config.lora.quantize=nf4 --analytic

Configuration and overrides are those of train.py. What is compiled is train.py's step, from shapes;
docs/fit.md says how to read the answer. Status 0: it fits. 1: it does not. 2: the question was
wrong.
"""

import json
import os
import pathlib
import sys

# Before jax is imported: there may be libtpu or a CUDA plugin here, but no device.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from absl import flags

from internvl3_jax.fit import advice, generation, report, search
from internvl3_jax.fit.build import build
from internvl3_jax.fit.memory import estimate
from internvl3_jax.fit.program import Requests, lower_train_step
from internvl3_jax.fit.share import share_of
from internvl3_jax.fit.topology import parse
from internvl3_jax.fit.work import times, train_work
from internvl3_jax.io import command_line, safe_files
from internvl3_jax.model import lora
from internvl3_jax.parallel.sharding import make_mesh
from internvl3_jax.training import checks, settings

flags.adopt_module_key_flags(settings)
TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "Devices, such as v5e:16x16, v5p:4x4x8, tpu7x:4x4x4 or h100:1x16x8.",
    required=True,
)
ANALYTIC = flags.DEFINE_bool("analytic", False, "By the analysis alone: no compiler is needed.")
SEARCH = flags.DEFINE_bool(
    "search", False, "Find the fastest mesh, remat and number of micro-batches that fit."
)
CONFIRM = flags.DEFINE_integer(
    "confirm", 3, "With --search: compile so many of the best, until one fits."
)
INFER = flags.DEFINE_bool("infer", False, "Generation in place of the train step.")
ROWS = flags.DEFINE_integer("infer_rows", 8, "With --infer: answers side by side.")
PROMPT = flags.DEFINE_integer(
    "infer_prompt", 4096, "With --infer: tokens of each prompt, pictures included."
)
NEW = flags.DEFINE_integer("infer_new", 1024, "With --infer: tokens of each answer.")
TILES = flags.DEFINE_integer("infer_tiles", 8, "With --infer: tiles encoded at a time.")
JSON = flags.DEFINE_string("json", "", "Also write the answer to this file.")
TEXT = flags.DEFINE_string("text", "", "Also write the compiled program to this file.")


def main(argv) -> int:
    if len(argv) > 1:
        raise command_line.UsageError(f"what is {argv[1]!r}? Settings are --config.FIELD=VALUE")
    json_path, _ = (_output(flag) for flag in (JSON, TEXT))
    topology, config = parse(TOPOLOGY.value), settings.load().config
    checks.validate(config)
    config = lora.freeze_base(config)
    if topology.chip is None and (SEARCH.value or ANALYTIC.value):
        raise ValueError(
            f"--topology is {topology.name}; floors and memory are known of accelerators only"
        )
    if INFER.value:
        requests = Requests(ROWS.value, PROMPT.value, NEW.value, TILES.value)
        fits, row = generation.answer(config, topology, requests, ANALYTIC.value, print)
    elif SEARCH.value:
        fits, row = find(config, topology)
    else:
        fits, row = train(config, topology)
    if json_path:
        safe_files.replace(json_path, json.dumps(row, indent=1) + "\n")
    return 0 if fits else 1


def _output(flag) -> pathlib.Path | None:
    """The file of --json or --text. ValueError if it is there or cannot be made, before any work."""
    if not flag.value:
        return None
    path = pathlib.Path(os.path.expanduser(flag.value))
    if os.path.lexists(path):
        raise ValueError(f"--{flag.name} is {path}, which exists; name another file, or remove it")
    if not path.parent.is_dir():
        raise ValueError(f"--{flag.name} is {path}: there is no folder {path.parent}; make it")
    return path


def train(config, topology) -> tuple[bool, dict]:
    """Prints the answer for one setting: (whether it fits, a row of a table)."""
    share = share_of(config, topology)
    memory = estimate(share)
    work = train_work(share, memory)
    print(report.heading(config, topology, share.mesh, "train step"))
    print(report.settings(config), flush=True)
    built = (
        None
        if ANALYTIC.value
        else build(lower_train_step(config, make_mesh(config.mesh, topology.devices())), topology)
    )
    if built is not None and TEXT.value:
        safe_files.replace(pathlib.Path(os.path.expanduser(TEXT.value)), built.text)
    if topology.chip is None:
        print(
            "\n".join([*report.memory_lines(memory, None, built), *report.collective_lines(built)])
        )
        return True, {"compiler": report.compiler_row(built)}
    usable = built.available if built else topology.chip.usable
    compiled = built is not None and not built.refused
    taken = times(work, topology, built.collectives if compiled else None)
    fits = built.fits if built else memory.peak <= usable
    lines = report.memory_lines(memory, usable, built)
    lines += report.time_lines(work, taken, built)
    lines += report.collective_lines(built) if compiled else []
    lines += report.alive_lines(built) if compiled and share.tpu else []
    lines += (
        []
        if fits
        else report.advice_lines(advice.changes(config, topology, memory), memory.peak, usable)
    )
    print("\n".join(lines))
    return fits, report.row(share, memory, work, taken, built)


def find(config, topology) -> tuple[bool, dict]:
    """Prints the fastest settings and, of the best, what the compiler says of them."""
    found, tried, smallest = search.search(config, topology)
    print(f"train step on {topology.name}: {topology.count} devices")
    print("\n".join(report.search_lines(found, tried, smallest, shown=10)), flush=True)
    row = {"tried": tried, "fit": len(found), "best": [setting.flags for setting in found[:10]]}
    if ANALYTIC.value or not found:
        return bool(found), row
    for setting in found[: CONFIRM.value]:
        print(f"\n{setting.text}")
        fits, confirmed = train(advice.with_flags(config, setting.flags), topology)
        if fits:
            return True, row | {"confirmed": confirmed | {"flags": setting.flags}}
    return False, row


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    settings.take_overrides(sys.argv)
    command_line.run(main, ImportError, failed=command_line.USAGE)
