"""Starts the parts of the GPU benchmark, each in a process of its own, and stops late ones."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence

from benchmarks.gpu_parts.part import Part, append, known_cases, read, unfinished

ROOT = pathlib.Path(__file__).resolve().parents[2]
AUTOTUNE = "autotune.tar.gz"
LEAST_SECONDS = 20  # no part is started with less time left


def run_parts(
    parts: Sequence[Part], output: pathlib.Path, seconds: float, *, smoke: bool, retry: bool = False
) -> None:
    """Runs what `output` lacks, for at most `seconds`.

    Args:
      retry: Run cases with an error again.
    """
    began = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    append(output, run=machine(smoke))
    with tempfile.TemporaryDirectory() as folder:
        autotune = pathlib.Path(folder)
        _unpack(output / AUTOTUNE, autotune)
        for part in parts:
            if _is_complete(output, part.name, retry):
                continue
            left = seconds - (time.monotonic() - began)
            if left < min(LEAST_SECONDS, part.seconds):
                print(f"{part.name}: not started, {left:.0f} s left", flush=True)
                continue
            _run_part(part, output, autotune, left, smoke, retry)
            if not smoke:
                _pack(autotune, output / AUTOTUNE)
    rows = read(output)
    (output / "results.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def machine(smoke: bool) -> dict:
    """Returns the card, the versions, the command and the date."""
    versions = {"python": platform.python_version()}
    names = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "optax", "torch")
    for name in (*names, "transformers", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    fields = "name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        card = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        card = ""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "smoke": smoke,
        "card": card,
        "card_fields": fields,
        "cpus": os.cpu_count(),
        "versions": versions,
    }


def _is_complete(output: pathlib.Path, name: str, retry: bool) -> bool:
    rows = read(output)
    status = [row["status"] for row in rows if row.get("part") == name and "status" in row]
    failed = known_cases(rows, name, False) - known_cases(rows, name, True)
    return bool(status) and status[-1] == "finished" and not (retry and failed)


def _run_part(part: Part, output, autotune, left: float, smoke: bool, retry: bool) -> None:
    settings = {"name": part.name, "target": part.target, "size": part.size}
    settings |= {"output": str(output.resolve()), "smoke": smoke, "retry": retry}
    command = [sys.executable, "-m", "benchmarks.gpu_parts.child", json.dumps(settings)]
    limit, began = min(part.seconds, left), time.monotonic()
    with open(output / "log.txt", "a", encoding="utf-8") as log:
        print(f"== {part.name}", file=log, flush=True)
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment(part, autotune, smoke),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _kill_group(process)
    seconds = time.monotonic() - began
    if code is None and left > part.seconds:
        _mark(output, part.name, f"stopped at the part's limit of {part.seconds:.0f} s")
    elif code:
        _mark(output, part.name, f"the process ended with status {code}; see log.txt")
    status = {None: "stopped", 0: "finished"}.get(code, "failed")
    append(output, part=part.name, status=status, seconds=round(seconds, 1))
    print(f"{part.name}: {status} after {seconds:.0f} s", flush=True)


def _mark(output: pathlib.Path, name: str, error: str) -> None:
    """Gives the case in which a process ended an error; without one, the part."""
    cases = unfinished(read(output), name)
    append(output, part=name, case=cases[-1] if cases else "(start)", error=error)


def _kill_group(process: subprocess.Popen) -> None:
    """Ends the process and the ones that it started, such as PyTorch's compilers."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _environment(part: Part, autotune: pathlib.Path, smoke: bool) -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
    }
    if smoke:
        return environment | {"JAX_PLATFORMS": "cpu"}
    environment["AUTOTUNE_FOLDER"] = str(autotune)
    for name in ("shared", "compile"):
        (autotune / name).mkdir(exist_ok=True)  # XLA does not make them
    own = part.xla_flags.replace("{autotune}", str(autotune))
    shared = f"--xla_gpu_per_fusion_autotune_cache_dir={autotune}/shared"
    if "autotune_cache_dir" in own:
        shared = ""
    flags = [os.environ.get("XLA_FLAGS", ""), shared, own]
    environment["XLA_FLAGS"] = " ".join(flag for flag in flags if flag)
    return environment


def _unpack(archive: pathlib.Path, folder: pathlib.Path) -> None:
    if archive.exists():
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")


def _pack(folder: pathlib.Path, archive: pathlib.Path) -> None:
    partial = archive.with_suffix(".partial")
    with tarfile.open(partial, "w:gz") as file:
        file.add(folder, arcname=".")
    partial.replace(archive)
