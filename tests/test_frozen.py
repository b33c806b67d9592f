"""What is frozen has no state and keeps every bit, and the table of components shows it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl3_jax.config import OptimizerConfig
from internvl3_jax.model.internvl import abstract_params
from internvl3_jax.sizes import SIZES
from internvl3_jax.training.optimizer import join, make_optimizer
from internvl3_jax.training.param_table import component_table, format_table, frozen_hash
from tests.support.tiny_checkpoint import CONFIG, random_params
from tests.support.train_step import by_path

PARAMS = random_params(CONFIG)
# no schedule to reckon with
CONSTANT = OptimizerConfig(warmup_steps=0, final_lr_fraction=1.0, learning_rate=1e-2)


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
