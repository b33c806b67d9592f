"""The mesh, the rule table, and that any way to split an update over devices is the same update."""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl3_jax.config import MeshConfig, OptimizerConfig
from internvl3_jax.fit.hlo import collectives
from internvl3_jax.model.internvl import InternVL, abstract_params
from internvl3_jax.parallel import sharding
from internvl3_jax.parallel.collectives import all_gather_weight, require_mesh
from internvl3_jax.param_tree import path_name
from internvl3_jax.sizes import SIZES
from internvl3_jax.training.optimizer import make_optimizer
from tests.support.batches import batch
from tests.support.meshes import MESHES, PLANNED, STYLES, mesh_of, widened
from tests.support.tiny_checkpoint import CONFIG, random_params
from tests.support.train_step import GRADIENT, assert_close, compiled_step, first_state

# --- rules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_every_parameter_matches_one_rule(size):
    leaves = jax.tree.leaves_with_path(abstract_params(SIZES[size]))
    for path, _ in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert sum(bool(re.fullmatch(pattern, name)) for pattern, _ in sharding.RULES) == 1, name


@pytest.mark.parametrize("sizes", PLANNED, ids=str)
@pytest.mark.parametrize("size", [size for size in SIZES if size != "tiny"])
def test_every_matrix_is_split_over_all_of_fsdp_and_tensor(size, sizes):
    mesh = mesh_of(sizes)
    for path, leaf in jax.tree.leaves_with_path(abstract_params(SIZES[size])):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = sharding.spec(name, leaf.shape, mesh)
        parts = jax.NamedSharding(mesh, spec).shard_shape(leaf.shape)
        share = np.prod(parts) / leaf.size
        if path[-1].key == "kernel" or name == "language/embedding":
            whole_rows = name == "vision/patch_embedding/kernel" or "/router/" in name
            members = mesh.shape["fsdp"] * (1 if whole_rows else mesh.shape["tensor"])
            assert share <= 1 / members, (name, spec)


def test_what_does_not_split_is_named():
    with pytest.raises(
        ValueError,
        match=r"3200 does not split over mesh.fsdp = 256; take 128 and give the rest to mesh.data",
    ):
        sharding.param_shardings(abstract_params(SIZES["78b"]), mesh_of({"fsdp": 256}))
    with pytest.raises(ValueError, match=r"vision/layers/new/kernel: 0 sharding rules match it"):
        sharding.spec("vision/layers/new/kernel", (2, 8, 8), mesh_of({}))


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_the_optimizers_state_follows_its_parameter(name):
    mesh, optimizer = (
        mesh_of({"fsdp": 4, "tensor": 2}),
        make_optimizer(OptimizerConfig(name=name, warmup_steps=0), 10),
    )
    params = abstract_params(CONFIG)
    state = jax.eval_shape(optimizer.init, params)
    wanted = {
        path: (leaf.shape, place)
        for path, leaf, place in placed(params, sharding.param_shardings(params, mesh))
    }
    like, other = 0, 0
    for path, leaf, place in placed(state, sharding.state_shardings(state, params, mesh)):
        shape, rule = next(
            (value for name, value in wanted.items() if path.endswith(name)), (None, None)
        )
        # A factored moment has its parameter's name and another shape: it is whole.
        assert place.spec == (rule.spec if leaf.shape == shape else jax.P()), path
        like, other = like + (leaf.shape == shape), other + (shape not in (None, leaf.shape))
    assert like >= 20 and (other > 5) == (name == "adafactor")


def placed(tree, places):
    leaves = jax.tree.leaves_with_path(tree)
    return [
        (path_name(path), leaf, place)
        for (path, leaf), place in zip(leaves, jax.tree.leaves(places), strict=True)
    ]


@pytest.mark.parametrize("width, axes", [(24, ("context", "fsdp")), (20, "fsdp")])
def test_a_gradient_is_sharded_as_its_parameter(width, axes):
    """Also where context and fsdp together do not divide the width, as of the 6B tower on 256
    devices.
    """
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, context=2))
    path, kernel = "vision/layers/fc1/kernel", jnp.ones((width, 16))
    place = jax.NamedSharding(mesh, sharding.spec(path, kernel.shape, mesh))
    assert place.spec[0] == axes
    with jax.set_mesh(mesh):
        slope = jax.jit(jax.grad(lambda kernel, x: (x @ all_gather_weight(kernel, path)).sum()))
        found = slope(jax.device_put(kernel, place), jnp.ones((8, width)))
    assert found.sharding.is_equivalent_to(place, 2)


def test_mesh_sizes():
    assert sharding.mesh_shape(MeshConfig(tensor=2), 8) == {
        "slice": 1,
        "data": 1,
        "fsdp": 4,
        "tensor": 2,
        "context": 1,
    }
    with pytest.raises(ValueError, match="is for a multiple of 3 devices; there are 8"):
        sharding.mesh_shape(MeshConfig(tensor=3), 8)
    with pytest.raises(ValueError, match="is for 4 devices; there are 8"):
        sharding.mesh_shape(MeshConfig(data=2, fsdp=2), 8)
    with pytest.raises(ValueError, match="at most one is -1"):
        sharding.mesh_shape(MeshConfig(data=-1), 8)


def test_what_a_batch_must_be():
    mesh = mesh_of({"data": 2, "fsdp": 2, "context": 2, "tensor": 2})
    sharding.check_batch(mesh, 8, 2, 64, 4)
    with pytest.raises(
        ValueError,
        match="data.rows is 6; it must be a multiple of 8: 2 micro-batches over slice 1 x data 2 x fsdp 2",
    ):
        sharding.check_batch(mesh, 6, 2, 64, 4)
    with pytest.raises(ValueError, match="tokens_per_row is 63"):
        sharding.check_batch(mesh, 8, 2, 63, 4)
    with pytest.raises(ValueError, match="tiles_per_row is 6"):
        sharding.check_batch(mesh, 8, 2, 64, 6)


def test_a_mesh_must_be_there():
    with pytest.raises(RuntimeError, match="no mesh is in context"):
        require_mesh()


# --- the same update -----------------------------------------------------------------------------


@functools.cache
def expected(style):
    return descend(style, batch(8), None)


@functools.cache
def on_mesh(style, name, micro_batches=1):
    mesh = sharding.make_mesh(MESHES[name])
    return descend(style, widened(batch(8)), mesh, micro_batches=micro_batches)


def descend(style, values, mesh, **settings):
    """(updated parameters, metrics, compiled text)"""
    config = STYLES[style]
    state = first_state(GRADIENT, random_params(config))
    if mesh is None:
        step = compiled_step(GRADIENT, state, values, InternVL(config), num_sources=3, **settings)
    else:
        rows = len(values["tokens"])
        values = sharding.global_batch(mesh, rows, values, list(range(rows)))
        state = state._replace(
            params=jax.device_put(state.params, sharding.param_shardings(state.params, mesh))
        )
        with jax.set_mesh(mesh):
            step = compiled_step(
                GRADIENT, state, values, InternVL(config), num_sources=3, **settings
            )
    state, metrics = step(state, values, jax.random.key(0))
    return jax.device_get(state.params), jax.device_get(metrics), step.as_text()


# Every axis alone or with others, in the combinations that differ: plain data parallelism is in
# test_step.py. Two micro-batches where a device has two rows; the second style where it differs, in
# heads that the tensor axis does not divide and in what a matrix's bias does.
@pytest.mark.parametrize(
    ("style", "name", "micro_batches"),
    [
        ("300m", "fsdp", 1),
        ("300m", "slices", 1),
        ("300m", "context", 2),
        ("300m", "all", 2),
        ("6b", "tensor only", 1),
        ("6b", "all", 2),
        ("qwen3", "all", 2),
        ("qwen3_moe", "fsdp", 1),
        ("qwen3_moe", "slices", 1),
        ("qwen3_moe", "tensor only", 1),
        ("qwen3_moe", "context", 2),
        ("qwen3_moe", "all", 2),
    ],
)
def test_every_mesh_is_one_device(style, name, micro_batches):
    params, metrics, _ = on_mesh(style, name, micro_batches)
    wanted_params, wanted_metrics, _ = expected(style)
    if micro_batches > 1 and style == "qwen3_moe":
        # Experts are balanced within each micro-batch, so the value depends on their rows.
        metrics, wanted_metrics = (
            {name: value for name, value in found.items() if name != "loss_balance"}
            for found in (metrics, wanted_metrics)
        )
    assert_close((params, metrics), (wanted_params, wanted_metrics))


# --- what is communicated ------------------------------------------------------------------------


def groups_of(line: str) -> set[tuple[int, ...]]:
    """Devices that exchange something, of a line of a compiled program."""
    if spelled := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", line):
        return {
            tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", spelled[1])
        }
    shape, dimensions, order = re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line
    ).groups()
    devices = np.arange(8).reshape([int(size) for size in dimensions.split(",")])
    devices = devices.transpose([int(axis) for axis in order.split(",")]) if order else devices
    return {
        tuple(group) for group in devices.reshape([int(size) for size in shape.split(",")]).tolist()
    }


def test_visual_features_stay_with_their_rows():
    """From tiles that are spread over all devices to merged rows: what is exchanged, the devices of
    a row exchange.
    """
    mesh = sharding.make_mesh(MESHES["all"])
    # whole on every device: what is communicated is no parameter
    params = jax.tree.map(jnp.asarray, random_params(CONFIG))
    values = sharding.global_batch(mesh, 8, widened(batch(8)), list(range(8)))

    def merged(batch):
        _, state = InternVL(CONFIG).apply(
            {"params": params}, batch, method=InternVL.hidden, mutable="intermediates"
        )
        return state["intermediates"]["merged"][0]

    with jax.set_mesh(mesh):
        compiled = jax.jit(merged).lower(values).compile({"xla_backend_optimization_level": 0})
    wanted = jax.jit(merged)(batch(8))
    np.testing.assert_allclose(compiled(values), wanted, rtol=1e-5, atol=1e-5)
    fields, visual = (mesh.devices.reshape(2, -1), CONFIG.language.hidden_size)
    rows_devices = [{device.id for device in members} for members in fields]
    lines = [
        line
        for line in compiled.as_text().splitlines()
        if re.search(r"= \S+ (all-|collective-|reduce-scatter)", line)
    ]
    features = [line for line in lines if re.search(rf"f32\[[\d,]*{visual}\]", line)]
    gathers = [line for line in features if " all-gather" in line]
    assert gathers, "a row's features are gathered from the four devices that made them"
    for line in gathers:
        assert all(
            any(set(group) <= members for members in rows_devices) for group in groups_of(line)
        ), line


@pytest.mark.parametrize("style", STYLES)
def test_data_parallel_sums_gradients_and_nothing_else(style):
    *_, text = on_mesh(style, "data")
    found = collectives(text, 8)
    assert {row.kind for row in found} == {"all-reduce"}
    params = abstract_params(STYLES[style])
    size = sum(leaf.size for leaf in jax.tree.leaves(params)) * 4
    # The gradient of a layer scale is made of the sum for its kernel.
    layers = params["vision"]["layers"]
    size -= sum(layers[name].size for name in ("layer_scale1", "layer_scale2")) * 4
    assert size * 2 * 7 / 8 <= sum(row.bytes for row in found) <= 1.001 * size * 2 * 7 / 8


@pytest.mark.parametrize("style", STYLES)
def test_fsdp_gathers_each_weight_once_and_scatters_its_gradient(style):
    mesh, config = sharding.make_mesh(MESHES["fsdp"]), STYLES[style]
    *_, text = on_mesh(style, "fsdp")
    received = Counter()
    for row in collectives(text, 8):
        received[row.kind] += row.bytes
    shapes = abstract_params(config)
    places = sharding.param_shardings(shapes, mesh)
    split = [
        leaf.size * 4
        for leaf, place in zip(jax.tree.leaves(shapes), jax.tree.leaves(places), strict=True)
        if any(place.spec)
    ]
    # Only the embedding rows that are looked up are communicated, not the table.
    table = shapes["language"]["embedding"].size * 4
    weights = (sum(split) - table) * 7 / 8
    assert weights <= received["all-gather"] <= 1.02 * weights
    # On a CPU a reduce-scatter is compiled to an all-reduce, which receives twice as much.
    gradients = received["reduce-scatter"] + received["all-reduce"] / 2
    assert weights <= gradients <= 1.05 * weights
    assert received["all-to-all"] <= 0.1 * weights
