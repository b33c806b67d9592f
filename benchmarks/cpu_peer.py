"""Side by side with transformers' PyTorch InternVL on a CPU, in float32: vision, prefill, first
token, decoding, memory.

    python benchmarks/cpu_peer.py              the 1B shape; needs PyTorch and transformers, 4 GB of disk and 10 GB of memory
    python benchmarks/cpu_peer.py --smoke      two layers of each, small vocabulary: does it still run, and agree?

Both sides load the same safetensors directory of random weights (1B shape, vocabulary 151,674,
untied head): PyTorch through `from_pretrained` with sdpa attention, ours through `load` and
`Generator`, as `infer.py` does. Each side runs in a process of its own, held to the same two cores,
in turn: ours, theirs, ours, theirs ... Logits and greedy tokens are compared in the same run.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile

import numpy as np
from cpu_peer_sides import Settings

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIDES = ROOT / "benchmarks" / "cpu_peer_sides.py"
RESULTS = ROOT / "benchmarks" / "results" / "cpu_peer.json"
TOLERANCE = 1e-4  # largest difference of a logit over the largest logit
CASES = {
    "vision": "vision tower and projector, one tile (ms)",
    "prefill": "prefill of 320 text tokens (ms)",
    "first_token": "first token, one tile and 64 text tokens (ms)",
    "decode": "decoding after that, batch 1 (ms per token)",
}
MEMORY = {
    "start_peak": "peak memory of loading and first answers (GiB)",
    "steady_peak": "peak memory after that (GiB)",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--smoke", action="store_true", help="two layers, 4,096 vocabulary entries, one round"
    )
    parser.add_argument("--layers", type=int, help="of the tower and of the decoder (24)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side runs (3)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed repeats of every case in a round (3)"
    )
    parser.add_argument("--tokens", type=int, default=32, help="decoded after the first one (32)")
    parser.add_argument("--threads", type=int, default=2, help="cores for either side (2)")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        help=f"JSON file ({RESULTS.relative_to(ROOT)}; of fewer layers none)",
    )
    options = parser.parse_args()
    settings = Settings(
        options.layers, 151674, options.rounds, options.repeats, options.tokens, options.threads
    )
    if options.smoke:
        settings = Settings(2, 4096, 1, 1, 8, options.threads)
    output = options.output or (None if settings.layers else RESULTS)
    with tempfile.TemporaryDirectory(prefix="cpu_peer_") as directory:
        report = run(pathlib.Path(directory), settings)
    print_report(report)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"\nwritten to {output}")
    return 0 if report["parity"]["holds"] else 1


def run(directory: pathlib.Path, settings: Settings) -> dict:
    """Runs all rounds, then prints the report."""
    (directory / "settings.json").write_text(json.dumps(dataclasses.asdict(settings)))
    say(f"writing random weights to {directory}")
    start_role("weights", directory)
    sides = {"jax": [], "torch": []}
    for number in range(settings.rounds):
        for side, results in sides.items():
            say(f"round {number + 1} of {settings.rounds}: {side}")
            results.append({"load_average": os.getloadavg()[0]} | start_role(side, directory))
    cases = {name: summarize(name, sides) for name in CASES}
    memory = {
        name: {
            side: round(max(result[name] for result in results) / 2**30, 3)
            for side, results in sides.items()
        }
        for name in MEMORY
    }
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {"python": platform.python_version()}
        | sides["jax"][0]["versions"]
        | sides["torch"][0]["versions"],
        "settings": dataclasses.asdict(settings),
        "cases_ms": cases,
        "memory_gib": memory,
        "parity": parity(directory, sides),
        "rounds": sides,
    }


def start_role(role: str, directory: pathlib.Path) -> dict:
    """Runs a role of cpu_peer_sides.py in a process of its own; returns what it prints last."""
    command = [sys.executable, str(SIDES), role, str(directory)]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the {role} process failed with status {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summarize(case: str, sides: dict) -> dict:
    """Returns minimum and median over all rounds in ms, of PyTorch with the better of its two
    caches; how many times faster ours is.
    """
    summary = {}
    for side, results in sides.items():
        names = [
            name for name in results[0]["seconds"] if name == case or name.startswith(case + "_")
        ]
        samples = {
            name: [1000 * s for result in results for s in result["seconds"][name]]
            for name in names
        }
        best = min(names, key=lambda name: min(samples[name]))
        summary[side] = {
            "min": round(min(samples[best]), 3),
            "median": round(statistics.median(samples[best]), 3),
        }
        if len(names) > 1:
            summary[side]["cache"] = best.removeprefix(case + "_")
    summary["ratio"] = {
        name: round(summary["torch"][name] / summary["jax"][name], 3) for name in ("min", "median")
    }
    return summary


def parity(directory: pathlib.Path, sides: dict) -> dict:
    ours, theirs = np.load(directory / "jax.npy"), np.load(directory / "torch.npy")
    error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    tokens = {
        str(found)
        for results in sides.values()
        for result in results
        for found in result["tokens"].values()
    }
    return {
        "logits_error": error,
        "greedy_tokens_equal": len(tokens) == 1,
        "holds": error < TOLERANCE and len(tokens) == 1,
    }


def print_report(report: dict) -> None:
    print(
        f"\n{'float32, ' + str(report['settings']['threads']) + ' cores':<52}{'torch':>16}{'JAX':>18}{'torch / JAX':>18}"
    )
    print(f"{'':<52}{'min   median':>16}{'min   median':>18}{'min   median':>18}")
    for name, label in CASES.items():
        case = report["cases_ms"][name]
        columns = [
            f"{case[side]['min']:.1f}  {case[side]['median']:7.1f}" for side in ("torch", "jax")
        ]
        ratio = f"{case['ratio']['min']:.2f}  {case['ratio']['median']:7.2f}"
        print(f"{label:<52}{columns[0]:>16}{columns[1]:>18}{ratio:>18}")
    for name, label in MEMORY.items():
        sizes = report["memory_gib"][name]
        print(
            f"{label:<52}{sizes['torch']:>16.2f}{sizes['jax']:>18.2f}{sizes['torch'] / sizes['jax']:>18.2f}"
        )
    found = report["parity"]
    equal = "equal" if found["greedy_tokens_equal"] else "DIFFERENT"
    print(
        f"parity: largest difference of a logit {found['logits_error']:.1e} of the largest logit; greedy tokens {equal}"
    )


def machine() -> dict:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "system": platform.platform(),
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
