"""Measures the cost of opening a large JSONL file: seconds and memory of building its index, of
opening it again, and random reads a second.

    python benchmarks/jsonl_index.py                 2 million rows, 1 GB of disk
    python benchmarks/jsonl_index.py --rows 50000    smaller

The rows are single-image conversations of varied length. Each step runs in a process of its own,
so that its peak memory is its alone; "imports" is that of a process that only imports the module.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import resource
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "jsonl_index.json"
READS = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(run_step(options.step, options.path)))
        return
    with tempfile.TemporaryDirectory(prefix="jsonl_index_") as folder:
        path = str(pathlib.Path(folder) / "rows.jsonl")
        write_rows(path, options.rows)
        size = os.path.getsize(path)
        steps = {
            step: start_step(step, path)
            for step in ("imports", "build", "open", "read", "text_only")
        }
        index = os.path.getsize(f"{path}.index.npy")
    import numpy as np

    report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "load_average": os.getloadavg()[0]},
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "rows": options.rows,
        "file_mb": round(size / 1e6, 1),
        "index_mb": round(index / 1e6, 1),
        "steps": steps,
    }
    print(json.dumps(report, indent=1))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def write_rows(path: str, rows: int) -> None:
    """Writes rows that each have an image; the text is 100 to 700 characters."""
    words = "the picture shows a street with cars and people in front of an old house ".split()
    with open(path, "w", encoding="utf-8") as file:
        for number in range(rows):
            answer = " ".join(
                words[(number + k) % len(words)] for k in range(10 + number * 7919 % 120)
            )
            turns = [
                {"from": "human", "value": "<image>\nDescribe the image."},
                {"from": "gpt", "value": answer},
            ]
            file.write(
                json.dumps(
                    {"id": number, "image": f"train/{number:09}.jpg", "conversations": turns}
                )
                + "\n"
            )


def start_step(step: str, path: str) -> dict:
    command = [sys.executable, __file__, "--step", step, "--path", path]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    )


def run_step(step: str, path: str) -> dict:
    """Seconds and peak memory of one step in this process. "text_only" scans for images to the
    end of the file, finding none.
    """
    from internvl3_jax.data.sources import row_scan
    from internvl3_jax.data.sources.rows import Rows

    if step == "text_only":
        row_scan.MENTIONS = (b'"no such key"', b'"nor this one"')
        os.unlink(f"{path}.index.npy")
    began, result = time.perf_counter(), {}
    if step != "imports":
        rows = Rows([path])
        result = {"rows": len(rows), "has_images": rows.has_images}
    result["seconds"] = round(time.perf_counter() - began, 3)
    if step == "read":
        import numpy as np

        chosen = np.random.default_rng(0).integers(len(rows), size=READS).tolist()
        began = time.perf_counter()
        assert all(rows[row][0]["id"] == row for row in chosen)
        result["reads_per_second"] = round(READS / (time.perf_counter() - began))
    result["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
    return result


def cpu_name() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


if __name__ == "__main__":
    main()
