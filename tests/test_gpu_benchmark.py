"""benchmarks/gpu.py: every line runs on a CPU, failures stay in their case, and runs resume."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks.gpu_parts import runner, summary
from benchmarks.gpu_parts.part import Part, latest, read

ROOT = pathlib.Path(__file__).resolve().parent.parent
PARTS = {
    "ceilings",
    "correctness",
    "inference 1b",
    "torch 1b",
    "train 1b",
    "torch train 1b",
    "compile 1b measuring",
    "engine 1b",
    "torch compiled 1b",
}
BROKEN = """
import os, pathlib, time
FOLDER = pathlib.Path(__file__).parent

def cases(size, smoke):
    def note(name, value=1):
        with open(FOLDER / "calls", "a") as file:
            file.write(size + name + "\\n")
        return {"value": value}

    def fail():
        note("fails")
        raise ValueError("on purpose")

    def hang():
        note("hangs")
        time.sleep(600)

    def exit():
        note("exits")
        os._exit(3)

    def flags():
        folder = pathlib.Path(os.environ["AUTOTUNE_FOLDER"])
        before = sorted(path.name for path in folder.rglob("*") if path.is_file())
        (folder / "shared" / size).write_text("a result")
        return {"flags": os.environ["XLA_FLAGS"], "before": before, "folder": str(folder)}

    if size.startswith("flags"):
        return {"flags": flags}
    return {
        "hang": {"before": lambda: note("before"), "hangs": hang, "after": lambda: note("after")},
        "fail": {"fails": fail, "next": lambda: note("next")},
        "exit": {"exits": exit},
        "good": {"works": lambda: note("works")},
    }[size]
"""


def run_smoke(output, parts, quick: str = "1") -> str:
    """Runs parts at tiny shapes; returns what was printed."""
    command = [sys.executable, "benchmarks/gpu.py", "--smoke", "--output", str(output)]
    done = subprocess.run(
        [*command, "--parts", ",".join(parts)],
        cwd=ROOT,
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": quick},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr + (output / "log.txt").read_text()[-4000:]
    return done.stdout


def test_smoke_run_has_every_part(tmp_path):
    # Unoptimized, the references in float64 take minutes.
    run_smoke(tmp_path, ["correctness"], quick="0")
    printed = run_smoke(tmp_path, PARTS - {"correctness"})
    rows, log = read(tmp_path), (tmp_path / "log.txt").read_text()[-4000:]
    assert {row["part"]: row["status"] for row in rows if "status" in row} == dict.fromkeys(
        PARTS, "finished"
    )
    assert [row for row in rows if "error" in row] == [], log
    assert {part for part, _ in latest(rows)} == PARTS
    assert all(row["ok"] for (part, _), row in latest(rows).items() if part == "correctness")
    assert json.loads((tmp_path / "results.json").read_text()) == rows
    text = (tmp_path / "summary.md").read_text()
    assert "No number here is a measurement" in text
    assert "| inference 1b | first token |" in text
    assert text.strip() in printed
    assert len(list(tmp_path.iterdir())) <= 8


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Runs parts of a module that hangs, fails and exits; returns the folder."""
    (tmp_path / "broken.py").write_text(BROKEN)
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    return tmp_path


def parts(*names, seconds=5.0):
    return [Part(name, "broken", name, seconds) for name in names]


def calls(folder):
    return (folder / "calls").read_text().split()


def test_failures_stay_in_their_case(broken):
    output = broken / "out"
    runner.run_parts(parts("hang", "fail", "exit", "good"), output, 120, smoke=True)
    values = latest(read(output))
    assert values["hang", "before"]["value"] == 1
    assert "stopped at the part's limit of 5 s" in values["hang", "hangs"]["error"]
    assert values["fail", "fails"]["error"] == "ValueError: on purpose"
    assert values["fail", "next"]["value"] == 1
    assert "status 3" in values["exit", "exits"]["error"]
    assert values["good", "works"]["value"] == 1
    text = summary.write(output)
    assert "| fail | fails | ValueError: on purpose |" in text

    # Only the case behind the one that hung is missing.
    done = len(calls(broken))
    runner.run_parts(parts("hang", "fail", "exit", "good"), output, 120, smoke=True)
    assert calls(broken)[done:] == ["hangafter"]
    assert latest(read(output))["hang", "after"]["value"] == 1

    # On request also what failed, and nothing else.
    done = len(calls(broken))
    runner.run_parts(parts("fail", "good"), output, 120, smoke=True, retry=True)
    assert calls(broken)[done:] == ["failfails"]


def test_time_of_the_call_ends(broken, monkeypatch):
    """What the call has no time for is no error, and the next call runs it, last."""
    monkeypatch.setattr(runner, "LEAST_SECONDS", 1)
    output = broken / "out"
    runner.run_parts(parts("hang", "good", seconds=100), output, 5, smoke=True)
    rows = read(output)
    assert not [row for row in rows if "error" in row]
    assert ("hang", "before") in latest(rows)
    assert not [row for row in rows if row.get("part") == "good"]
    done = len(calls(broken))
    runner.run_parts(parts("hang", seconds=4), output, 60, smoke=True)
    assert calls(broken)[done:] == ["hangafter", "hanghangs"]


def test_autotuning_results_are_kept(broken, monkeypatch):
    """Parts share the compiler's results, also with a later call; a part may have its own."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    output = broken / "out"
    runner.run_parts(parts("flags1"), output, 60, smoke=False)
    own = "--xla_gpu_per_fusion_autotune_cache_dir={autotune}/compile"
    second = Part("flags2", "broken", "flags2", 20, own)
    runner.run_parts([*parts("flags1"), second], output, 60, smoke=False)
    values = latest(read(output))
    first, second = values["flags1", "flags"], values["flags2", "flags"]
    flag = "--xla_gpu_per_fusion_autotune_cache_dir="
    assert first["flags"] == f"{flag}{first['folder']}/shared"
    assert second["flags"] == f"{flag}{second['folder']}/compile"
    assert first["before"] == [] and second["before"] == ["flags1"]
    assert (output / "autotune.tar.gz").exists()
