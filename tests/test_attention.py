"""Every implementation of attention computes the same, and none is chosen where it cannot be."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl3_jax.config import MeshConfig
from internvl3_jax.model.ops import cudnn_attention, masks
from internvl3_jax.model.ops.attention import attention, cache_mask, causal_mask, choose
from internvl3_jax.model.ops.flash_attention import flash_attention
from internvl3_jax.model.ops.remat import _POLICIES
from internvl3_jax.parallel import sharding
from internvl3_jax.parallel.collectives import platform
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


def reference(q, k, v, visible=None):
    q, k, v = (np.asarray(part, np.float64) for part in (q, k, v))
    k, v = (np.repeat(part, q.shape[2] // part.shape[2], axis=2) for part in (k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    if visible is not None:
        scores = np.where(np.asarray(visible)[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(axis=-1, keepdims=True), v)


# --- masks ---------------------------------------------------------------------------------------


def test_who_sees_whom():
    order = np.arange(3, dtype=np.int32)[None]
    assert cache_mask(order, 3).dense().astype(int).tolist() == [[[1, 0, 0], [1, 1, 0], [1, 1, 1]]]
    packed = np.asarray([[1, 1, 2, 2]])
    expected = [[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]]
    assert causal_mask((1, 4), packed).dense().astype(int).tolist() == expected
    assert (
        cache_mask(np.arange(4, dtype=np.int32)[None], 4, packed, packed)
        .dense()
        .astype(int)
        .tolist()
        == expected
    )
    assert cache_mask(np.asarray([[5]]), 8).dense().astype(int).tolist() == [
        [[1, 1, 1, 1, 1, 1, 0, 0]]
    ]


def test_zigzag():
    assert masks.zigzag(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert masks.zigzag(5, 1).tolist() == [0, 1, 2, 3, 4]
    for parts in (1, 2, 4, 5):
        order = masks.zigzag(40, parts)
        np.testing.assert_array_equal(
            masks.undo_zigzag(jnp.asarray(order)[None], parts)[0], np.arange(40)
        )
        # Every device's queries see as many keys.
        assert len(set((order + 1).reshape(parts, -1).sum(axis=1))) == 1 or parts == 1
    with pytest.raises(ValueError, match="its length must be a multiple of 6"):
        masks.zigzag(10, 3)


@pytest.mark.parametrize("parts", [1, 4])
def test_blocks_that_are_left_out_are_empty(parts):
    segments = SEGMENTS[:, masks.zigzag(LENGTH, parts)]
    mask = causal_mask(SEGMENTS.shape, segments, parts)
    needed = np.asarray(masks.block_mask(mask, 16, 32))
    seen = np.asarray(mask.dense()).reshape(2, LENGTH // 16, 16, LENGTH // 32, 32).any(axis=(2, 4))
    assert (needed >= seen).all()
    # In the first row those of three samples, of which the causal half: a fifth of all in place of
    # half.
    if parts == 1:
        np.testing.assert_array_equal(needed, seen)
        assert 0.2 < needed[0].mean() < 0.3 and 0.5 < needed[1].mean() < 0.6


# --- the implementations -------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_xla_is_the_formula(case):
    (q, k, v, _), (out, *_) = expected(case)
    mask = CASES[case][-1]()
    if mask is not None and mask.context_shards > 1:
        order = np.argsort(masks.zigzag(q.shape[1], mask.context_shards))
        q, k, v, out = (np.asarray(x)[:, order] for x in (q, k, v, out))
        mask = causal_mask(q.shape[:2], SEGMENTS)
    np.testing.assert_allclose(
        out, reference(q, k, v, None if mask is None else mask.dense()), rtol=1e-5, atol=1e-5
    )


# Splash is emulated on a CPU, at seconds a case. These differ in what it is given: segments, grouped
# heads, lengths that it pads, a cache, and no mask.
SPLASH_CASES = ("packed, 128 wide", "odd length", "cache", "tower")


@pytest.mark.parametrize(
    ("function", "case"),
    [(function, case) for function in ("xla_per_head", "flash", 48) for case in CASES]
    + [("splash", case) for case in SPLASH_CASES],
)
def test_implementations_agree(function, case):
    """48: blocks of that many, which divide nothing."""
    inputs, wanted = expected(case)
    function = (
        named(function)
        if isinstance(function, str)
        else functools.partial(flash_attention, block=function)
    )
    assert_same(with_gradients(function, *inputs, CASES[case][-1]()), wanted)


@pytest.mark.parametrize("function", ["xla", "xla_per_head", "flash", "splash"])
def test_bfloat16_stays_and_is_near(function):
    inputs, wanted = expected("packed")
    got = with_gradients(
        named(function),
        *(jnp.asarray(x, jnp.bfloat16) for x in inputs),
        causal_mask(SEGMENTS.shape, SEGMENTS),
    )
    assert {x.dtype for x in got} == {jnp.dtype(jnp.bfloat16)}
    for a, b in zip(got, wanted, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b)
        assert np.linalg.norm(a - b) < 0.01 * np.linalg.norm(b)  # bfloat16's own rounding is 0.002


@pytest.mark.parametrize("function", ["xla", "xla_per_head", "flash", "splash"])
def test_a_sample_depends_on_its_own_past_alone(function):
    """Gradients of one token of the second sample: zero, exactly, at all keys but those of its
    sample up to it.
    """
    (q, k, v, _), _ = expected("packed")
    gradient = np.zeros_like(q)
    gradient[0, 130] = 1
    mask = causal_mask(SEGMENTS.shape, SEGMENTS)
    _, _, *gradients = with_gradients(named(function), q, k, v, gradient, mask)
    for array in gradients:
        seen = np.abs(np.asarray(array)).max(axis=(2, 3)) > 0
        assert seen[0].nonzero()[0].tolist() == list(range(100, 131)) and not seen[1].any()


@pytest.mark.parametrize("function", ["xla", "xla_per_head", "flash", "splash"])
def test_a_query_without_keys_is_finite(function):
    q, k, v, gradient = arrays(1, 256, 256, 2, 2, 64)
    nobody = cache_mask(
        np.zeros((1, 256), np.int32), 256, np.full((1, 256), 1), np.full((1, 256), 2)
    )
    assert not nobody.dense().any()
    some = dataclasses.replace(nobody, q_segments=np.repeat([[1, 2]], 128, axis=1))
    for mask in (nobody, some):
        assert all(
            np.isfinite(x).all() for x in with_gradients(named(function), q, k, v, gradient, mask)
        )


def primitives(jaxpr) -> collections.Counter:
    """Returns how often each primitive is in a program, its inner ones included."""
    found = collections.Counter()
    for equation in jaxpr.eqns:
        if not equation.outvars:  # left by the differentiation; the compiler drops it
            continue
        found[equation.primitive.name] += 1
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += primitives(inner)
    return found


@pytest.mark.parametrize(
    ("function", "primitive", "backward"), [("splash", "pallas_call", 2), ("flash", "while", 1)]
)
@pytest.mark.parametrize(
    "mesh", [None, MeshConfig(fsdp=2, context=2, tensor=2)], ids=["alone", "mesh"]
)
def test_a_kept_output_is_not_computed_again(function, primitive, backward, mesh):
    """Under remat "attention" the kernel of the forward pass runs once, under "full" twice."""

    def count(policy):
        def layer(q, k, v, mask):
            return attention(q * 2, k, v, mask, function) * 2

        layer = jax.checkpoint(layer, policy=_POLICIES[policy])
        q, k, v, _ = arrays(2, 256, 256, 4, 2, 64)
        gradient = jax.grad(lambda q, k, v, mask: layer(q, k, v, mask).sum(), argnums=(0, 1, 2))
        return primitives(
            jax.make_jaxpr(gradient)(q, k, v, causal_mask(SEGMENTS.shape, SEGMENTS)).jaxpr
        )[primitive]

    with jax.set_mesh(
        sharding.make_mesh(mesh or MeshConfig(), None if mesh else jax.devices()[:1])
    ):
        assert (count("attention"), count("full")) == (1 + backward, 2 + backward)


@pytest.mark.parametrize("case", CASES)
def test_what_cudnn_is_asked_for(case, monkeypatch):
    """XLA answers in its place: the masks, lengths and padding are right, whatever the kernel makes
    of them.
    """
    plain = jax.nn.dot_product_attention

    def stand_in(*inputs, implementation, **how):
        assert implementation == "cudnn" and all(x.shape[1] % 2 == 0 for x in inputs)
        return plain(*inputs, implementation="xla", **how)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    inputs, wanted = expected(case)
    assert_same(
        with_gradients(lambda *inputs: cudnn_attention.cudnn(*inputs), *inputs, CASES[case][-1]()),
        wanted,
    )


def test_what_cannot_be_is_refused():
    q = jnp.ones((1, 2, 2, 4))
    with pytest.raises(
        ValueError, match="'fast' is not one of auto, xla, xla_per_head, flash, ring, splash"
    ):
        attention(q, q, q, implementation="fast")
    with pytest.raises(
        ValueError,
        match="'splash' needs heads of a multiple of 64; these are 4 wide; use 'flash'",
    ):
        attention(q, q, q, implementation="splash")
    with pytest.raises(ValueError, match="'cudnn' runs on gpu; these devices are cpu; use 'auto'"):
        attention(q, q, q, implementation="cudnn")


# --- the choice ----------------------------------------------------------------------------------


def local(batch, queries, keys, heads, width, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((batch, queries, heads, width), dtype), jax.ShapeDtypeStruct(
        (batch, keys, 2, width), dtype
    )


CHOICES = [
    ("cpu", local(2, 256, 256, 4, 64), "packed", "xla"),
    ("cpu", local(1, 1025, 1025, 16, 64), "tower", "xla_per_head"),
    ("cpu", local(1, 16_384, 16_384, 14, 64), "packed", "flash"),
    ("tpu", local(1, 16_384, 16_384, 14, 64), "packed", "splash"),
    ("tpu", local(13, 1025, 1025, 16, 64), "tower", "splash"),
    ("tpu", local(1, 4096, 8192, 14, 128), "cache", "splash"),
    ("tpu", local(8, 1, 8192, 14, 64), "cache", "xla"),
    ("tpu", local(1, 16_384, 16_384, 4, 32), "packed", "flash"),
    ("gpu", local(13, 1025, 1025, 16, 64), "tower", "cudnn"),
    ("gpu", local(1, 262_144, 262_144, 14, 64), "plain", "cudnn"),
    ("gpu", local(1, 4096, 4096, 14, 64), "packed", "cudnn"),
    ("gpu", local(4, 4096, 4096, 14, 64), "packed", "flash"),
    ("gpu", local(1, 16_384, 16_384, 14, 64), "packed", "flash"),
    ("gpu", local(8, 1, 8192, 14, 64), "cache", "xla"),
    ("gpu", local(1, 16_384, 16_384, 14, 64, jnp.float32), "packed", "flash"),
]


@pytest.mark.parametrize(("platform", "inputs", "kind", "wanted"), CHOICES)
def test_what_auto_chooses(platform, inputs, kind, wanted):
    make = {
        "packed": lambda q, k: causal_mask(q.shape[:2], jnp.ones(q.shape[:2], jnp.int32)),
        "plain": lambda q, k: causal_mask(q.shape[:2]),
        "cache": lambda q, k: cache_mask(jnp.zeros(q.shape[:2], jnp.int32), k.shape[1]),
        "tower": lambda q, k: None,
    }
    assert choose(platform, *inputs, jax.eval_shape(lambda: make[kind](*inputs)), None) == wanted


def test_the_mesh_says_what_is_computed_on():
    assert platform() == "cpu"
    with jax.set_mesh(sharding.make_mesh(MeshConfig())):
        assert platform() == "cpu"
    tpu = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((4, 2), ("fsdp", "tensor"), abstract_device=tpu)
    with jax.sharding.use_abstract_mesh(mesh):
        assert platform() == "tpu"
