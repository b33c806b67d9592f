"""Schedules, AdamW against PyTorch's, and learning rates by layer and component."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from internvl3_jax.config import OptimizerConfig
from internvl3_jax.training.optimizer import make_optimizer, make_schedule, relative_rates
from tests.support.tiny_checkpoint import CONFIG, random_params
from tests.support.train_step import by_path

PARAMS = random_params(CONFIG)
# no schedule to reckon with
CONSTANT = OptimizerConfig(warmup_steps=0, final_lr_fraction=1.0, learning_rate=1e-2)


def random_gradients(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), tree)


def run(config, params=PARAMS, steps=3, scale=1.0):
    """(trained parameters, state) after some updates with random gradients."""
    optimizer = make_optimizer(config, 100)
    trained, _ = optimizer.split(params)
    state, update = jax.jit(optimizer.init)(params), jax.jit(optimizer.update)
    for step in range(steps):
        gradients = jax.tree.map(lambda x: x * np.float32(scale), random_gradients(trained, step))
        updates, state = update(gradients, state, trained)
        trained = optax.apply_updates(trained, updates)
    return trained, state


# --- schedules -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"schedule": "cosine", "final_lr_fraction": 0.1},
            {0: 0, 5: 0.5, 10: 1, 60: 0.55, 110: 0.1},
        ),
        (
            {"schedule": "wsd", "final_lr_fraction": 0.1},
            {0: 0, 5: 0.5, 10: 1, 88: 1, 99: 0.55, 110: 0.1},
        ),
        ({"schedule": "wsd", "warmup_steps": 0}, {0: 1, 88: 1, 99: 0.5, 110: 0}),
        ({"schedule": "wsd", "decay_fraction": 0.0}, {0: 0, 10: 1, 109: 1}),
    ],
    ids=str,
)
def test_schedules(settings, expected):
    config = OptimizerConfig(**{"warmup_steps": 10} | settings)
    schedule = make_schedule(config, 110, 2.0)
    np.testing.assert_allclose(
        [schedule(step) for step in expected], [2.0 * rate for rate in expected.values()], atol=1e-6
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"warmup_steps": 30},
            r"optimizer.warmup_steps is 30; it must be between 0 and steps \(30\): set it, or opt",
        ),
        ({"name": "adam"}, "optimizer.name is 'adam'; it must be adafactor, adamw or muon"),
        ({"schedule": "linear"}, "optimizer.schedule is 'linear'; it must be cosine or wsd"),
        (
            {"schedule": "wsd", "warmup_steps": 25},
            "optimizer.decay_fraction is 0.2: 6 of 30 steps, but 25 of them are",
        ),
        (
            {"moment_dtype": "int8"},
            "optimizer.moment_dtype is 'int8'; it must be float32 or bfloat16",
        ),
    ],
    ids=str,
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(OptimizerConfig(**{"warmup_steps": 0} | settings), 30)


# --- directions ----------------------------------------------------------------------------------


@pytest.mark.optimized
@pytest.mark.parametrize(
    "spare", [False, True], ids=["decay on all", "no decay on norms and biases"]
)
def test_adamw_is_pytorchs(spare):
    """A sequence of updates with gradients that are clipped and with some that are not."""
    config = dataclasses.replace(CONSTANT, decay_norms_and_biases=not spare)
    theirs = {
        path: torch.nn.Parameter(torch.from_numpy(leaf.copy()))
        for path, leaf in by_path(PARAMS).items()
    }
    no_decay = ("bias", "scale", "layer_scale1", "layer_scale2") if spare else ()
    decayed = [leaf for path, leaf in theirs.items() if path.split("/")[-1] not in no_decay]
    rest = [leaf for path, leaf in theirs.items() if path.split("/")[-1] in no_decay]
    assert bool(rest) is spare
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    optimizer = make_optimizer(config, 100)
    ours, state, update = PARAMS, optimizer.init(PARAMS), jax.jit(optimizer.update)
    for step in range(6):
        gradients = jax.tree.map(
            lambda x, step=step: x * np.float32(10.0 ** (step % 3 - 4)),
            random_gradients(PARAMS, step),
        )
        updates, state = update(gradients, state, ours)
        ours = optax.apply_updates(ours, updates)
        for path, leaf in by_path(gradients).items():
            theirs[path].grad = torch.from_numpy(leaf.copy())
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        reference.step()
    for path, leaf in by_path(ours).items():
        np.testing.assert_allclose(
            leaf, theirs[path].detach().numpy(), rtol=1e-6, atol=1e-6, err_msg=path
        )


def test_muon_is_optaxs():
    """On one half of the leaves, and AdamW on the other, as optax puts the two together."""
    from optax.contrib import MuonDimensionNumbers, muon

    config = dataclasses.replace(CONSTANT, name="muon", weight_decay=0.1)
    numbers = jax.tree.map(
        lambda leaf: MuonDimensionNumbers(1, 2) if leaf.ndim == 3 else None, PARAMS
    )
    theirs = muon(
        0.02,
        weight_decay=0.1,
        adam_learning_rate=1e-2,
        adam_weight_decay=0.1,
        muon_weight_dimension_numbers=lambda _: numbers,
    )
    theirs = optax.chain(optax.clip_by_global_norm(1.0), theirs)
    params, state = PARAMS, theirs.init(PARAMS)
    for step in range(2):
        updates, state = jax.jit(theirs.update)(random_gradients(PARAMS, step), state, params)
        params = optax.apply_updates(params, updates)
    ours, _ = run(config, steps=2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), ours, params)


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_a_bfloat16_moment(name):
    """Only the first moment: half as large, nearly the same updates. The state is the same for
    parameters in bfloat16.
    """
    config = dataclasses.replace(CONSTANT, name=name)
    (exact, wide), (rounded, narrow) = (
        run(dataclasses.replace(config, moment_dtype=kind)) for kind in ("float32", "bfloat16")
    )
    moved = max(
        np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (exact, PARAMS)), strict=True)
    )
    assert moved > 1e-2, "30 times the tolerance below"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=3e-4), rounded, exact)
    count = {
        str(kind): sum(leaf.size for leaf in jax.tree.leaves(narrow) if leaf.dtype == kind)
        for kind in ("bfloat16", "float32")
    }
    total = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
    assert count["bfloat16"] == total and not any(
        leaf.dtype == "bfloat16" for leaf in jax.tree.leaves(wide)
    )
    if name == "adamw":
        assert count["float32"] == total
    shapes = jax.eval_shape(
        make_optimizer(config, 100).init, jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype), wide
    )


def test_adafactor_learns_and_is_small():
    """A linear problem; the second moment of a matrix is two vectors, for each layer its own."""
    config = OptimizerConfig(
        name="adafactor", warmup_steps=0, learning_rate=0.05, weight_decay=0.0, beta1=0.0
    )
    rng = np.random.default_rng(0)
    wanted, x = (
        rng.normal(size=(2, 128, 160)).astype(np.float32),
        rng.normal(size=(2, 256, 128)).astype(np.float32),
    )
    params, optimizer = (
        {"projector": {"kernel": np.zeros_like(wanted)}},
        make_optimizer(config, 200),
    )
    state = optimizer.init(params)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 2 * (128 + 160) + 10

    @jax.jit
    def step(params, state):
        loss, gradients = jax.value_and_grad(
            lambda p: jnp.square(x @ (p["projector"]["kernel"] - wanted)).mean()
        )(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(150):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.02 * losses[0]


# --- learning rates ------------------------------------------------------------------------------


def test_rates_of_components_and_layers():
    """As factors, and in what an update moves: AdamW's first step is one learning rate, whatever
    the gradient.
    """
    settings = {
        "vision_lr_scale": 0.1,
        "projector_lr_scale": 2.0,
        "language_lr_scale": 0.5,
        "vision_layer_decay": 0.8,
    }
    config = dataclasses.replace(CONSTANT, weight_decay=0.0, clip_norm=1e9, **settings)
    rates = by_path(relative_rates(PARAMS, config))
    np.testing.assert_allclose(rates["vision/layers/fc1/kernel"].ravel(), [0.08, 0.1], rtol=1e-6)
    np.testing.assert_allclose(rates["vision/position_embedding"], 0.064, rtol=1e-6)
    assert rates["projector/fc1/kernel"] == 2.0 and rates["language/layers/q/kernel"] == 0.5
    trained, _ = run(config, steps=1)
    for path, moved in by_path(jax.tree.map(lambda a, b: np.abs(a - b), trained, PARAMS)).items():
        expected = np.broadcast_to(1e-2 * rates[path], moved.shape)
        np.testing.assert_allclose(moved, expected, rtol=1e-2, atol=1e-6, err_msg=path)
