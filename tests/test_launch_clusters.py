"""launch/ on SLURM, TPU VMs, Kubernetes, SkyPilot and xpk, with stand-ins for their tools."""

import math
import re
import shlex
import subprocess

import pytest
import yaml

from internvl3_jax.parallel.multihost import EXIT_PEER_LOST, TERMINATED
from tests.support.launch_scripts import LAUNCH, ROOT, run

# --- SLURM ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "status, before, requeued",
    [
        (0, 0, False),
        (TERMINATED, 0, True),
        (EXIT_PEER_LOST, 3, True),
        (1, 19, True),
        (1, 20, False),
    ],
)
def test_slurm(stubs, tmp_path, status, before, requeued):
    env = stubs(srun=f"exit {status}", scontrol="") | {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "42",
        "SLURM_RESTART_COUNT": str(before),
    }
    run("slurm.sh", "--config", "a b.py", "--workdir", "/shared/X", env=env, status=status)
    step, *more = stubs.calls()
    assert step[:3] == ["srun", "--kill-on-bad-exit=1", "--label"]
    assert step[-5:] == ["train.py", "--config", "a b.py", "--workdir", "/shared/X"]
    assert more == ([["scontrol", "requeue", "42"]] if requeued else [])


def test_slurm_options():
    """Options, of which launch/check.sh looks up that they exist, have the form of their kind and
    stand before the first command.
    """
    head = (LAUNCH / "slurm.sh").read_text().split("\nset -")[0]
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", head, re.M))
    assert "#SBATCH" not in (LAUNCH / "slurm.sh").read_text().removeprefix(head)
    assert options["ntasks-per-node"] == options["gpus-per-node"], "one process per GPU"
    assert re.fullmatch(r"TERM@\d+", options["signal"]), "to the processes, not to the script (B:)"
    assert "requeue" in options and options["open-mode"] == "append"


# --- TPU VMs -------------------------------------------------------------------------------------

# Of `gcloud compute tpus queued-resources`, by its reference.
GCLOUD = {
    "create": {
        "accelerator-type",
        "runtime-version",
        "node-id",
        "node-count",
        "node-prefix",
        "spot",
    },
    "describe": {"format"},
    "ssh": {"node", "worker", "command"},
    "scp": {"node", "worker"},
    "delete": {"force", "quiet"},
}


def gcloud_calls(stubs) -> list[tuple[str, dict]]:
    """(verb, flags) of each call. AssertionError for one that gcloud does not have."""
    found = []
    for program, *line in stubs.calls():
        if program == "gcloud":
            assert line[:3] == ["compute", "tpus", "queued-resources"]
            options = dict(
                word.removeprefix("--").partition("=")[::2]
                for word in line[4:]
                if word.startswith("--")
            )
            assert options.pop("zone") == "z" and options.keys() <= GCLOUD[line[3]], line
            assert any(word.split(":")[0] == "pod" for word in line[4:])
            found.append((line[3], options))
    return found


@pytest.mark.parametrize(
    "slices, nodes",
    [("1", {"node-id": "pod"}), ("4", {"node-count": "4", "node-prefix": "pod", "spot": ""})],
)
def test_tpu_create(stubs, slices, nodes):
    env = stubs(gcloud="[[ $4 != describe ]] || echo ACTIVE", sleep="") | {
        "NAME": "pod",
        "ZONE": "z",
        "TYPE": "v5p-128",
    }
    run("tpu.sh", "create", env=env | {"SLICES": slices, "SPOT": "yes" if "spot" in nodes else ""})
    (verb, options), *_ = gcloud_calls(stubs)
    assert verb == "create" and options == nodes | {
        "accelerator-type": "v5p-128",
        "runtime-version": "v2-alpha-tpuv5",
    }


def test_tpu_run(stubs, tmp_path):
    env = stubs(gcloud="") | {
        "NAME": "pod",
        "ZONE": "z",
        "TYPE": "v6e-16",
        "SHARE": "10.0.0.2:/share",
    }
    for verb in ("run --config configs/X.py --workdir", "logs", "stop", "delete"):
        run("tpu.sh", *verb.split(), *(["/share/a b"] if "run" in verb else []), env=env)
    *remote, (last, _) = gcloud_calls(stubs)
    assert last == "delete" and [verb for verb, _ in remote] == ["ssh"] * 3
    for _, options in remote:
        assert options["node"] == options["worker"] == "all"
        subprocess.run(["bash", "-n", "-c", options["command"]], check=True)
    assert (
        r"launch/restart.sh ~/venv/bin/python -u train.py --config configs/X.py --workdir /share/a\ b"
        in remote[0][1]["command"]
    )


def test_tpu_setup(stubs, tmp_path):
    env = stubs(gcloud="", git="") | {
        "NAME": "pod",
        "ZONE": "z",
        "TYPE": "v6e-16",
        "SHARE": "10.0.0.2:/share",
    }
    run("tpu.sh", "setup", env=env)
    (copy, _), (verb, options) = gcloud_calls(stubs)
    assert (copy, verb) == ("scp", "ssh")
    subprocess.run(["bash", "-n", "-c", options["command"]], check=True)
    (constraints,) = re.findall(r"--constraint internvl3_jax/(\S+)", options["command"])
    assert (ROOT / constraints).exists() and "mount '10.0.0.2:/share' /share" in options["command"]


# --- Kubernetes ----------------------------------------------------------------------------------


def jobset(name: str):
    """(document, the one replicated job, its container, its arguments as a dict)."""
    document = yaml.safe_load((LAUNCH / name).read_text())
    assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = document["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    return document, job, container, dict(argument.split("=", 1) for argument in container["args"])


@pytest.mark.parametrize("name", ["gke_tpu.yaml", "gke_gpu.yaml"])
def test_jobsets_start_again(name):
    document, job, container, arguments = jobset(name)
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] and spec["backoffLimit"] == 0
    assert spec["template"]["spec"]["restartPolicy"] == "Never", "a pod failure policy asks for it"
    (rule,) = document["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == (
        "RestartJobSetAndIgnoreMaxRestarts",
        ["PodFailurePolicy"],
    )
    evicted, stopped = spec["podFailurePolicy"]["rules"]
    assert evicted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert stopped["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "In",
        "values": [TERMINATED],
    }
    assert any(
        arguments["--workdir"].startswith(mount["mountPath"] + "/")
        for mount in container["volumeMounts"]
    )


def test_jobset_of_tpu_slices():
    _, job, container, arguments = jobset("gke_tpu.yaml")
    spec = job["template"]["spec"]
    topology = spec["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert chips * spec["completions"] == math.prod(map(int, topology.split("x")))
    assert job["replicas"] == int(arguments["--config.mesh.slice"])


def test_jobset_of_gpus():
    document, job, container, arguments = jobset("gke_gpu.yaml")
    name, spec = document["metadata"]["name"], job["template"]["spec"]
    assert job["replicas"] == 1 and spec["completions"] == int(arguments["--processes"])
    assert spec["completionMode"] == "Indexed"
    assert arguments["--coordinator"].rpartition(":")[0] == f"{name}-{job['name']}-0-0.{name}"
    assert arguments["--process"] == f"$({container['env'][0]['name']})"


# --- SkyPilot and xpk ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("sky_*.yaml")), ids=lambda path: path.name)
def test_sky(stubs, tmp_path, path):
    """setup and run are bash, and run starts what the page says: the workdir is in the bucket and
    is the same after a recovery.
    """
    task = yaml.safe_load(path.read_text())
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n", "-c", task[part]], check=True)
    (tmp_path / "venv/bin").mkdir(parents=True)
    env = stubs(python="exit 0") | {
        "HOME": str(tmp_path),
        "CONFIG": "configs/X.py",
        "SKYPILOT_TASK_ID": "7",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
    }
    (tmp_path / "venv/bin/python").symlink_to(tmp_path / "bin/python")
    subprocess.run(["bash", "-c", task["run"]], env=env, check=True)
    ((_, *line),) = stubs.calls()
    assert (
        line[:4] == ["-u", "train.py", "--config=configs/X.py", "--workdir=/share/7"]
        and "/share" in task["file_mounts"]
    )
    if "num_nodes" in task:
        assert line[4:] == ["--coordinator=10.0.0.1:8476", "--processes=2", "--process=1"]


def test_xpk(stubs):
    names = ("NAME", "CLUSTER", "PROJECT", "ZONE", "TYPE", "IMAGE", "STORAGE")
    env = stubs(xpk="") | {name: name.lower() for name in names} | {"SLICES": "2"}
    run("xpk.sh", "--config=configs/a b.py", "--workdir=/share/runs/X", env=env)
    ((_, workload, create, *options),) = stubs.calls()
    assert (workload, create) == ("workload", "create")
    options = dict(option.removeprefix("--").split("=", 1) for option in options)
    assert options["num-slices"] == "2" and options["restart-on-exit-codes"] == "1"
    assert shlex.split(options["command"]) == [
        "exec",
        "python",
        "-u",
        "train.py",
        "--config=configs/a b.py",
        "--workdir=/share/runs/X",
    ]
