"""train.py as a program: what a run leaves behind; killed, stopped or damaged, it resumes bit
for bit.
"""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import train
from convert.open import open_model
from convert.run import convert
from internvl3_jax import load
from internvl3_jax.checkpoints import storage
from internvl3_jax.config import to_dict
from internvl3_jax.io.checkpoint_paths import latest_step
from internvl3_jax.parallel.multihost import TERMINATED
from tests.support.official_run import write_official
from tests.support.tiny_checkpoint import CONFIG, PROCESSOR, train_config
from tests.support.train_log import SAVE_EVERY, STEPS, log_of

ROOT = pathlib.Path(train.__file__).parent


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """train.py as a program with the configuration above; call with a workdir and more flags."""
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text("from tests.support.tiny_checkpoint import train_config as get_config\n")
    environment = {"PYTHONPATH": str(ROOT)}

    def start(workdir, *flags, config=path, **options):
        line = [
            sys.executable,
            "-W",
            "error",
            str(ROOT / "train.py"),
            f"--config={config}",
            f"--workdir={workdir}",
            *flags,
        ]
        return subprocess.Popen(
            line,
            cwd="/",
            env=os.environ | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=1,
            **options,
        )

    return start


@pytest.fixture(scope="module")
def whole_run(command, tmp_path_factory):
    """(workdir, stdout) of a run from beginning to end."""
    workdir = tmp_path_factory.mktemp("whole")
    process = command(workdir, "--config.logging.every=1")
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0 and err == "", err
    return workdir, out


def test_a_run_leaves_what_it_should(whole_run):
    workdir, out = whole_run
    losses = [loss for _, loss, *_ in log_of(workdir)]
    assert [step for step, *_ in log_of(workdir)] == list(range(1, STEPS + 1))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert sorted(os.listdir(workdir / "checkpoints")) == [
        str(STEPS - STEPS % SAVE_EVERY),
        str(STEPS),
    ]
    assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG")
    resolved = to_dict(train_config())
    assert json.loads((workdir / "config.json").read_text()) == json.loads(json.dumps(resolved))
    assert f"step {STEPS}/{STEPS} 100.0% | loss {losses[-1]:.4g} | lr " in out
    compiling = out.splitlines().index("compiling the train step ...")
    assert re.fullmatch(r"compiled in [\d.]+ s", out.splitlines()[compiling + 1])
    assert re.search(r"vision +([\d,]+) +\1 +0.003 to 0.02", out), "all of it is trained"
    opened = load(workdir)
    assert (opened.config, opened.processor) == (CONFIG, PROCESSOR)
    assert opened.directory == workdir / "checkpoints" / str(STEPS)
    finished = rf"{workdir} is finished: step {STEPS} of {STEPS}, trained for (\d+m)?\d+s"
    assert re.fullmatch(finished, out.splitlines()[-3])


def test_a_killed_run_resumes_bit_for_bit(whole_run, command, tmp_path):
    """Killed after some checkpoints, started again: the losses of all steps and the final state are
    those of the whole run.
    """
    process = command(tmp_path / "run")
    for line in process.stdout:
        if line.startswith(f"step {3 * SAVE_EVERY + 2}/"):
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    seen = log_of(tmp_path / "run")
    assert 3 * SAVE_EVERY + 2 <= len(seen) < STEPS
    process = command(tmp_path / "run")
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    (line,) = [line for line in out.splitlines() if line.startswith("resuming from step ")]
    step = int(line.split()[3])
    assert 0 < step <= len(seen) and step % SAVE_EVERY == 0
    assert f"step {step + 1}/" in out and f"step {step}/" not in out
    assert log_of(tmp_path / "run") == log_of(whole_run[0])
    for part in ("params", "opt_state"):
        ours, theirs = (
            leaves(workdir / "checkpoints" / str(STEPS) / part)
            for workdir in (tmp_path / "run", whole_run[0])
        )
        assert set(ours) == set(theirs) and len(ours) > 10
        for path, leaf in ours.items():
            np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)


def leaves(path):
    """Every array of a stored tree by its path."""
    stored = storage.ocp.metadata(path).metadata
    found = jax.tree_util.tree_leaves_with_path(storage.load_tree(path, stored))
    return {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in found}


def test_a_finished_run_stays_as_it_is(whole_run, command):
    """Started again it says that it is finished; another configuration in the same workdir is
    refused. Both change nothing.
    """
    workdir, _ = whole_run
    before = {name: (workdir / name).stat().st_mtime_ns for name in ("log.jsonl", "config.json")}
    process = command(workdir, "--config.checkpoint.keep=2")
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0 and err == ""
    assert (
        out.startswith(f"{workdir} is finished: step {STEPS} of {STEPS}, trained for ")
        and len(out.splitlines()) == 3
    )
    assert {name: (workdir / name).stat().st_mtime_ns for name in before} == before
    before = (workdir / "log.jsonl").read_text(), (workdir / "config.json").read_text()
    process = command(workdir, "--config.optimizer.learning_rate=1e-4")
    out, err = process.communicate(timeout=500)
    assert process.returncode == 1 and out == ""
    assert err == (
        f"error: {workdir} is a run with another configuration ({workdir}/config.json): "
        "optimizer.learning_rate is 0.003 in the run, 0.0001 in the config; "
        "name another --workdir, or delete it\n"
    )
    assert ((workdir / "log.jsonl").read_text(), (workdir / "config.json").read_text()) == before


def test_a_killed_run_loses_no_step_that_was_written(command, tmp_path):
    """A step is complete when its save ends, not when the next begins: killed right then, it is
    there.
    """
    path = tmp_path / "killed.py"
    path.write_text(
        "import os, signal, time\n"
        "from internvl3_jax.training.saver import AsyncSaver\n"
        "from tests.support.tiny_checkpoint import train_config as get_config\n"
        "poll = AsyncSaver.poll\n"
        "def poll_and_die(self, together):\n"
        "    while self.saving is not None and not self.saving.done():\n"
        "        time.sleep(0.01)\n"
        "    poll(self, together)\n"
        "    if self.step:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "AsyncSaver.poll = poll_and_die\n"
    )
    process = command(tmp_path / "run", config=path)
    _, err = process.communicate(timeout=500)
    assert process.returncode == -signal.SIGKILL, err
    assert os.listdir(tmp_path / "run" / "checkpoints") == [str(SAVE_EVERY)]
    assert latest_step(tmp_path / "run") == SAVE_EVERY


def test_sigterm_saves_and_asks_to_be_started_again(whole_run, command, tmp_path):
    process = command(tmp_path / "run")
    for line in process.stdout:
        if line.startswith(f"step {SAVE_EVERY + 1}/"):
            break
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=500)
    assert process.returncode == TERMINATED == 143, err
    (step,) = re.findall(r"stopped by SIGTERM; step (\d+) is saved", out)
    assert max(map(int, os.listdir(tmp_path / "run" / "checkpoints"))) == int(step)
    process = command(tmp_path / "run")
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0 and f"resuming from step {step} " in out, err
    assert log_of(tmp_path / "run") == log_of(whole_run[0])


@pytest.mark.parametrize("number, to_group", [
    pytest.param(signal.SIGINT, True, id="Ctrl-C", marks=pytest.mark.slow),
    pytest.param(signal.SIGTERM, True, id="SIGTERM to all processes", marks=pytest.mark.slow),
    pytest.param(signal.SIGTERM, False, id="SIGTERM"),
])  # fmt: skip
def test_a_signal_with_worker_processes_saves_and_leaves_none(command, tmp_path, number, to_group):
    """A terminal and some schedulers send it to the workers as well; no process stays."""
    flags = ("--config.data.workers=2", "--config.data.shards=2")
    process = command(tmp_path / "run", *flags, start_new_session=True)
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    assert len(processes_of(process.pid)) > 2, "workers run"
    (os.killpg if to_group else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err, err
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    (step,) = re.findall(rf"stopped by {name}; step (\d+) is saved", out)
    assert latest_step(tmp_path / "run") == int(step)
    deadline = time.monotonic() + 10
    while processes_of(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of(process.pid) == []


def processes_of(session: int) -> list[int]:
    """Processes of a session that are alive."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            state, *fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        if int(fields[2]) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def test_a_damaged_checkpoint_is_skipped(whole_run, command, tmp_path):
    """With a message that says which file; the run resumes from the one before, to the same end."""
    run = tmp_path / "run"
    for name in ("config.json", "log.jsonl"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes((whole_run[0] / name).read_bytes())
    subprocess.run(["cp", "-r", whole_run[0] / "checkpoints", run], check=True)
    newest = run / "checkpoints" / str(STEPS)
    victim = max(
        (newest / "params").rglob("*"),
        key=lambda path: path.stat().st_size if path.is_file() else 0,
    )
    victim.write_bytes(victim.read_bytes()[:-7])
    process = command(run)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0
    assert f"ignoring {newest}: {victim.relative_to(newest)} has " in err and "were written" in err
    assert f"resuming from step {STEPS - STEPS % SAVE_EVERY} " in out
    assert log_of(run) == log_of(whole_run[0])


@pytest.mark.slow
def test_killed_anywhere_it_sees_the_same_batches(command, tmp_path):
    """With workers, mixture, augmentation, packing and micro-batches on, killed by SIGKILL: first
    while a step is being saved, then between two saves. tools/kill.py kills at random moments.
    """
    meta = write_official(tmp_path)
    changes = {"steps": 10, "checkpoint__every": 2}
    changes |= {"eval__every": 0, "eval__answers": 0, "eval__source": ""}
    path = tmp_path / "official.py"
    lines = [
        "from tests.support.official_run import official_config",
        "from tests.support.tiny_checkpoint import changed",
        "def get_config():",
    ]
    path.write_text(
        "\n".join(
            [
                *lines,
                f"    return changed(official_config({meta!r}), **{changes!r})",
                "",
            ]
        )
    )
    process = command(tmp_path / "whole", "--config.data.workers=0", config=path)
    _, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    for last in (4, 7):
        process = command(tmp_path / "run", config=path)
        for line in process.stdout:
            if line.startswith(f"step {last}/"):
                break
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = command(tmp_path / "run", config=path)
    _, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")


def test_any_step_is_exported(whole_run, tmp_path):
    """A step of a run is a checkpoint: it converts to the released layouts and computes the same."""
    step = whole_run[0] / "checkpoints" / str(STEPS - STEPS % SAVE_EVERY)
    convert(open_model(step), tmp_path / "exported", to="internvl")
    ours, theirs = load(step).params, load(tmp_path / "exported").params
    # those that pad the vocabulary are trained along by weight decay, and cut off
    rows = CONFIG.language.vocab_size
    ours["language"]["embedding"], theirs["language"]["embedding"] = (
        params["language"]["embedding"][:rows] for params in (ours, theirs)
    )
    ours["language"]["head"], theirs["language"]["head"] = (
        params["language"]["head"]["kernel"][:, :rows] for params in (ours, theirs)
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
