"""The state of a run and a file of answers as kill.py compares them, and the requests it sends."""

import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Keys of a log row that may differ.
TIMES = re.compile(r"seconds|_per_second|input_wait|mfu|memory|time")
REQUESTS = 60


def state(run: pathlib.Path, steps: int) -> dict[str, object]:
    """Returns what must be equal in two runs: rows of its files and a hash of each array.

    Arrays are read in another process, because this one must not start an accelerator.
    """
    script = "import sys, kill_state; kill_state.print_arrays(sys.argv[1])"
    command = [sys.executable, "-c", script, str(run / "checkpoints" / str(steps))]
    done = subprocess.run(
        command, env=os.environ | environment(run.parent), capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"error: {run} cannot be read:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    for name in ("log.jsonl", "answers.jsonl"):
        rows = [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]
        found[name] = [
            {key: value for key, value in row.items() if not TIMES.search(key)} for row in rows
        ]
    skipped = run / "skipped.txt"
    return found | {"skipped.txt": skipped.read_text() if skipped.exists() else ""}


def print_arrays(step: str) -> None:
    """Returns JSON with a hash of each array of a saved step."""
    import jax
    import numpy as np

    from internvl3_jax.checkpoints import storage

    found = {}
    for part in ("params", "opt_state"):
        path = pathlib.Path(step) / part
        tree = storage.load_tree(path, storage.ocp.metadata(path).metadata)
        for key, leaf in jax.tree_util.tree_leaves_with_path(tree):
            found[part + jax.tree_util.keystr(key)] = hashlib.sha256(
                np.ascontiguousarray(leaf).tobytes()
            ).hexdigest()
    print(json.dumps(found))


def compared(what: str, found: dict, wanted: dict) -> list[str]:
    """Returns a line for each part that differs."""
    wrong = [name for name in wanted | found if found.get(name) != wanted.get(name)]
    for name in wrong:
        rows = [len(side[name]) for side in (found, wanted) if isinstance(side.get(name), list)]
        print(
            f"{what}: {name} differs{f' ({rows[0]} rows, {rows[1]} expected)' if len(rows) == 2 else ''}",
            flush=True,
        )
    if not wrong:
        print(
            f"{what}: {len(wanted['log.jsonl'])} log rows, {len(wanted['answers.jsonl'])} answers, {len(wanted) - 3} arrays equal",
            flush=True,
        )
    return [f"{what}: {name}" for name in wrong]


def answers(path: pathlib.Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def write_requests(scratch: pathlib.Path) -> None:
    script = "import sys, kill_state; kill_state.make_model(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", script, str(scratch)],
        env=os.environ | environment(scratch),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"error: the model could not be made:\n{done.stderr[-2000:]}")
    rows = [
        {"prompt": f"Question {n}?"} | ({"image": f"{n % 3}.png"} if n % 2 else {})
        for n in range(REQUESTS)
    ]
    (scratch / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_model(scratch: str) -> None:
    """Writes a tiny random model and images for the requests."""
    import shutil

    from tests.support import tiny_checkpoint

    shutil.copytree(tiny_checkpoint.directory(), pathlib.Path(scratch) / "model")
    for number in range(3):
        tiny_checkpoint.make_image(20 + 8 * number, 20, number).save(
            pathlib.Path(scratch) / f"{number}.png"
        )


def environment(scratch: pathlib.Path) -> dict[str, str]:
    path = os.pathsep.join([*map(str, (ROOT, ROOT / "tools")), os.environ.get("PYTHONPATH", "")])
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": str(scratch / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    quick = {
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
    }
    return compiled | quick | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
