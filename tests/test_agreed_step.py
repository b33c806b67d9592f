"""The newest intact step of a run, found by two processes together."""

import shutil

import pytest

from internvl3_jax.checkpoints import directories
from internvl3_jax.io.integrity import MANIFEST
from tests.support.local_processes import Processes, free_address

NAMES = [MANIFEST, "params/a", "params/b", "params/c", "training.json"]
WORKER = """
import os, pathlib, sys
from internvl3_jax.checkpoints.verification import agreed_step
from internvl3_jax.io import integrity
from internvl3_jax.parallel import multihost

address, number, *runs = sys.argv[1:]
compare, hashed = integrity._wrong, []

def compare_and_note(path, *arguments):
    hashed.append("/".join(path.parts[path.parts.index("checkpoints") + 1 :]))
    return compare(path, *arguments)

integrity._wrong = compare_and_note
multihost.initialize(address, 2, int(number), start_seconds=100)
with multihost.abort_together():
    for run in runs:
        hashed.clear()
        newest = agreed_step(run)
        print("found", newest, *sorted(hashed), flush=True)
"""


def make_run(run):
    for step in (2, 4):
        with directories.new_directory(run / "checkpoints" / str(step)) as partial:
            (partial / "params").mkdir()
            for name in "abc":
                (partial / "params" / name).write_text(f"{step} {name}")
            (partial / "training.json").write_text(f'{{"step": {step}}}')
            (partial / MANIFEST).write_text('{"format": 1}')
    return run


def found(out: str) -> list[tuple[str, list[str]]]:
    lines = [line.split() for line in out.splitlines() if line.startswith("found ")]
    return [(newest, files) for _, newest, *files in lines]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    intact = make_run(folder / "intact")
    damaged = shutil.copytree(intact, folder / "damaged")
    (damaged / "checkpoints/4/params/b").write_text("4 x")
    copies = [shutil.copytree(intact, folder / f"copy{number}") for number in range(2)]
    other = shutil.copytree(intact, folder / "other")
    shutil.rmtree(other / "checkpoints/4")
    address = free_address()
    lines = [
        ["-c", WORKER, address, str(number), intact, damaged, copies[number], last]
        for number, last in enumerate((intact, other))
    ]
    with Processes([list(map(str, line)) for line in lines]) as processes:
        return processes.end(200)


def test_processes_that_share_a_disk_share_the_hashing(ended):
    (newest, first), (also, second) = (found(process.out)[0] for process in ended)
    assert newest == also == "4"
    assert first and second and not set(first) & set(second)
    assert sorted(first + second) == sorted(f"4/{name}" for name in NAMES)


def test_what_one_process_finds_counts_for_both(ended):
    assert [found(process.out)[1][0] for process in ended] == ["2", "2"]
    warnings = [process.out.count("4: params/b has other content") for process in ended]
    assert sorted(warnings) == [0, 1]
    assert sum("4: damaged; see the message of process" in process.out for process in ended) == 1


def test_copies_are_hashed_by_each_process(ended):
    for process in ended:
        assert found(process.out)[2] == ("4", sorted(f"4/{name}" for name in NAMES))


def test_processes_that_see_other_steps_end(ended):
    for process in ended:
        assert process.status == 1 and "complete steps is '2'" in process.out, process.out
