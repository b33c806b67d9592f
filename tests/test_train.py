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
from internvl3_jax.train_step import TrainState, train_step

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


def first_state(model, optimizer) -> TrainState:
    params = tiny_checkpoint.random_params(model.config)
    return TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))


def alone_losses(params, batch):
    """(loss, weight) of every sample of a batch, each computed in a row of its own."""

    @jax.jit
    def one(params, row):
        return cross_entropy(InternVL(CONFIG).apply({"params": params}, row), row["targets"], row["loss_weights"])

    found = []
    for row in range(len(batch["tokens"])):
        tiles_done = 0
        for segment in range(1, batch["segments"][row].max() + 1):
            inside = batch["segments"][row] == segment
            alone = {name: np.zeros_like(values[:1]) for name, values in batch.items()}
            for name in alone.keys() - {"tiles"}:
                alone[name][0, : inside.sum()] = batch[name][row][inside]
            count = int((alone["tokens"] == CONFIG.image_token_id).sum()) // CONFIG.tokens_per_tile
            alone["tiles"][0, :count] = batch["tiles"][row, tiles_done : tiles_done + count]
            tiles_done += count
            found.append(one(params, alone))
    return np.asarray(found)


def test_a_batch_is_learnt_by_heart():
    """The first loss is the weighted mean over samples computed one by one; after 60 updates nearly nothing is left."""
    batch, model = first_batch(), InternVL(CONFIG)
    assert batch["segments"].max() > 1
    settings = OptimizerConfig(learning_rate=5e-3, warmup_steps=0)
    optimizer = make_optimizer(settings, 60)
    state = first_state(model, optimizer)
    total, weight = alone_losses(state.params, batch).sum(axis=0)
    step = jax.jit(functools.partial(train_step, model, optimizer), donate_argnums=0)
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
        assert 0 < metrics["grad_norm"] < np.inf
    np.testing.assert_allclose(losses[0], total / weight, rtol=1e-5)
    assert int(state.step) == 60
    assert losses[0] > 5.0 and losses[-1] < 1.0


def test_drop_path_is_seeded_by_the_step():
    """The same state, batch and key give the same loss; another step or key drops other branches."""
    config = dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, drop_path=0.5))
    model, batch = InternVL(config), first_batch()
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=0), STEPS)
    state = first_state(model, optimizer)
    loss = jax.jit(lambda state, seed: train_step(model, optimizer, state, batch, jax.random.key(seed))[1]["loss"])
    losses = [float(loss(state._replace(step=jnp.int32(step)), seed)) for step, seed in [(0, 0), (0, 0), (1, 0), (0, 1)]]
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
    # Thirty steps take less time than the compiler's optimisations.
    environment = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}

    def start(workdir, *flags):
        warnings = [
            "-W",
            "error",
            "-W",
            "ignore:the load_module():DeprecationWarning",
        ]  # of ml_collections, which reads the file so
        line = [sys.executable, *warnings, str(ROOT / "train.py"), f"--config={path}", f"--workdir={workdir}", *flags]
        return subprocess.Popen(
            line, cwd="/", env=os.environ | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=1
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
    stored = storage.ocp.metadata(path).metadata
    found = jax.tree_util.tree_leaves_with_path(storage.load_tree(path, stored))
    return {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in found}


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


@pytest.mark.parametrize("wrong", ["loss", "grad_norm"])
def test_what_is_not_finite_stops_the_run(tmp_path, monkeypatch, wrong):
    """Before such parameters are saved, and the checkpoint before is complete."""

    def update(model, optimizer, state, batch, key):
        metrics = {name: jnp.where((state.step == 2) & (name == wrong), jnp.nan, 1.0) for name in ("loss", "grad_norm")}
        return state._replace(step=state.step + 1), metrics

    monkeypatch.setattr(train, "train_step", update)
    config = dataclasses.replace(train_config(), save_every=1, log_every=20)
    tokenizer = make_tokenizer(config.data)
    batches = iter(make_batches(config.data, config.processor, tokenizer))
    state = first_state(InternVL(CONFIG), make_optimizer(OptimizerConfig(warmup_steps=0), config.steps))
    with pytest.raises(FloatingPointError, match=rf"{wrong} nan.* at step 3; the last checkpoint is kept"):
        train.train(config, tmp_path, None, None, state, batches, tokenizer, 0.0)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]
    assert load(tmp_path).directory.name == "2"


def test_the_shipped_configuration():
    """configs/tiny_digits.py: the size it names, and rows that its samples fit."""
    from configs.tiny_digits import get_config

    config = get_config()
    assert config.model == SIZES["tiny"]
    assert config.processor.tokens_per_tile == config.model.tokens_per_tile
    assert config.processor.image_size == config.model.vision.image_size
    make_optimizer(config.optimizer, config.steps)
