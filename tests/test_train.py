"""Training: the loss and its weights, one update, and train.py as a program that is killed, resumed and refused."""

import dataclasses
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoint
from tiny_checkpoint import CONFIG, PROCESSOR, train_config

import train
from internvl3_jax import load, storage
from internvl3_jax.config import SIZES, UNITS, OptimizerConfig, to_dict
from internvl3_jax.data.batch import make_sample
from internvl3_jax.data.digits import TASKS
from internvl3_jax.data.pipeline import make_batches, make_tokenizer
from internvl3_jax.data.tokenizer import Tokenizer
from internvl3_jax.losses import cross_entropy
from internvl3_jax.model import InternVL
from internvl3_jax.optimizer import make_optimizer, make_schedule
from internvl3_jax.train_step import init_state, train_step

ROOT = pathlib.Path(train.__file__).parent
STEPS, SAVE_EVERY = train_config().steps, train_config().save_every


# --- loss ------------------------------------------------------------------------------------------------------------------------


def test_cross_entropy():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 5, 7)) * 3
    logits[:, :, 6] = -1e30  # padding of the vocabulary
    targets = rng.integers(0, 6, (2, 5))
    weights = rng.random((2, 5)) * rng.integers(0, 2, (2, 5))
    assert (weights == 0).any()
    targets[0, 0], weights[0, 0] = 6, 0.0  # what is not trained adds nothing, however wrong
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=-1, keepdims=True)
    expected = 0.0
    for row, place in np.argwhere(weights > 0):
        expected -= weights[row, place] * np.log(probabilities[row, place, targets[row, place]])
    values = (logits.astype(np.float32), targets.astype(np.int32), weights.astype(np.float32))
    loss, weight = jax.jit(cross_entropy)(*values)
    assert (loss.dtype, weight.dtype) == (jnp.float32, jnp.float32)
    np.testing.assert_allclose([loss, weight], [expected, weights.sum()], rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda logits: cross_entropy(logits, *values[1:])[0]))(values[0])
    one_hot = np.eye(7)[targets]
    np.testing.assert_allclose(gradient, (probabilities - one_hot) * weights[..., None], rtol=1e-4, atol=1e-6)


def test_square_averaging():
    """Each of the x trained tokens of a sample weighs 1 / sqrt(x); trained are the answers and their ends, not the questions."""
    tokenizer = Tokenizer.from_files(tiny_checkpoint.tokenizer_files())
    messages = [
        {"role": "user", "content": "<image>\nRead the number."},
        {"role": "assistant", "content": "1234"},
        {"role": "user", "content": "How many digits are there?"},
        {"role": "assistant", "content": "4"},
    ]
    sample = make_sample(messages, [tiny_checkpoint.picture(16, 16)], tokenizer, PROCESSOR, [UNITS])
    trained = sample["loss_weights"] > 0
    answers = [[*tokenizer.encode(text), tokenizer.token_id("<|im_end|>")] for text in ("1234", "4")]
    assert sample["targets"][trained].tolist() == answers[0] + answers[1]
    np.testing.assert_allclose(sample["loss_weights"][trained], trained.sum() ** -0.5, rtol=1e-6)
    np.testing.assert_array_equal(sample["targets"][:-1], sample["tokens"][1:])
    assert sample["loss_weights"][-1] == 0


# --- one update ------------------------------------------------------------------------------------------------------------------


@functools.cache
def first_batch():
    config = train_config()
    return next(iter(make_batches(config.data, config.processor, make_tokenizer(config.data))))


def test_the_loss_of_a_packed_batch_is_that_of_its_samples():
    """Sum of weighted losses over sum of weights, computed sample by sample from separate rows."""
    batch = first_batch()
    assert batch["segments"].max() > 1
    model = InternVL(CONFIG)
    params = tiny_checkpoint.random_params(CONFIG)
    optimizer = make_optimizer(train_config().optimizer, STEPS)

    @jax.jit
    def first_loss(params):
        state = init_state(model, optimizer, batch, 0)._replace(params=params)
        return train_step(model, optimizer, state, batch, jax.random.key(0))[1]

    @jax.jit
    def losses(params, row):
        logits = model.apply({"params": params}, row)
        return cross_entropy(logits, row["targets"], row["loss_weights"])

    per_tile, size = CONFIG.tokens_per_tile, CONFIG.vision.image_size
    total, weight = 0.0, 0.0
    for row in range(len(batch["tokens"])):
        done = 0
        for segment in range(1, batch["segments"][row].max() + 1):
            inside = batch["segments"][row] == segment
            alone = {name: np.zeros((1, 256), batch[name].dtype) for name in batch if name != "tiles"}
            for name, values in alone.items():
                values[0, : inside.sum()] = batch[name][row][inside]
            count = int((alone["tokens"] == CONFIG.image_token_id).sum()) // per_tile
            tiles = np.zeros((1, 12, size, size, 3), np.uint8)
            tiles[0, :count] = batch["tiles"][row, done : done + count]
            done += count
            one = losses(params, alone | {"tiles": tiles})
            total, weight = total + float(one[0]), weight + float(one[1])
    metrics = first_loss(params)
    np.testing.assert_allclose(metrics["loss"], total / weight, rtol=1e-5)
    assert np.isfinite(metrics["grad_norm"]) and metrics["grad_norm"] > 0


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_batch_is_learnt_by_heart(name):
    batch, model = first_batch(), InternVL(CONFIG, scan_unroll=2)
    settings = OptimizerConfig(name=name, learning_rate=5e-3, muon_learning_rate=0.02, warmup_steps=0, weight_decay=0.0)
    optimizer = make_optimizer(settings, 60)
    state = jax.jit(lambda: init_state(model, optimizer, batch, 0))()
    step = jax.jit(functools.partial(train_step, model, optimizer), donate_argnums=0)
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    assert int(state.step) == 60
    assert losses[0] > 5.5  # near log(460) = 6.1
    assert losses[-1] < 1.0


def test_drop_path_is_seeded_by_the_step():
    """The same state, batch and key give the same loss; another step or key drops other branches."""
    config = dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, drop_path=0.5))
    model, batch = InternVL(config), first_batch()
    optimizer = make_optimizer(train_config().optimizer, STEPS)
    state = jax.jit(lambda: init_state(model, optimizer, batch, 0))()
    state = state._replace(params=tiny_checkpoint.random_params(config))
    loss = jax.jit(
        lambda step, seed: train_step(model, optimizer, state._replace(step=step), batch, jax.random.key(seed))[1]["loss"]
    )
    losses = [float(loss(step, seed)) for step, seed in [(0, 0), (0, 0), (1, 0), (0, 1)]]
    assert losses[0] == losses[1] and len(set(losses)) == 3


def test_the_schedule_rises_and_falls():
    settings = OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_fraction=0.1)
    schedule = make_schedule(settings, 110, settings.learning_rate)
    rates = [float(schedule(step)) for step in (0, 5, 10, 60, 110)]
    np.testing.assert_allclose(rates, [0.0, 0.5, 1.0, 0.55, 0.1], atol=1e-6)


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match=r"optimizer.warmup_steps is 30; it must lie between 0 and steps \(30\)"):
        make_optimizer(OptimizerConfig(warmup_steps=STEPS), STEPS)
    with pytest.raises(ValueError, match="optimizer.name is 'adam'; it must be adamw or muon"):
        make_optimizer(OptimizerConfig(name="adam", warmup_steps=0), STEPS)
    config = train_config()
    with pytest.raises(ValueError, match="data.source 'letters' is not known; there is: digits"):
        make_batches(dataclasses.replace(config.data, source="letters"), config.processor, None)
    tight = dataclasses.replace(config.data, tokens_per_row=40)
    with pytest.raises(ValueError, match=r"digits: a .* conversation has .* tokens, a row holds 40: raise data.tokens_per_row"):
        next(iter(make_batches(tight, config.processor, make_tokenizer(config.data))))


# --- the program -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """train.py as a program with the configuration above; call with a workdir and more flags."""
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text("from tiny_checkpoint import train_config as get_config\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}

    def start(workdir, *flags):
        warnings = [
            "-W",
            "error",
            "-W",
            "ignore:the load_module():DeprecationWarning",
        ]  # of ml_collections, which reads the file so
        line = [sys.executable, *warnings, str(ROOT / "train.py"), f"--config={path}", f"--workdir={workdir}", *flags]
        return subprocess.Popen(
            line, cwd="/", env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=1
        )

    return start


@pytest.fixture(scope="module")
def whole_run(command, tmp_path_factory):
    """(workdir, stdout) of a run from beginning to end, with an evaluation."""
    workdir = tmp_path_factory.mktemp("whole")
    process = command(workdir, "--config.evaluate_per_task=1")
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0 and err == "", err
    return workdir, out


def log_of(workdir):
    rows = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def test_a_run_leaves_what_it_should(whole_run):
    workdir, out = whole_run
    losses = [loss for _, loss, _ in log_of(workdir)]
    assert [step for step, *_ in log_of(workdir)] == list(range(1, STEPS + 1))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert sorted(os.listdir(workdir / "checkpoints")) == [str(STEPS - STEPS % SAVE_EVERY), str(STEPS)]
    assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG")
    resolved = to_dict(dataclasses.replace(train_config(), evaluate_per_task=1))
    assert json.loads((workdir / "config.json").read_text()) == json.loads(json.dumps(resolved))
    assert f"step {STEPS}/{STEPS} loss {losses[-1]:.4f}" in out and '"evaluate_per_task": 1' in out
    report = json.loads((workdir / "report.json").read_text())
    assert set(report["held_out"]) == {*TASKS, "digit"} and report["steps"] == STEPS
    assert all(f"  {task}" in out for task in TASKS)
    checkpoint = load(workdir)
    assert (checkpoint.config, checkpoint.processor) == (CONFIG, PROCESSOR)
    assert checkpoint.directory == workdir / "checkpoints" / str(STEPS)


def test_a_killed_run_goes_on_bit_for_bit(whole_run, command, tmp_path):
    """Killed after some checkpoints, started again: the losses of all steps and the final state are those of the whole run."""
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
    (line,) = [line for line in out.splitlines() if line.startswith("going on from step ")]
    step = int(line.split()[4])
    assert 0 < step <= len(seen) and step % SAVE_EVERY == 0
    assert f"step {step + 1}/" in out and f"step {step}/" not in out
    assert log_of(tmp_path / "run") == log_of(whole_run[0])
    for part in ("params", "opt_state"):
        ours, theirs = (leaves(workdir / "checkpoints" / str(STEPS) / part) for workdir in (tmp_path / "run", whole_run[0]))
        assert set(ours) == set(theirs) and len(ours) > 10
        for path, leaf in ours.items():
            np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)


def leaves(path):
    """Every array of a stored tree by its path."""
    import orbax.checkpoint.v1 as ocp

    return {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in jax.tree_util.tree_leaves_with_path(ocp.load(path))}


def test_a_finished_run_stays_as_it_is(whole_run, command):
    """Another configuration in the same workdir is refused and changes nothing."""
    workdir, _ = whole_run
    before = (workdir / "log.jsonl").read_text(), (workdir / "config.json").read_text()
    process = command(workdir, "--config.optimizer.learning_rate=1e-4")
    out, err = process.communicate(timeout=500)
    assert process.returncode == 1 and out == ""
    assert err == (
        f"error: {workdir} is a run with another configuration ({workdir}/config.json); name another --workdir, or delete it\n"
    )
    assert ((workdir / "log.jsonl").read_text(), (workdir / "config.json").read_text()) == before


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    """With the step in the message, and before such parameters are saved."""
    config = train_config()
    config = dataclasses.replace(config, steps=4, save_every=1, log_every=3, optimizer=OptimizerConfig(1e30, warmup_steps=0))
    tokenizer = make_tokenizer(config.data)
    batches = iter(make_batches(config.data, config.processor, tokenizer))
    model, optimizer = InternVL(config.model), make_optimizer(config.optimizer, config.steps)
    state, seconds = train.restore_or_init(config, tmp_path, model, optimizer, batches)
    with pytest.raises(FloatingPointError, match="at step 2"):
        train.train(config, tmp_path, model, optimizer, state, batches, tokenizer, seconds)
    saved = sorted(os.listdir(tmp_path / "checkpoints"))
    assert saved == ["1"] and np.isfinite(storage.load_tree(tmp_path / "checkpoints" / "1" / "params", state.params))


def test_the_shipped_configuration():
    """configs/tiny_digits.py: the size it names, and rows that its samples fit."""
    from configs.tiny_digits import get_config

    config = get_config()
    assert config.model == SIZES["tiny"]
    assert config.processor.tokens_per_tile == config.model.tokens_per_tile
    assert config.processor.image_size == config.model.vision.image_size
    make_optimizer(config.optimizer, config.steps)
