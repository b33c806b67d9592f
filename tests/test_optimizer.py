"""Schedules, AdamW against PyTorch's, learning rates by layer and component, what is frozen, and
the table and hash that show it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from internvl3_jax.config import OptimizerConfig
from internvl3_jax.model.internvl import abstract_params
from internvl3_jax.sizes import SIZES
from internvl3_jax.training.optimizer import (
    join,
    make_optimizer,
    make_schedule,
    relative_rates,
)
from internvl3_jax.training.param_table import component_table, format_table, frozen_hash
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
            r"optimizer.warmup_steps is 30; it must lie between 0 and steps \(30\)",
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


# --- what is frozen ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
@pytest.mark.parametrize(
    "freeze", [("vision/.*",), ("language/layers/.*", "language/head/.*"), (".*/bias",)], ids=str
)
def test_frozen_leaves_have_no_state(name, freeze):
    config = dataclasses.replace(CONSTANT, name=name, freeze=freeze)
    optimizer = make_optimizer(config, 100)
    trained, frozen = optimizer.split(PARAMS)
    assert set(by_path(trained)) | set(by_path(frozen)) == set(by_path(PARAMS)) and by_path(frozen)
    assert jax.tree.structure(join(trained, frozen)) == jax.tree.structure(PARAMS)
    state = jax.eval_shape(optimizer.init, PARAMS)
    named = {
        "/".join(key.key for key in path if hasattr(key, "key"))
        for path, _ in jax.tree.leaves_with_path(state)
    }
    assert not any(path.endswith(end) for path in named for end in by_path(frozen))
    assert all(any(path.endswith(end) for path in named) for end in by_path(trained))
    assert all(hasattr(leaf, "shape") for leaf in jax.tree.leaves(state))


def test_a_pattern_that_matches_nothing_is_named():
    def split(*freeze):
        return make_optimizer(dataclasses.replace(CONSTANT, freeze=freeze), 100).init(PARAMS)

    with pytest.raises(
        ValueError,
        match=r"'vison/layers/fc1/.*' matches no full path of a parameter; similar paths: vision/layers/fc1/",
    ):
        split("projector/.*", "vison/layers/fc1/.*")
    with pytest.raises(ValueError, match=r"'language/head' matches no .*language/head/kernel"):
        split("language/head")
    with pytest.raises(ValueError, match="is not a regular expression"):
        split("vision/(")
    with pytest.raises(ValueError, match="leaves nothing to train"):
        split(".*")


def test_the_table_of_components():
    config = OptimizerConfig(freeze=("vision/.*",), projector_lr_scale=5.0, moment_dtype="bfloat16")
    params = abstract_params(SIZES["1b"])
    rows = {row.name: row for row in component_table(params, config)}
    assert list(rows) == ["vision", "projector", "embedding", "language layers", "head", "all"]
    assert (rows["vision"].parameters, rows["vision"].trained, rows["vision"].state_bytes) == (
        304_012_288,
        0,
        0,
    )
    head = rows["head"]
    assert (head.parameters, head.param_bytes, head.state_bytes) == (
        896 * 151_808,
        4 * 896 * 151_808,
        6 * 896 * 151_808,
    )
    np.testing.assert_allclose(rows["projector"].rates, 2e-4)
    assert rows["all"].parameters == sum(row.parameters for row in rows.values()) // 2
    lines = {
        line.split()[0]: line.split()[1:] for line in format_table(list(rows.values())).splitlines()
    }
    assert lines["vision"] == ["304,012,288", "0", "-", "float32", "1,159.7", "0.0"]
    assert lines["head"] == ["136,019,968", "136,019,968", "4e-05", "float32", "518.9", "778.3"]


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_the_state_of_all_components_is_that_of_the_optimizer(name):
    config = dataclasses.replace(CONSTANT, name=name, freeze=(".*/bias",))
    *rows, total = component_table(PARAMS, config)
    state = jax.eval_shape(make_optimizer(config, 100).init, PARAMS)
    assert total.state_bytes == sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
    )
    counters = total.state_bytes - sum(row.state_bytes for row in rows)
    assert 0 < counters < 100, "step counters belong to no component"
    least = 1 if name == "adafactor" else 4  # bytes for each trained parameter
    assert all(row.state_bytes > least * row.trained > 0 for row in rows), rows


def test_a_quantized_kernel_counts_as_before():
    params = {
        "vision": {"kernel": {"nf4": np.zeros((2, 4, 6), np.uint8), "scales": np.ones((2, 1, 6))}},
        "projector": {"kernel": np.ones((3, 2), np.float32)},
    }
    rows = component_table(params, OptimizerConfig(freeze=("vision/.*",)))
    assert [row.parameters for row in rows] == [2 * 8 * 6, 6, 102]


def test_the_hash_sees_every_bit():
    """Any bit of any frozen leaf, two elements exchanged, and none of what is trained."""
    params = {
        "vision": {
            "a": np.arange(6, dtype=np.float32).reshape(2, 3),
            "b": jnp.ones(5, jnp.bfloat16),
        },
        "projector": {"c": np.ones(2)},
    }
    freeze = ("vision/.*",)
    seen = {frozen_hash(params, freeze)}
    for name, word in (("a", np.uint32), ("b", np.uint16)):
        for place in (0, 4):
            for bit in range(8 * word().itemsize):
                leaf = np.array(params["vision"][name])
                leaf.reshape(-1).view(word)[place] ^= word(1) << word(bit)
                seen.add(frozen_hash(params | {"vision": params["vision"] | {name: leaf}}, freeze))
    assert len(seen) == 1 + 2 * (32 + 16)
    for other in (params["vision"]["a"][::-1].copy(), -params["vision"]["a"]):
        assert frozen_hash(params | {"vision": params["vision"] | {"a": other}}, freeze) not in seen
    assert frozen_hash(params | {"projector": {"c": np.zeros(2)}}, freeze) in seen
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(params["vision"]["a"], jax.NamedSharding(mesh, jax.P("data")))
    assert frozen_hash(params | {"vision": params["vision"] | {"a": sharded}}, freeze) in seen
