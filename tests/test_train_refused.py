"""train.py in this process: saves that fail, official data, and what a run refuses to start from or
to resume.
"""

import dataclasses
import json
import os
import re
import signal

import jax
import numpy as np
import pytest

import train
from internvl3_jax import load
from internvl3_jax.checkpoints import steps
from internvl3_jax.config import EvalConfig, MeshConfig
from internvl3_jax.data.loader import BatchLoader
from internvl3_jax.io.checkpoint_paths import latest_step
from internvl3_jax.parallel import sharding
from internvl3_jax.parallel.multihost import TERMINATED
from internvl3_jax.sizes import SIZES
from internvl3_jax.training.optimizer import make_optimizer
from tests.support import tiny_checkpoint
from tests.support.official_run import official_config, write_official
from tests.support.tiny_checkpoint import CONFIG, PROCESSOR, changed, train_config
from tests.support.train_log import SAVE_EVERY, STEPS, log_of

ONE_DEVICE = sharding.make_mesh(MeshConfig(), jax.devices()[:1])


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
