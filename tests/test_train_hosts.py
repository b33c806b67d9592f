"""train.py on several processes, as on the hosts of a pod: the same run as on one, also when one of
them is killed.
"""

import json
import pathlib
import re
import shutil
import signal

import jax
import numpy as np
import pytest

from internvl3_jax import load
from internvl3_jax.config import MeshConfig
from internvl3_jax.io.checkpoint_paths import latest_step
from internvl3_jax.parallel.sharding import make_mesh
from internvl3_jax.parallel.watchdog import EXIT_PEER_LOST
from tests.support import tiny_checkpoint
from tests.support.hosts_run import SAVE_EVERY, STEPS
from tests.support.local_processes import ROOT, Processes, finish, free_address
from tests.support.pairs import write_pairs


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts train.py in `count` processes of `devices` devices each, with the configuration that
    the expression `config` is of.
    """
    folder = tmp_path_factory.mktemp("config")

    def start(workdir, count: int, devices: int, *flags, config="hosts_config()"):
        path, address = folder / f"{workdir.name}.py", free_address()
        path.write_text(
            f"from tests.support.hosts_run import *\ndef get_config(): return {config}\n"
        )
        line = [str(ROOT / "train.py"), f"--config={path}", f"--workdir={workdir}", *flags]
        own = [
            [f"--coordinator={address}", f"--processes={count}", f"--process={number}"]
            for number in range(count)
        ]
        return Processes([line + (flags if count > 1 else []) for flags in own], devices)

    return start


def log_of(workdir: pathlib.Path) -> list[tuple]:
    rows = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["batch"], row["loss"], row["grad_norm"]) for row in rows]


def check_same(log: list[tuple], reference: list[tuple]) -> None:
    """The same batches to the bit, and the same numbers but for the order in which devices add."""
    assert [row[:2] for row in log] == [row[:2] for row in reference]
    np.testing.assert_allclose([row[2:] for row in log], [row[2:] for row in reference], rtol=1e-5)


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    """Log of one process with one device."""
    workdir = tmp_path_factory.mktemp("alone")
    finish(start(workdir, 1, 1))
    return log_of(workdir)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def count(request):
    """Processes of two devices each."""
    return request.param


@pytest.fixture(scope="module")
def killed(start, count, tmp_path_factory):
    """(workdir, its log then, how the processes ended) of processes of which one was killed two
    steps after a checkpoint.
    """
    workdir = tmp_path_factory.mktemp("killed")

    def is_time(line: str) -> bool:
        found = re.match(r"step (\d+)/", line)
        return bool(found and (saved := latest_step(workdir)) and int(found[1]) >= saved + 2)

    with start(workdir, count, 2, "--config.mesh.tensor=2") as processes:
        processes.wait_for(0, is_time)
        processes.running[count // 2].send_signal(signal.SIGKILL)
        ended = processes.end(200)
    return workdir, log_of(workdir), ended


@pytest.fixture(scope="module")
def restarted(start, count, killed):
    """The workdir of the same, started again until its end."""
    finish(start(killed[0], count, 2, "--config.mesh.tensor=2"))
    return killed[0]


def test_a_killed_process_ends_the_others(count, killed):
    workdir, _, ended = killed
    lost = count // 2
    assert ended[lost].status == -signal.SIGKILL
    for process in ended[:lost] + ended[lost + 1 :]:
        assert process.status in (EXIT_PEER_LOST, -signal.SIGABRT), process.out
        assert re.search(
            rf"process {lost} \(host \S+\) (no longer answers|sends no heartbeat)", process.out
        )
    assert latest_step(workdir) % SAVE_EVERY == 0, "what was complete is kept"


def test_started_again_it_resumes_exactly(killed, restarted, alone):
    before, log = killed[1], log_of(restarted)
    assert log[: len(before)] == before, "steps that ran twice have the same bits"
    check_same(log, alone)


@pytest.mark.slow
@pytest.mark.parametrize("others, devices, mesh", [(1, 1, {}), (2, 4, {"data": 2, "context": 2})])
def test_other_processes_resume_from_its_checkpoint(
    start, restarted, alone, tmp_path, others, devices, mesh
):
    """Saved by 2 or 4 processes x 2 devices; what was computed from it there is computed here."""
    workdir = tmp_path / "run"
    shutil.copytree(restarted, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    out = finish(
        start(
            workdir,
            others,
            devices,
            *(f"--config.mesh.{axis}={size}" for axis, size in mesh.items()),
        )
    )[0].out
    assert f"resuming from step {STEPS - SAVE_EVERY} of {workdir}" in out
    check_same(log_of(workdir), alone)


def test_its_checkpoint_has_the_same_bits_on_any_devices(restarted):
    path = restarted / "checkpoints" / str(STEPS)
    whole = load(path).params
    spread = load(path, mesh=make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))).params
    assert jax.tree.all(jax.tree.map(lambda x: len(x.sharding.device_set) == 8, spread))
    jax.tree.map(np.testing.assert_array_equal, whole, spread)


@pytest.mark.slow
def test_preference_optimization_on_two_processes_is_that_on_one(start, tmp_path):
    """Policy, reference and eval pairs over the devices of both."""
    config = f"pairs_config({write_pairs(tmp_path)!r}, {str(tiny_checkpoint.directory())!r})"
    finish(start(tmp_path / "one", 1, 1, config=config))
    finish(start(tmp_path / "two", 2, 2, "--config.mesh.context=2", config=config))
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [row["step"] for row in one] == [row["step"] for row in two] == [1, 2, 3, 3]
    for ours, theirs in zip(two, one, strict=True):
        assert ours.get("batch") == theirs.get("batch")
        names = {name for name in ours if name.startswith(("loss", "reward", "eval"))}
        # margins that are rounding alone
        for name in names - ({"reward_accuracy"} if ours["step"] == 1 else set()):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
    assert two[-1]["eval_reward_margin"] > 0
