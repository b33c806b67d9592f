"""The scripts in launch/, and a host without a scheduler: what can be checked without the tools
that they call. launch/check.sh does the rest, with those tools.
"""

import os
import re
import signal
import subprocess

import pytest
import yaml
from absl import flags

from internvl3_jax.config import MeshConfig
from internvl3_jax.parallel.multihost import EXIT_PEER_LOST, TERMINATED
from tests.support.launch_scripts import LAUNCH, ROOT, run

SCRIPTS = sorted(LAUNCH.glob("*.sh"))
# train.py
STARTING = sorted(path for path in LAUNCH.iterdir() if path.name not in ("check.sh", "restart.sh"))


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
        (["tpu.sh"], [], "error: '' is not a command"),
        (["tpu.sh", "start"], [], "error: 'start' is not a command"),
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
    """143 and 134 are in the files as numbers."""
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
