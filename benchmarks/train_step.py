"""Measures one training step: seconds, tokens per second, MFU, peak memory and the time of each
part; with --peer also PyTorch's step.

    python benchmarks/train_step.py --size tiny                                  the digits model
    python benchmarks/train_step.py --size 1b --layers 2 --tokens 512 --peer     two layers of the 1B model, against transformers
    python benchmarks/train_step.py --smoke                                      a quick check that it runs

Float32, AdamW with clipping, all parameters trainable, random weights; half of the text tokens are
supervised. Our loss computes logits for full chunks of supervised tokens, so choose a chunk no
longer than their number. The sides run in turn, each in its own process, pinned to the same cores.
PyTorch's step is transformers' InternVL with sdpa attention on the same shapes and number of
weights, its own loss (which computes the logits of every position), clip_grad_norm_ and
torch.optim.AdamW.

With --paired both processes live at once and take single steps in turn, so that other work on the
machine meets both: the ratio is the median of the pairs'. It needs the memory of both.
"""

import argparse
import datetime
import functools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys

from cpu_peer import machine
from train_step_sides import PARTS, measure_jax, measure_torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("tiny", "1b", "2b"), default="tiny")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512, help="a row, visual ones included (512)")
    parser.add_argument("--tiles", type=int, default=1, help="a row (1)")
    parser.add_argument(
        "--layers", type=int, help="of the tower and of the decoder, in place of the size's own"
    )
    parser.add_argument(
        "--remat", default="none", help="policy for tower and decoder; see ops/remat.py (none)"
    )
    parser.add_argument(
        "--chunk",
        type=int,
        default=256,
        help="loss_chunk: tokens whose logits are made at a time (256)",
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed steps in a round (5)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side runs (3)")
    parser.add_argument("--threads", type=int, default=2, help="cores for either side (2)")
    parser.add_argument("--peer", action="store_true", help="also PyTorch's step")
    parser.add_argument("--paired", action="store_true", help="the sides take single steps in turn")
    parser.add_argument("--smoke", action="store_true", help="one short round of the tiny size")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        help="JSON file (results/train_step_SIZE.json; with --smoke none)",
    )
    parser.add_argument("--role", choices=("jax", "torch"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.smoke:
        (
            options.size,
            options.rows,
            options.tokens,
            options.layers,
            options.repeats,
            options.rounds,
        ) = "tiny", 2, 64, 1, 2, 1
    if options.role:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
        measure = {"jax": measure_jax, "torch": measure_torch}[options.role]
        print(json.dumps(measure(options)), flush=True)
        return
    report = run(options)
    show(report)
    output = options.output or (
        None if options.smoke else RESULTS / f"train_step_{options.size}.json"
    )
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def run(options) -> dict:
    rounds = {side: [] for side in (("jax", "torch") if options.peer else ("jax",))}
    for number in range(options.rounds):
        together = [list(rounds)] if options.paired else [[side] for side in rounds]
        for sides in together:
            names = " and ".join(sides)
            print(f"round {number + 1} of {options.rounds}: {names}", file=sys.stderr, flush=True)
            load = os.getloadavg()[0]
            for side, result in run_sides(sides, options.repeats).items():
                rounds[side].append({"load_average": load} | result)
    best = {
        side: min(min(result["seconds"]) for result in results) for side, results in rounds.items()
    }
    first = rounds["jax"][0]
    speed = max(result["matmul_flops_per_second"] for result in rounds["jax"])
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {"python": platform.python_version()}
        | functools.reduce(dict.__or__, (r[0]["versions"] for r in rounds.values())),
        "settings": {
            name: value for name, value in vars(options).items() if name not in ("output", "role")
        },
        "seconds": best,
        "median_seconds": {
            side: statistics.median(s for r in results for s in r["seconds"])
            for side, results in rounds.items()
        },
        "tokens_per_second": {
            side: options.rows * options.tokens / seconds for side, seconds in best.items()
        },
        "mfu": {side: first["flops"] / seconds / speed for side, seconds in best.items()},
        "matmul_gflops_per_second": speed / 1e9,
        "peak_gib": {
            side: max(result["peak_bytes"] for result in results) / 2**30
            for side, results in rounds.items()
        },
        "parts_seconds": {
            part: min(result["parts"][part] for result in rounds["jax"]) for part in PARTS
        },
        "ratios": ratios(rounds) if options.peer and options.paired else None,
        "rounds": rounds,
    }


def ratios(rounds: dict) -> dict:
    """Returns the medians over all pairs of steps of PyTorch's time over ours."""
    return {
        name: statistics.median(
            torch_time / jax_time
            for jax_side, torch_side in zip(rounds["jax"], rounds["torch"], strict=True)
            for jax_time, torch_time in zip(jax_side[name], torch_side[name], strict=True)
        )
        for name in ("seconds", "cpu_seconds")
    }


def run_sides(sides: list[str], repeats: int) -> dict[str, dict]:
    """Runs sides, each in a process of its own, a step of each in turn; returns what they report."""
    processes = {side: start(side) for side in sides}
    for side in sides:
        answer(side, processes[side])  # it is ready
    for _ in range(repeats):
        for side in sides:
            ask(processes[side], "step")
            answer(side, processes[side])
    results = {}
    for side in sides:
        ask(processes[side], "end")
        results[side] = answer(side, processes[side])
        processes[side].wait()
    return results


def start(side: str) -> subprocess.Popen:
    environment = {"JAX_PLATFORMS": "cpu"} | os.environ | {"HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    )
    command = [sys.executable, __file__, *sys.argv[1:], "--role", side]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)


def ask(process: subprocess.Popen, word: str) -> None:
    process.stdin.write(word + "\n")
    process.stdin.flush()


def answer(side: str, process: subprocess.Popen):
    """Returns the next line of JSON that a side prints."""
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    sys.exit(f"the {side} process failed with status {process.wait()}")


def show(report: dict) -> None:
    for side, seconds in report["seconds"].items():
        median, rate = report["median_seconds"][side], report["tokens_per_second"][side]
        print(
            f"{side:<6} step {1000 * seconds:8.1f} ms (median {1000 * median:.1f})  {rate:8.0f} tokens/s  "
            f"MFU {100 * report['mfu'][side]:5.1f} %  peak {report['peak_gib'][side]:.2f} GiB"
        )
    print(
        f"MFU is against {report['matmul_gflops_per_second']:.0f} GFLOP/s of a float32 product on this machine"
    )
    for part, seconds in report["parts_seconds"].items():
        print(f"  {part:<24} {1000 * seconds:8.1f} ms")
    if report["ratios"]:
        pairs = ", ".join(f"{name} {value:.2f}" for name, value in report["ratios"].items())
        print(f"torch / jax, median of the pairs: {pairs}")
    if "torch" in report["seconds"]:
        print(f"torch / jax: {report['seconds']['torch'] / report['seconds']['jax']:.2f}")


if __name__ == "__main__":
    main()
