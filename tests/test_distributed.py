"""Processes find each other, notice that they differ, and end together, with a line that names the
one at fault.
"""

import re
import signal
import socket

import jax
import pytest

from internvl3_jax.parallel import multihost
from internvl3_jax.parallel.cluster import find_environment, slurm_devices
from internvl3_jax.parallel.watchdog import EXIT_PEER_LOST
from tests.support.local_processes import ROOT, Processes, free_address

WORKER = str(ROOT / "tests/support/distributed_worker.py")
HOST = socket.gethostname()


def run(scenario: str, count: int, started: int | None = None):
    """`started` of `count` processes that were given their place."""
    address, lines = free_address(), [[WORKER, scenario]] * (started or count)
    with Processes(
        lines, environ=lambda process: {"PLACE": f"{address} {count} {process}"}
    ) as all_:
        return all_.end(100)


def launched(scenario: str, common: dict, own: tuple[str, ...]):
    """Two processes under the variables of a launcher, `own` being the process's number; on a port
    that is free.
    """
    common |= {"JAX_COORDINATOR_PORT": free_address().split(":")[1]}
    with Processes(
        [[WORKER, scenario]] * 2, environ=lambda process: common | dict.fromkeys(own, str(process))
    ) as all_:
        return all_.end(100)


def check_found(processes, how: str):
    for number, process in enumerate(processes):
        assert re.search(
            rf"^process {number} of 2 on {HOST}, found by {how}, coordinator \S+:\d+$",
            process.out,
            re.M,
        )
        assert "sum 4\n" in process.out, "they computed together"
    assert f"hosts: 0 {HOST}, 1 {HOST}\n" in processes[0].out


# --- together ------------------------------------------------------------------------------------


def test_sigterm_to_one_stops_all_at_the_same_step():
    common = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    processes = launched("sigterm", common, ("SLURM_PROCID", "SLURM_LOCALID"))
    check_found(processes, "SLURM")
    assert [process.status for process in processes] == [multihost.TERMINATED] * 2, processes
    (first,), (second,) = (re.findall(r"stops at (\d+)", process.out) for process in processes)
    assert first == second and int(first) > 20


def test_an_error_in_one_ends_the_other():
    common = {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
    }
    ours, theirs = launched(
        "raises", common, ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
    )
    check_found([ours, theirs], "Open MPI")
    assert (ours.status, theirs.status) == (1, 1)
    assert (
        f"error: process 1 (host {HOST}) ended: data.jsonl row 7: the image is damaged\n"
        in ours.out
    )
    assert theirs.out.count("the image is damaged") == 1


def test_two_processes_come_to_their_end():
    for process in run("none", 2):
        assert process.status == 0 and process.out.count("sum 4\n") == 2, process.out


@pytest.mark.parametrize("scenario", ["differs", "slow end"])
def test_differences_are_named_everywhere(scenario):
    """Also if process 0, which holds the store, is the first to end."""
    expected = (
        f"the processes differ: step is 3 in process 1 (host {HOST}), and 2 in the other 2;"
        f" batch is '8x64' in process 2 (host {HOST}), and '4x64' in the other 2"
    )
    for process in run(scenario, 3):
        assert process.status == 1 and expected in process.out, process.out


def test_a_process_that_does_not_report_is_named():
    ours, theirs = run("late", 2)
    text = f"process 1 (host {HOST}) did not report within 1 s at step 1,200"
    assert (
        ours.status == theirs.status == EXIT_PEER_LOST and text in ours.out and text in theirs.out
    ), (ours, theirs)


def test_a_process_that_holds_up_the_others_is_named():
    for process in run("stuck", 2):
        assert process.status == EXIT_PEER_LOST, process.out
        for kind in ("warning", "error"):
            assert re.search(
                rf"^{kind}: process 1 \(host {HOST}\) is at step 4; others have waited at step 5",
                process.out,
                re.M,
            )


def test_a_process_that_never_starts_ends_the_other():
    (process,) = run("missing", 2, started=1)
    assert process.status == EXIT_PEER_LOST
    assert (
        f"error: process 0 on {HOST}: the 2 processes found by arguments did not all connect within 2 s"
        in process.out
    )


def test_a_killed_process_is_named():
    """Either the network tells at once, which becomes our error, or jax finds out by the heartbeat
    and aborts, after our warning.
    """
    ours, theirs = run("killed", 2)
    assert theirs.status == -signal.SIGKILL and ours.status in (EXIT_PEER_LOST, -signal.SIGABRT), (
        ours.out
    )
    silence = (
        "no longer answers"
        if ours.status == EXIT_PEER_LOST
        else "sends no heartbeat; its last one was at step"
    )
    assert f"process 1 (host {HOST}) {silence}" in ours.out


def test_without_the_coordinator_the_others_end():
    theirs, ours = run("coordinator", 2)
    assert theirs.status == -signal.SIGKILL and ours.status == -signal.SIGABRT
    assert "Either the leader task was preempted/died" in ours.out


# --- in one process ------------------------------------------------------------------------------

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-4]",
    "SLURM_NTASKS": "32",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
TPU = {"TPU_ML_PLATFORM": "JAX"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.mark.parametrize(
    "environ, how, processes",
    [
        ({}, None, None),
        (SLURM, "SLURM", 32),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None, None),  # a shell inside an allocation
        # the batch script itself, outside srun
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "32"}, None, None),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None, None),
        (
            SLURM
            | {
                "OMPI_MCA_orte_hnp_uri": "",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_RANK": "0",
            },
            "Open MPI",
            4,
        ),
        (TPU, "Cloud TPU", None),
        (TPU | {"TPU_SKIP_MDS_QUERY": "1"}, None, None),
        (TPU | {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, "GKE's TPU variables", None),
        (TPU | {"TPU_WORKER_HOSTNAMES": "localhost"}, None, None),
        (
            TPU | {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"},
            "GKE's TPU variables",
            None,
        ),
        # compiling for TPUs without having any
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_SKIP_MDS_QUERY": "1"}, None, None),
        (POD, None, None),
    ],
)
def test_environments(environ, how, processes):
    found = find_environment("", -1, -1, environ)
    assert (found and found.source, found and found.processes) == (how, processes)


@pytest.mark.parametrize(
    "arguments, environ, text",
    [
        (
            ("n1:8476", -1, -1),
            {},
            "--processes and --process missing; give --coordinator HOST:PORT, --processes and --process, or none",
        ),
        (("", 4, 0), {}, "--coordinator missing"),
        (("", -1, 2), {}, "--coordinator and --processes missing"),
        (("n1:8476", 4, 4), {}, "--process is 4 and --processes 4; processes are numbered from 0"),
        (("n1:8476", 0, 0), {}, "--process is 0 and --processes 0"),
        (("n1", 4, 0), {}, "--coordinator is 'n1'; it must be HOST:PORT"),
        (("n1:8476", 4, 0), SLURM, "--processes is 4, but SLURM says 32"),
        (("n1:8476", 32, 0), SLURM, "--process is 0, but SLURM says 9"),
        (
            ("", -1, -1),
            POD | {"JOB_COMPLETION_INDEX": "0"},
            "a pod of a Kubernetes Job: give --coordinator HOST:PORT",
        ),
        (
            ("", -1, -1),
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
            "Open MPI 5 started 2 processes; install mpi4py",
        ),
    ],
)
def test_arguments_that_make_no_sense(arguments, environ, text):
    with pytest.raises(ValueError, match=re.escape(text)) as raised:
        find_environment(*arguments, environ)
    assert "\n" not in str(raised.value)


def test_arguments_that_make_sense():
    assert find_environment("", 1, -1, SLURM) is None, "alone, whatever the environment says"
    for environ in ({}, SLURM):
        found = find_environment("n1:8476", 32, 9, environ)
        assert (found.arguments["num_processes"], found.arguments["process_id"]) == (32, 9)


@pytest.mark.parametrize(
    "tasks, on_node, visible, local, devices",
    [
        ("8(x2)", "8", "0,1,2,3,4,5,6,7", 3, [3]),
        # jax alone would take only the first
        ("1(x2)", "8", "0,1,2,3,4,5,6,7", 0, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("2", "8", "0,1,2,3,4,5,6,7", 1, [4, 5, 6, 7]),
        ("8(x2)", "8", "5", 3, [0]),  # --gpus-per-task
        ("4", "8", "GPU-1f,GPU-2e", 2, [0, 1]),
        ("8,4", "8", "0,1,2,3", 3, None),
        ("4(x2)", "", "0,1,2,3", 3, None),
        ("4(x2)", "4", "", 3, None),
    ],
)
def test_gpus_of_a_slurm_task(tasks, on_node, visible, local, devices):
    names = (
        "SLURM_STEP_TASKS_PER_NODE",
        "SLURM_GPUS_ON_NODE",
        "CUDA_VISIBLE_DEVICES",
        "SLURM_LOCALID",
    )
    assert (
        slurm_devices(dict(zip(names, (tasks, on_node, visible, str(local)), strict=True)))
        == devices
    )


def test_a_single_process_has_nothing_to_do(capsys):
    multihost.initialize(processes=1)
    with multihost.abort_together():
        multihost.report_step(1)
        multihost.assert_same_on_all_hosts(1, {"batch": "4x64"})
    with pytest.raises(KeyError), multihost.abort_together():
        raise KeyError("stays what it was")
    with multihost.preemption_signal() as stops:
        assert not stops(1)
        signal.raise_signal(signal.SIGTERM)
        assert stops(2)
    assert capsys.readouterr().out == ""


def test_who_did_not_come(monkeypatch, capsys):
    """Also where only jax knows the others, or their address."""
    monkeypatch.setattr(multihost.os, "_exit", lambda status: print(status))
    by_environment = {
        "SLURM": (SLURM, f"process 9 on {HOST}: the 32 "),
        "Cloud TPU": (TPU, f"{HOST}: the "),
    }
    for how, (environ, who) in by_environment.items():
        multihost._exit_incomplete(find_environment("", -1, -1, environ), 300)
        out, err = capsys.readouterr()
        assert out == f"{EXIT_PEER_LOST}\n" and err.startswith(
            f"error: {who}processes found by {how} did not all connect within 300 s. Look"
        )


def test_a_jax_that_hides_its_store_is_no_reason_to_stop(monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost, "_coordination", lambda: ("unknown", object()))
    multihost._exchange_hosts(find_environment("n1:8476", 2, 0, {}), 1, 1)
    assert "hides its key-value store: hosts are not compared" in capsys.readouterr().out
    multihost.assert_same_on_all_hosts(1, {})
