"""train.py as a program: what a run leaves behind; killed, stopped, damaged, it goes on bit for
bit; what it refuses.
"""

import dataclasses
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
from internvl3_jax.checkpoints import steps, storage
from internvl3_jax.config import EvalConfig, MeshConfig, to_dict
from internvl3_jax.data.loader import BatchLoader
from internvl3_jax.io.checkpoint_paths import latest_step
from internvl3_jax.parallel import sharding
from internvl3_jax.parallel.multihost import TERMINATED
from internvl3_jax.sizes import SIZES
from internvl3_jax.training.optimizer import make_optimizer
from tests.support import tiny_checkpoint
from tests.support.official_run import official_config, write_official
from tests.support.tiny_checkpoint import CONFIG, PROCESSOR, changed, train_config

ROOT = pathlib.Path(train.__file__).parent
ONE_DEVICE = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
STEPS, SAVE_EVERY = train_config().steps, train_config().checkpoint.every


# --- the program ---------------------------------------------------------------------------------


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


def log_of(workdir):
    rows = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"], row["batch"]) for row in rows]


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


def test_a_killed_run_goes_on_bit_for_bit(whole_run, command, tmp_path):
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


def test_a_save_that_fails_is_reported_at_once(tmp_path, monkeypatch):
    """In one line with the step and the reason, before the next save is due; the steps before it
    stay.
    """
    config = official_config(write_official(tmp_path))
    config = changed(config, steps=8, checkpoint__every=4, eval=EvalConfig())
    start, seen, started = steps.start_saving_training, [], []

    def fails(run, step, *arguments, **options):
        saving = start(run, step, *arguments, **options)
        seen.append(step)
        started.append(saving)

        def done():
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(saving, "done", done)
        return saving

    monkeypatch.setattr(steps, "start_saving_training", fails)
    with pytest.raises(
        OSError, match=r"step 4 cannot be saved \(No space left on device\); the complete steps"
    ) as raised:
        start_here(config, tmp_path / "run")
    assert seen == [4] and raised.value.filename.endswith("run/checkpoints/4")
    assert [step for step, *_ in log_of(tmp_path / "run")] == [1, 2, 3, 4]
    started[0]()  # which did not fail in truth, and holds a file open


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda config: dataclasses.replace(config.processor, stop_tokens=("<none>",)),
            "has no token <none>",
        ),
        (lambda config: dataclasses.replace(config.data, tokenizer="nosuchplace"), "nosuchplace"),
        (lambda config: dataclasses.replace(config.data, source="nosuch.json"), "nosuch.json"),
    ],
)
def test_what_a_save_would_refuse_is_refused_at_the_start(tmp_path, change, message):
    """Nothing of it stays that could refuse the corrected command."""
    config = train_config()
    part = change(config)
    name = "processor" if part.__class__ is type(PROCESSOR) else "data"
    with pytest.raises(ValueError, match=message):
        train.fit(dataclasses.replace(config, **{name: part}), tmp_path / "run", ONE_DEVICE)
    assert not (tmp_path / "run").exists()


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
    (signal.SIGINT, True), (signal.SIGTERM, True), (signal.SIGTERM, False),
], ids=["Ctrl-C", "SIGTERM to all processes", "SIGTERM"])  # fmt: skip
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


@pytest.mark.parametrize("step", [SAVE_EVERY + 2, SAVE_EVERY + 1], ids=["unsaved", "saved"])
def test_a_signal_that_ends_the_workers_first_saves_the_step_before(tmp_path, capsys, step):
    """As where a scheduler signals all processes, and the next batch is not there yet."""
    following, count = BatchLoader.__next__, iter(range(1, STEPS))

    def die(loader):
        if next(count) < step:
            return following(loader)
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("a worker process was terminated")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchLoader, "__next__", die)
        with pytest.raises(SystemExit) as ended:
            start_here(train_config(), tmp_path / "run")
    assert ended.value.code == TERMINATED
    assert f"stopped by SIGTERM; step {step - 1} is saved" in capsys.readouterr().out
    assert latest_step(tmp_path / "run") == step - 1


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


def test_a_damaged_checkpoint_is_passed_over(whole_run, command, tmp_path):
    """With a message that says which file; the run goes on from the one before, to the same end."""
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


def start_here(config, workdir):
    """main() in this process."""
    train.save_config(config, workdir)
    train.fit(config, workdir, ONE_DEVICE)


def test_official_data_from_a_released_checkpoint(tmp_path, capsys):
    """Worker processes, augmentation, micro-batches, remat, a frozen tower, losses by source,
    eval loss and answers.
    """
    config = official_config(write_official(tmp_path), freeze=("vision/.*",))
    config = dataclasses.replace(config, init_from=str(tiny_checkpoint.directory()))
    start_here(config, tmp_path / "run")
    out = capsys.readouterr().out
    assert "none is initialized" in out and re.search(r"vision +[\d,]+ +0 +- ", out)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == [1, 2, 3, 4, 5, 6]
    assert {"loss/text", "loss/seen"} <= set().union(
        *trained
    ) and "grad_norm_vision" not in trained[0]
    for name in (
        "tokens_per_second",
        "tiles_per_second",
        "token_fill",
        "input_wait",
        "step_seconds",
        "learning_rate",
    ):
        assert all(row[name] >= 0 for row in trained)
    assert [row["step"] for row in rows if "eval_loss" in row] == [
        3,
        6,
    ] and "eval_loss/text" in rows[-1]
    answers = [
        json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()
    ]
    assert [(row["step"], row["source"]) for row in answers] == [
        (3, "text"),
        (3, "seen"),
        (6, "text"),
        (6, "seen"),
    ]
    ours, theirs = load(tmp_path / "run").params, load(tiny_checkpoint.directory()).params
    jax.tree.map(np.testing.assert_array_equal, ours["vision"], theirs["vision"])


def test_killed_anywhere_it_sees_the_same_batches(command, tmp_path):
    """With workers, mixture, augmentation, packing and micro-batches on, killed by SIGKILL: first
    while a step is being saved, then between two saves. tools/kill.py kills at random moments.
    """
    meta = write_official(tmp_path)
    changes = {"steps": 10, "checkpoint__every": 2, "eval__every": 0, "eval__source": ""}
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


def test_what_is_not_finite_stops_the_run(tmp_path):
    """Naming step and samples; the checkpoint before is complete and opens."""
    config = official_config(write_official(tmp_path))
    make = train.compile_step

    def make_broken(*arguments):
        step, count = make(*arguments), iter(range(100))

        def broken(*inputs):
            state, metrics = step(*inputs)
            return state, metrics | {"finite": metrics["finite"] & (next(count) != 1)}

        return broken

    train_dir = tmp_path / "broken"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "compile_step", make_broken)
        with pytest.raises(
            FloatingPointError,
            match=r"loss .* at step 2; the last checkpoint is kept. Samples: .*(seen|text) row \d",
        ):
            start_here(changed(config, checkpoint__every=1), train_dir)
    assert os.listdir(train_dir / "checkpoints") == ["1"]
    assert load(train_dir).directory.name == "1"


def test_a_frozen_leaf_that_changed_is_not_saved(tmp_path):
    config = official_config(write_official(tmp_path), freeze=("vision/.*",))
    make = train.compile_step

    def make_leaky(*arguments):
        step = make(*arguments)

        def leaky(*inputs):
            state, metrics = step(*inputs)
            bias = state.params["vision"]["patch_embedding"]["bias"]
            state.params["vision"]["patch_embedding"]["bias"] = bias.at[0].add(1e-7)
            return state, metrics

        return leaky

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "compile_step", make_leaky)
        with pytest.raises(
            ValueError, match="step 3: parameters that optimizer.freeze names have changed"
        ):
            start_here(config, tmp_path / "run")


def test_another_model_is_not_started_from(tmp_path):
    config = official_config(write_official(tmp_path))
    vision = dataclasses.replace(CONFIG.vision, num_layers=3)
    config = dataclasses.replace(
        config,
        init_from=str(tiny_checkpoint.directory()),
        model=dataclasses.replace(CONFIG, vision=vision),
    )
    with pytest.raises(
        ValueError, match="model.vision.num_layers is 2 in the checkpoint, 3 in the config"
    ):
        start_here(config, tmp_path / "run")


def test_the_shipped_configuration():
    """configs/tiny_digits.py: the size it names, and rows that its samples fit."""
    from configs.tiny_digits import get_config

    config = get_config()
    assert config.model == SIZES["tiny"]
    assert config.processor.tokens_per_tile == config.model.tokens_per_tile
    assert config.processor.image_size == config.model.vision.image_size
    make_optimizer(config.optimizer, config.steps)
