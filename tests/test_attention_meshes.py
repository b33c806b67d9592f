"""Attention on any mesh computes what one device does, and no device makes a table of queries by
keys that it should not.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl3_jax.config import MeshConfig
from internvl3_jax.model.internvl import InternVL
from internvl3_jax.model.ops import context_parallel, masks
from internvl3_jax.model.ops.attention import causal_mask
from internvl3_jax.model.ops.flash_attention import flash_attention
from internvl3_jax.parallel import sharding
from internvl3_jax.training.step import make_model
from tests.support.attention_cases import (
    CASES,
    LENGTH,
    SEGMENTS,
    arrays,
    assert_same,
    expected,
    named,
    with_gradients,
)
from tests.support.tiny_checkpoint import CONFIG, random_params, train_config

MESHES = {
    "rows": MeshConfig(fsdp=2, data=4),
    "tensor 4": MeshConfig(fsdp=2, tensor=4),
    "tensor 8": MeshConfig(fsdp=1, tensor=8),
    "context 4": MeshConfig(fsdp=2, context=4),
    "all": MeshConfig(fsdp=2, tensor=2, context=2),
}


def on_mesh(function, mesh, q, k, v, gradient, segments):
    """As `with_gradients`, of rows in their order, with what a mesh with a context axis does to it."""

    def run(q, k, v, gradient, segments):
        parts = context_parallel.num_context_shards(q.shape[1])
        q, k, v, segments = (context_parallel.to_zigzag(x, parts) for x in (q, k, v, segments))
        out, pull = jax.vjp(
            lambda *inputs: function(*inputs, causal_mask(q.shape[:2], segments, parts)), q, k, v
        )
        return tuple(
            context_parallel.from_zigzag(x, parts)
            for x in (out, *pull(context_parallel.to_zigzag(gradient, parts)))
        )

    with jax.set_mesh(sharding.make_mesh(mesh)):
        return jax.jit(run)(q, k, v, gradient, segments)


@functools.cache
def rows(heads, kv_heads, width):
    inputs = arrays(4, LENGTH, LENGTH, heads, kv_heads, width)
    segments = np.concatenate([SEGMENTS, SEGMENTS[::-1]])
    return (*inputs, segments), with_gradients(
        named("xla"), *inputs, causal_mask(segments.shape, segments)
    )


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("function", ["xla", "xla_per_head", "flash", "ring", 24])
def test_every_mesh_is_one_device(function, mesh):
    """Of 14 heads on 2, which no tensor axis above 2 divides. 24: rings of blocks of that many."""
    inputs, wanted = rows(14, 2, 8)
    if function == 24:
        ring = functools.partial(flash_attention, ring=True, block=24)
        function = functools.partial(context_parallel.over_mesh, ring)
    else:
        function = named(function)
    assert_same(on_mesh(function, MESHES[mesh], *inputs), wanted)


@pytest.mark.parametrize("mesh", ["tensor 4", "all"])
def test_splash_on_a_mesh(mesh):
    inputs, wanted = rows(6, 2, 64)
    assert_same(on_mesh(named("splash"), MESHES[mesh], *inputs), wanted)


@pytest.mark.parametrize("function", ["xla", "flash", "splash"])
@pytest.mark.parametrize("tiles", [8, 3])
def test_tiles_on_a_mesh(function, tiles):
    """3 tiles do not divide: every device computes all of them."""
    inputs = arrays(tiles, 65, 65, 3, 3, 64)
    wanted = with_gradients(named("xla"), *inputs, None)
    with jax.set_mesh(sharding.make_mesh(MESHES["all"])):
        assert_same(with_gradients(named(function), *inputs, None), wanted)


@pytest.mark.parametrize("function", ["xla", "flash"])
def test_a_cache_on_a_mesh(function):
    inputs, wanted = expected("cache")
    with jax.set_mesh(sharding.make_mesh(MESHES["all"])):
        assert_same(with_gradients(named(function), *inputs, CASES["cache"][-1]()), wanted)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tensor", "local_heads", "local_kv_heads"),
    [
        (14, 2, 2, 7, 1),
        (14, 2, 4, 4, 1),
        (14, 2, 8, 2, 1),
        (12, 2, 8, 2, 1),
        (28, 4, 4, 7, 1),
        (28, 4, 8, 4, 1),
        (32, 2, 8, 4, 1),
        (40, 8, 8, 5, 1),
        (64, 8, 8, 8, 1),
        (40, 8, 4, 10, 2),
    ],
)
def test_heads_of_each_device(heads, kv_heads, tensor, local_heads, local_kv_heads):
    """All heads are computed once, but for those that fill up a group."""
    seen = []

    def spy(q, k, v, mask, axis):
        seen.append((q.shape, k.shape, axis))
        return q

    q, k, v, _ = (
        jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays(8, 8, 8, heads, kv_heads, 4)
    )
    with jax.set_mesh(sharding.make_mesh(MeshConfig(tensor=tensor))):
        out = jax.eval_shape(
            lambda q, k, v: context_parallel.over_mesh(spy, q, k, v, causal_mask((8, 8))), q, k, v
        )
    assert out.shape == q.shape
    rows = tensor  # of 8, over the other devices
    assert seen == [((rows, 8, local_heads, 4), (rows, 8, local_kv_heads, 4), None)]


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_tokens_change_places(parts):
    x = np.random.default_rng(0).normal(size=(2, 48, 3)).astype(np.float32)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(context=parts))):
        assert (
            context_parallel.num_context_shards(48) == parts
            and context_parallel.num_context_shards(50) == 1
        )
        moved = jax.jit(lambda x: context_parallel.to_zigzag(x, parts))(x)
        np.testing.assert_array_equal(moved, x[:, masks.zigzag(48, parts)])
        np.testing.assert_array_equal(
            jax.jit(lambda x: context_parallel.from_zigzag(x, parts))(moved), x
        )


@pytest.mark.parametrize("function", ["flash", "ring"])
def test_no_device_holds_queries_by_keys(function):
    """The largest array of the compiled program is the block of scores, not T / 4 x T."""
    length = 8192
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays(1, 1, 1, 2, 1, 8)]
    q, k, v, gradient = (jax.ShapeDtypeStruct((1, length, *x.shape[2:]), x.dtype) for x in like)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(fsdp=1, tensor=2, context=4))):
        mask = jax.eval_shape(lambda: causal_mask((1, length), jnp.ones((1, length), jnp.int32), 4))
        text = with_gradients.lower(named(function), q, k, v, gradient, mask).compile().as_text()
    sizes = [
        np.prod([int(n) for n in dims.split(",")])
        for dims in re.findall(r"\b(?:f32|pred|s32)\[([\d,]+)\]", text)
    ]
    assert max(sizes) == 512 * 512


def test_the_model_under_a_ring():
    """As a run's config asks for it."""
    config = dataclasses.replace(train_config(), attention_language="ring")
    batch = {
        "tokens": np.random.default_rng(0).integers(0, 400, (2, 64)).astype(np.int32),
        "positions": np.tile(np.arange(64, dtype=np.int32) * 256, (2, 1)),
        "segments": np.asarray([[1] * 30 + [2] * 30 + [0] * 4, [1] * 64], np.int32),
        "tiles": np.zeros((2, 0, 16, 16, 3), np.uint8),
    }
    params = random_params(CONFIG)
    wanted = jax.jit(InternVL(CONFIG).apply)({"params": params}, batch)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(fsdp=2, context=4))):
        got = jax.jit(make_model(config).apply)({"params": params}, batch)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
