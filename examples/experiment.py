"""Helpers of the experiments in this folder: running the programs, JSON files, Markdown tables."""

import argparse
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]
DIGITS_MODEL = ROOT / "examples" / "tiny_digits"


# --- seeds ---------------------------------------------------------------------------------------


def run_seeds(
    description: str,
    run_seed: Callable[[pathlib.Path, int, argparse.Namespace], None],
    summarize: Callable[[pathlib.Path], str],
    **numbers: tuple[int, str],
) -> None:
    """Reads the command line of an experiment, runs it for each seed, and prints its summary.

    Args:
      run_seed: is called with the seed's folder, the seed and the options.
      summarize: of the output folder.
      numbers: further options, as name -> (default, meaning).
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument(
        "--steps", type=int, default=None, help="steps of each training; default: the recipe's"
    )
    for name, (default, meaning) in ({"seeds": (3, "number of seeds")} | numbers).items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (%(default)s)")
    options = parser.parse_args()
    output = options.output.resolve()
    for seed in range(options.seeds):
        run_seed(output / f"seed_{seed}", seed, options)
    print(summarize(output))


def seed_settings(seed: int, options: argparse.Namespace) -> dict[str, object]:
    """Returns what the trainings of a seed change in their recipes, for the digits model."""
    settings = {"data.tokenizer": DIGITS_MODEL, "seed": seed, "data.seed": seed}
    if options.steps is not None:
        settings |= {"steps": options.steps, "optimizer.warmup_steps": 1}
    return settings


# --- programs ------------------------------------------------------------------------------------


def run_python(*arguments: object) -> None:
    """Runs Python from the root of the clone; ends this program if that fails."""
    process = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    if process.returncode:
        sys.exit(
            f"error: {arguments[0]} ended with status {process.returncode}; "
            "run this again to resume"
        )


def train(recipe: str, workdir: pathlib.Path, settings: Mapping[str, object]) -> None:
    """Starts or resumes a run of train.py.

    Args:
      recipe: FILE:ARGUMENT under configs/, such as "miniature.py:sft".
      settings: dotted field of TrainConfig -> value in place of the recipe's.
    """
    print(f"training {workdir}", flush=True)
    flags = [f"--config.{field}={value}" for field, value in settings.items()]
    run_python(
        ROOT / "train.py", f"--config={ROOT / 'configs' / recipe}", f"--workdir={workdir}", *flags
    )


# --- files ---------------------------------------------------------------------------------------


def read_jsonl(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_jsonl(path: pathlib.Path, rows: Iterable[dict]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def write_meta(path: pathlib.Path, annotations: Mapping[str, str]) -> None:
    """Writes a meta JSON. annotations: source -> annotation file, both beside `path`."""
    folder = path.parent
    entries = {
        source: {"root": str(folder), "annotation": str(folder / file)}
        for source, file in annotations.items()
    }
    path.write_text(json.dumps(entries, indent=1))


# --- tables --------------------------------------------------------------------------------------


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def percent(values: Sequence[float], digits: int = 1) -> str:
    """Formats shares as their mean, with the lowest and the highest if they differ."""
    scaled = [100 * value for value in values]
    mean = f"{sum(scaled) / len(scaled):.{digits}f} %"
    if min(scaled) == max(scaled):
        return mean
    return f"{mean} ({min(scaled):.{digits}f}-{max(scaled):.{digits}f})"
