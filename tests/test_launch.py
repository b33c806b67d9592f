"""The files in launch/: what can be checked without the tools that read them. launch/check.sh does
the rest, with those tools.
"""

import math
import os
import pathlib
import re
import shlex
import signal
import subprocess

import pytest
import yaml
from absl import flags

import train
from internvl3_jax.config import MeshConfig
from internvl3_jax.parallel.multihost import EXIT_PEER_LOST, TERMINATED

ROOT = pathlib.Path(train.__file__).parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
# train.py
STARTING = sorted(path for path in LAUNCH.iterdir() if path.name not in ("check.sh", "restart.sh"))


@pytest.fixture
def stubs(tmp_path):
    """Call with programs and what each does in bash: they stand first on the returned environment's
    PATH and note their calls.
    """

    def make(**programs):
        for name, body in programs.items():
            path = tmp_path / "bin" / name
            path.parent.mkdir(exist_ok=True)
            note = f"{{ printf '%s\\x1f' {name} \"$@\"; printf '\\x1e'; }} >> {tmp_path}/calls"
            path.write_text(f"#!/usr/bin/env bash\n{note}\n{body}\n")
            path.chmod(0o755)
        return os.environ | {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}

    make.notes = tmp_path / "calls"
    make.calls = lambda: [
        call.split("\x1f")[:-1] for call in (tmp_path / "calls").read_text().split("\x1e")[:-1]
    ]
    return make


def run(script: str, *arguments, env, status=0):
    done = subprocess.run(
        [LAUNCH / script, *arguments], env=env, text=True, capture_output=True, timeout=60
    )
    assert done.returncode == status, done.stderr
    return done


# --- all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(path):
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK)


@pytest.mark.parametrize(
    "path", [*SCRIPTS, *sorted((ROOT / "tools").glob("*.sh"))], ids=lambda path: path.name
)
def test_help_prints_the_usage_and_does_nothing(stubs, path):
    """No program of a cloud or of pip is called, and no variable has to be set."""
    env = stubs(gcloud="", xpk="", srun="", scontrol="", git="", python3="exit 1", pip="")
    for flag in ("--help", "-h"):
        done = subprocess.run([path, flag], env=env, text=True, capture_output=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert len(done.stdout.splitlines()) >= 2 and "#" not in done.stdout.split("\n")[0]
    assert not stubs.notes.exists()


@pytest.mark.parametrize(
    "arguments, missing, named",
    [
        (["tpu.sh", "run", "--config", "c"], ["NAME"], "error: NAME is not set"),
        (["tpu.sh", "create"], ["ZONE"], "error: ZONE is not set"),
        (["tpu.sh", "create"], ["TYPE"], "error: TYPE is not set"),
        (["tpu.sh"], [], "error: '' is no command"),
        (["tpu.sh", "start"], [], "error: 'start' is no command"),
        (["xpk.sh", "--config=c"], ["NAME"], "error: NAME is not set"),
        (["xpk.sh", "--config=c"], ["STORAGE"], "error: STORAGE is not set"),
        (["xpk.sh"], [], "error: the arguments of train.py are missing"),
        (["restart.sh"], [], "error: there is no command"),
        (["slurm.sh", "--config", "c"], [], "error: this is a job of SLURM"),
        (["check.sh", "nosuch.yaml"], [], "error: nosuch.yaml: no such file"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_is_missing_is_one_line(stubs, arguments, missing, named):
    given = dict.fromkeys(
        ("NAME", "ZONE", "TYPE", "CLUSTER", "PROJECT", "IMAGE", "STORAGE"), "v5p-8"
    )
    env = {
        name: value
        for name, value in (stubs(gcloud="", xpk="") | given).items()
        if name not in missing
    }
    done = run(*arguments, env=env, status=2)
    assert done.stdout == "" and done.stderr.startswith(named) and done.stderr.count("\n") == 1
    assert not stubs.notes.exists()


@pytest.mark.parametrize(
    "name, values", [("tpu.sh", {"SLICES": "two"}), ("restart.sh", {"RESTARTS": "a[$(id)]"})]
)
def test_numbers_are_numbers(stubs, name, values):
    env = stubs(gcloud="") | {"NAME": "pod", "ZONE": "z", "TYPE": "v6e-16"} | values
    assert "must be a whole number" in run(name, "create", env=env, status=2).stderr


@pytest.mark.parametrize("path", STARTING, ids=lambda path: path.name)
def test_flags_exist(path):
    """Every flag of train.py that a file names is one, and so is the configuration's field behind
    it.
    """
    text = path.read_text()
    assert "train.py" in text or path.suffix == ".yaml"
    for name in re.findall(r"--config\.mesh\.(\w+)", text):
        assert hasattr(MeshConfig(), name)
    own = set(re.findall(r"--(config|workdir|coordinator|processes|process)\b(?!\.)", text))
    assert {"config", "workdir"} <= own or path.name == "Dockerfile"
    assert own <= set(flags.FLAGS)


def test_what_is_installed_is_what_training_md_says():
    """A host that a file sets up has the packages of docs/training.md's line."""
    (line,) = re.findall(
        r"^pip install -e '\.\[gpu,([a-z,]+)\]'", (ROOT / "docs" / "training.md").read_text(), re.M
    )
    for name in ("tpu.sh", "sky_gpu.yaml", "sky_tpu.yaml", "Dockerfile"):
        (extras,) = re.findall(
            r"\[(?:gpu|tpu|\$\{EXTRA\}),?([a-z,]*)\]", (LAUNCH / name).read_text()
        )
        assert extras == line, name


def test_the_page_names_every_file():
    page = (ROOT / "docs" / "launch.md").read_text()
    assert [path.name for path in LAUNCH.iterdir() if path.name not in page] == []


def test_statuses_are_those_of_the_program():
    """143 and 134 stand in the files as numbers."""
    assert (TERMINATED, EXIT_PEER_LOST) == (143, 134)
    for path in LAUNCH.glob("sky_*.yaml"):
        assert yaml.safe_load(path.read_text())["resources"]["job_recovery"][
            "recover_on_exit_codes"
        ] == [
            EXIT_PEER_LOST,
            TERMINATED,
        ]


# --- a host without a scheduler ------------------------------------------------------------------

# A command that ends with the statuses in a file, one after the other.
NEXT = 'read -r status < "$0"; sed -i 1d "$0"; exit "$status"'


@pytest.mark.parametrize(
    "statuses, ends",
    [
        ([0], 0),
        ([TERMINATED] * 5 + [0], 0),  # does not count
        ([EXIT_PEER_LOST, 1, 0], 0),
        ([1, TERMINATED, EXIT_PEER_LOST, 7], 7),  # three failures, two of which are started again
    ],
)
def test_restart(tmp_path, statuses, ends):
    (tmp_path / "statuses").write_text("".join(f"{status}\n" for status in statuses))
    env = os.environ | {"RESTARTS": "2", "PAUSE": "0"}
    run("restart.sh", "bash", "-c", NEXT, str(tmp_path / "statuses"), env=env, status=ends)
    assert (tmp_path / "statuses").read_text() == "", "all of them were used"


def test_restart_passes_sigterm_on_and_ends(tmp_path):
    saves = f"trap 'sleep 0.5; echo saved > {tmp_path}/saved; exit 143' TERM; echo here; while true; do sleep 0.1; done"
    with subprocess.Popen(
        [LAUNCH / "restart.sh", "bash", "-c", saves], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == TERMINATED
    assert (tmp_path / "saved").exists()


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
