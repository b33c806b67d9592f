"""Runs attention on random arrays of many shapes, and keeps what it should give."""

import functools

import jax
import numpy as np

from internvl3_jax.model.ops import masks
from internvl3_jax.model.ops.attention import attention, cache_mask, causal_mask

SEGMENTS = np.asarray([[1] * 100 + [2] * 90 + [3] * 50 + [0] * 16, [1] * 250 + [0] * 6], np.int32)
LENGTH = SEGMENTS.shape[1]


def arrays(batch, queries, keys, heads, kv_heads, width, seed=0):
    """q, k, v and a gradient of the result"""
    shapes = [
        (batch, queries, heads),
        (batch, keys, kv_heads),
        (batch, keys, kv_heads),
        (batch, queries, heads),
    ]
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(*shape, width)).astype(np.float32) for shape in shapes]


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(function, q, k, v, gradient, mask):
    """(result, gradients of q, k and v)"""
    out, pull = jax.vjp(lambda *inputs: function(*inputs, mask), q, k, v)
    return out, *pull(gradient)


def named(name):
    return functools.partial(attention, implementation=name)


def assert_same(got, wanted, tolerance=1e-5):
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


CASES = {
    "packed": (256, 256, 4, 2, 64, lambda: causal_mask(SEGMENTS.shape, SEGMENTS)),
    "packed, 128 wide": (256, 256, 3, 1, 128, lambda: causal_mask(SEGMENTS.shape, SEGMENTS)),
    "plain": (256, 256, 4, 4, 64, lambda: causal_mask((2, 256))),
    "odd length": (201, 201, 6, 2, 64, lambda: causal_mask((2, 201), SEGMENTS[:, :201])),
    "zigzag": (
        256,
        256,
        4,
        2,
        64,
        lambda: causal_mask((2, 256), SEGMENTS[:, masks.zigzag(256, 4)], 4),
    ),
    "cache": (
        70,
        300,
        4,
        2,
        64,
        lambda: cache_mask(
            np.asarray([[200], [3]], np.int32) + np.arange(70, dtype=np.int32)[None], 300
        ),
    ),
    "one token": (1, 300, 4, 2, 64, lambda: cache_mask(np.asarray([[299], [0]], np.int32), 300)),
    "tower": (145, 145, 3, 3, 64, lambda: None),
    "tower, whole blocks": (256, 256, 3, 3, 64, lambda: None),
}


@functools.cache
def expected(case):
    queries, keys, heads, kv_heads, width, make_mask = CASES[case]
    inputs = arrays(2, queries, keys, heads, kv_heads, width)
    return inputs, with_gradients(named("xla"), *inputs, make_mask())
