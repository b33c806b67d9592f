"""Measures which released size trains on which devices, with a lower bound of its step time, by
`python -m internvl3_jax.fit` for every size, stage and topology.

    python benchmarks/fit_table.py                          resumes; hours for all rows, one compilation at a time
    python benchmarks/fit_table.py --only sft:8b:v5e        rows whose name starts with this
    python benchmarks/fit_table.py --analytic               rows that are not compiled, by the analysis alone; half an hour
    python benchmarks/fit_table.py --markdown               prints the tables of results/fit_table.json; nothing is compiled
    python benchmarks/fit_table.py --smallest               the smallest slice of each kind that trains each size, by the analysis alone

For each row the analysis proposes the fastest setting that it predicts to fit, which is then
compiled. A setting that fails to compile (out of memory) is a row as well, and the next one is
predicted to need a tenth less memory; there are at most three attempts. Needs libtpu: pip install 'jax[tpu]'.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from fit_table_markdown import is_analytic, line, markdown

from internvl3_jax.fit.advice import flags_text, with_flags
from internvl3_jax.fit.search import search
from internvl3_jax.fit.topology import parse

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "fit_table.json"
SIZES = ("78b", "38b", "14b", "9b", "8b", "2b", "1b")
STAGES = ("sft", "finetune", "pretrain")
TOPOLOGIES = ("v5p:4x4x8", "v6e:16x16", "v5e:16x16")
# The other families train on one slice, the mixtures of experts on two.
FAMILIES = (
    "sft:3.5-30b-a3b:v6e:16x16",
    "sft:3.5-30b-a3b:v5p:4x4x8",
    "sft:3.5-241b-a28b:v5p:4x4x8",
    "sft:3.5-1b:v5p:4x4x8",
    "sft:3.5-2b:v5p:4x4x8",
    "sft:3.5-4b:v5p:4x4x8",
    "sft:3.5-8b:v5p:4x4x8",
    "sft:3.5-14b:v5p:4x4x8",
    "sft:3.5-38b:v5p:4x4x8",
    "sft:2.5-1b:v5p:4x4x8",
    "sft:2.5-2b:v5p:4x4x8",
    "sft:2.5-4b:v5p:4x4x8",
    "sft:2.5-8b:v5p:4x4x8",
    "sft:2.5-26b:v5p:4x4x8",
    "sft:2.5-38b:v5p:4x4x8",
    "sft:2.5-78b:v5p:4x4x8",
)
# Generation: bfloat16 parameters split over tensor, and over fsdp where there are more devices than
# key heads.
GENERATION = {
    "infer:78b:v5p:2x2x1": "--config.mesh.tensor=4 --config.mesh.fsdp=1",
    "infer:78b:v6e:2x4": "--config.mesh.tensor=8 --config.mesh.fsdp=1",
    "infer:78b:v5e:4x4": "--config.mesh.tensor=8 --config.mesh.fsdp=2",
    "infer:14b:v5e:2x4": "--config.mesh.tensor=4 --config.mesh.fsdp=2",
    "infer:8b:v5e:2x2": "--config.mesh.tensor=4 --config.mesh.fsdp=1",
    "infer:3.5-241b-a28b:v5p:2x2x2": "--config.mesh.tensor=4 --config.mesh.fsdp=2",
    "infer:3.5-30b-a3b:v6e:2x2": "--config.mesh.tensor=4 --config.mesh.fsdp=1",
}
# From small to large; lean is what takes least and still trains every parameter.
SLICES = {
    "v5e": (
        "v5e:1x1",
        "v5e:2x2",
        "v5e:2x4",
        "v5e:4x4",
        "v5e:4x8",
        "v5e:8x8",
        "v5e:8x16",
        "v5e:16x16",
    ),
    "v6e": (
        "v6e:1x1",
        "v6e:2x2",
        "v6e:2x4",
        "v6e:4x4",
        "v6e:4x8",
        "v6e:8x8",
        "v6e:8x16",
        "v6e:16x16",
    ),
    "v5p": (
        "v5p:1x1x1",
        "v5p:2x2x1",
        "v5p:2x2x2",
        "v5p:2x2x4",
        "v5p:2x4x4",
        "v5p:4x4x4",
        "v5p:4x4x8",
        "v5p:4x8x8",
    ),
    "tpu7x": (
        "tpu7x:1x1x1",
        "tpu7x:2x2x1",
        "tpu7x:2x2x2",
        "tpu7x:2x2x4",
        "tpu7x:2x4x4",
        "tpu7x:4x4x4",
    ),
    "h100": (
        "h100:1x1x1",
        "h100:1x1x8",
        "h100:1x2x8",
        "h100:1x4x8",
        "h100:1x8x8",
        "h100:1x16x8",
        "h100:1x32x8",
    ),
}
LEAN = {"optimizer.name": "adafactor", "optimizer.moment_dtype": "bfloat16"}
ATTEMPTS = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default="", help="rows whose name begins so: STAGE:SIZE:TOPOLOGY, such as sft:78b"
    )
    parser.add_argument(
        "--analytic", action="store_true", help="fill in what is not compiled, by the analysis"
    )
    parser.add_argument("--markdown", action="store_true", help="print the tables, compile nothing")
    parser.add_argument(
        "--smallest", action="store_true", help="print the smallest slices, by the analysis"
    )
    parser.add_argument(
        "--sizes",
        default=",".join(reversed(SIZES)),
        help="rows of --smallest, such as 3.5-1b,3.5-8b",
    )
    parser.add_argument(
        "--output", type=pathlib.Path, default=RESULTS, help=f"JSON file ({RESULTS.name})"
    )
    options = parser.parse_args()
    rows = json.loads(options.output.read_text()) if options.output.exists() else []
    if options.markdown or options.smallest:
        print(markdown(rows) if options.markdown else smallest_slices(options.sizes.split(",")))
        return
    for name in names():
        known = {row["name"] for row in rows if row["last"]} | (
            GENERATION.keys() if options.analytic else set()
        )
        if name.startswith(options.only) and name not in known:
            for row in [by_analysis(name)] if options.analytic else attempts(name):
                replaced = (
                    row["command"],
                    *(other["command"] for other in rows if is_analytic(other)),
                )
                rows = [
                    other
                    for other in rows
                    if other["name"] != name or other["command"] not in replaced
                ] + [row]
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
                print(line(row), flush=True)


def names() -> list[str]:
    training = [
        f"{stage}:{size}:{topology}"
        for stage in STAGES
        for size in SIZES
        for topology in TOPOLOGIES
    ]
    first = len(SIZES) * len(TOPOLOGIES)
    return [*training[:first], *GENERATION, *FAMILIES, *training[first:]]


def attempts(name: str):
    """Rows of the compiler's answers, until one fits; the last of them has "last" set."""
    stage, size, topology = name.split(":", 2)
    if name in GENERATION:
        yield ask(
            name, f"--config configs/sft.py:{size} --topology {topology} --infer {GENERATION[name]}"
        ) | {"last": True}
        return
    limit = float("inf")
    for attempt in range(1, ATTEMPTS + 1):
        found, _, smallest = search(config(stage, size), parse(topology), *policies(name))
        setting = next((setting for setting in found if setting.memory.peak <= limit), smallest)
        if setting is None:
            return
        row = ask(
            name,
            f"--config configs/{stage}.py:{size} --topology {topology} {flags_text(setting.flags)}",
        )
        done = row["status"] == 0 or attempt == ATTEMPTS or setting is smallest
        yield row | {"last": done}
        if done:
            return
        limit = 0.9 * setting.memory.peak


def policies(name: str) -> list[tuple[str, ...]]:
    """Returns the remat policies to choose from, as an argument of `search`; [] for all.

    The dense models of the other families compile fastest with "full".
    """
    return [("full",)] if name in FAMILIES and "-a" not in name else []


def by_analysis(name: str) -> dict:
    """Returns the fastest setting that fits by the analysis, or the smallest."""
    stage, size, topology = name.split(":", 2)
    found, _, smallest = search(config(stage, size), parse(topology))
    flags = flags_text((found or [smallest])[0].flags)
    return ask(
        name, f"--config configs/{stage}.py:{size} --topology {topology} {flags} --analytic"
    ) | {"last": False}


def config(stage: str, size: str):
    """Returns the configuration of configs/STAGE.py."""
    sys.path.insert(0, str(ROOT))
    return __import__(f"configs.{stage}", fromlist=["get_config"]).get_config(size)


def ask(name: str, arguments: str) -> dict:
    """Runs the command once, in a process of its own."""
    command = f"python -m internvl3_jax.fit {arguments}"
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "row.json"
        extra = ["--json", str(path)]
        if keep := os.environ.get("FIT_TABLE_TEXTS"):  # folder for the compiled programs
            extra += ["--text", str(pathlib.Path(keep) / (name.replace(":", "_") + ".txt"))]
        done = subprocess.run(
            [sys.executable, *shlex.split(command)[1:], *extra],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        found = (
            json.loads(path.read_text())
            if path.exists()
            else {"error": (done.stderr or done.stdout)[-2000:]}
        )
    return {
        "name": name,
        "command": command,
        "status": done.returncode,
        "seconds": round(time.perf_counter() - began, 1),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "libtpu": libtpu(),
        },
    } | found


def libtpu() -> str:
    from importlib import metadata

    try:
        return metadata.version("libtpu")
    except metadata.PackageNotFoundError:
        return "none"


def smallest_slices(sizes: list[str]) -> str:
    """As a table of these sizes: with the recipe's AdamW and, in brackets where it is smaller, with Adafactor and
    its moment in bfloat16.
    """
    lines = [f"| size | {' | '.join(SLICES)} |", "|---" * (1 + len(SLICES)) + "|"]
    for size in sizes:
        cells = []
        for slices in SLICES.values():
            plain, lean = (
                next((name for name in slices if trains(size, name, flags)), "-")
                for flags in ({}, LEAN)
            )
            cells.append(plain if lean == plain else f"{plain} [{lean}]")
        lines.append(f"| {size} | {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def trains(size: str, topology: str, flags: dict) -> bool:
    found, _, _ = search(
        with_flags(config("sft", size), flags), parse(topology), policies=("full",)
    )
    return bool(found)


if __name__ == "__main__":
    main()
