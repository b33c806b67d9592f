"""Packed rows in cuDNN's layout, and the trial that decides whether its kernel is used.

The kernel needs a GPU. Here a function in its place reads the same lengths and offsets.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as internal

from internvl3_jax.model.ops import cudnn_attention
from internvl3_jax.model.ops.attention import attention, choose
from internvl3_jax.model.ops.masks import causal_mask
from internvl3_jax.model.ops.remat import _POLICIES as POLICIES
from internvl3_jax.model.ops.xla_attention import xla_attention

# Three samples and padding; one sample; as many samples as allowed, without padding.
SEGMENTS = np.zeros((3, 24), np.int32)
SEGMENTS[0, :10], SEGMENTS[0, 10:11], SEGMENTS[0, 11:19] = 1, 2, 3
SEGMENTS[1] = 1
SEGMENTS[2] = np.repeat([1, 2, 3, 4], 6)


def test_the_layout_of_segments():
    lengths, offsets = cudnn_attention.segment_layout(jnp.asarray(SEGMENTS), 4)
    assert lengths.tolist() == [[10, 1, 8, 5, -1], [24, -1, -1, -1, -1], [6, 6, 6, 6, -1]]
    assert offsets.tolist() == [
        [0, 10, 11, 19, 24, -1],
        [0, 24, -1, -1, -1, -1],
        [0, 6, 12, 18, 24, -1],
    ]


def kernel(q, k, v, bias, mask, q_lengths, kv_lengths, q_offsets, kv_offsets, *, scale, mask_type):
    """Attention by jax's documentation of the packed layout: causal within each segment."""
    assert bias is None and mask is None and mask_type == internal.MaskType.PADDING_CAUSAL
    assert q_lengths is kv_lengths and q_offsets is kv_offsets
    slots = jnp.arange(q.shape[1])[None, None]
    start, length = q_offsets[:, :-1, None], q_lengths[:, :, None]
    belongs = (q_offsets[:, :-1, None] >= 0) & (slots >= start) & (slots < start + length)
    same = jnp.einsum("bmt,bms->bts", belongs.astype(jnp.int32), belongs.astype(jnp.int32)) > 0
    visible = same & (slots.transpose(0, 2, 1) >= slots)
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k).astype(jnp.float32) * scale
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights, v.astype(jnp.float32)).astype(q.dtype)


@pytest.fixture
def on_gpu(monkeypatch):
    """Lets this CPU pass for a GPU with cuDNN's kernel."""
    monkeypatch.setattr(internal, "dot_product_attention", kernel)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    cudnn_attention._works.cache_clear()
    yield
    cudnn_attention._works.cache_clear()


def inputs(dtype):
    rng = np.random.default_rng(0)
    shapes = (3, 24, 4, 16), (3, 24, 2, 16), (3, 24, 2, 16)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def test_packed_rows_are_those_of_the_mask(on_gpu):
    mask = causal_mask(SEGMENTS.shape, jnp.asarray(SEGMENTS), max_segments=4)
    q, k, v = inputs(jnp.bfloat16)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    used = SEGMENTS[:, :, None, None] > 0
    found = attention(q, k, v, mask, "cudnn").astype(jnp.float32)
    assert np.abs(np.where(used, found - xla_attention(*wide, mask), 0)).max() < 0.02


def test_the_kernel_is_chosen_where_samples_are_bounded(on_gpu):
    """Otherwise the mask would be a table, which is too large for long rows."""
    q, k = (jax.ShapeDtypeStruct((1, 16_384, n, 64), jnp.bfloat16) for n in (4, 2))
    segments = jax.ShapeDtypeStruct((1, 16_384), jnp.int32)
    assert choose("gpu", q, k, causal_mask((1, 16_384), segments, max_segments=64), None) == "cudnn"
    assert choose("gpu", q, k, causal_mask((1, 16_384), segments), None) == "flash"
    shared = causal_mask((1, 16_384), segments, last_query=segments, max_segments=64)
    assert choose("gpu", q, k, shared, None) == "flash"


def test_a_right_kernel_is_used(on_gpu, capsys):
    assert cudnn_attention.packed_works(64, jnp.dtype("bfloat16"))
    assert capsys.readouterr().err == ""


def wrong_scale(*arguments, scale, mask_type):
    return kernel(*arguments, scale=1.2 * scale, mask_type=mask_type)


def one_segment(q, k, v, bias, mask, lengths, _, offsets, __, **options):
    lengths = jnp.where(jnp.arange(lengths.shape[1])[None] == 0, q.shape[1], -1) + 0 * lengths
    return kernel(q, k, v, bias, mask, lengths, lengths, offsets, offsets, **options)


def unwritten(*arguments, **options):
    return kernel(*arguments, **options).at[0, 0].set(jnp.nan)


def refused(*arguments, **options):
    raise NotImplementedError("Packed layout requires a GPU with at least Hopper architecture.")


def other_signature(q, k, v):
    return q


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (wrong_scale, "it is wrong by "),
        (one_segment, "it is wrong by "),
        (unwritten, "it is wrong by inf%"),
        (refused, "NotImplementedError: Packed layout requires"),
        (other_signature, "TypeError: "),
    ],
)
def test_a_broken_kernel_is_not_used(on_gpu, monkeypatch, capsys, broken, reason):
    """Said once; packed rows then take the blocks in plain JAX."""
    monkeypatch.setattr(internal, "dot_product_attention", broken)
    q, k = (jax.ShapeDtypeStruct((1, 16_384, n, 64), jnp.bfloat16) for n in (4, 2))
    mask = causal_mask((1, 16_384), jax.ShapeDtypeStruct((1, 16_384), jnp.int32), max_segments=8)
    for _ in range(2):
        assert choose("gpu", q, k, mask, None) == "flash"
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("note: cuDNN's attention is not used for packed rows here (" + reason)


@pytest.mark.parametrize(("leak", "works"), [(0.0, True), (1.0, False), (np.nan, False)])
def test_padded_keys_must_have_no_gradient(on_gpu, monkeypatch, leak, works):
    """What the kernel leaves in the gradients of padded keys would reach every parameter."""

    @jax.custom_vjp
    def attend(q, k, v, seen):
        return run(q, k, v, seen)

    def run(q, k, v, seen):
        keep = jnp.arange(k.shape[1])[None, :] < seen[:, None]
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
        scores = jnp.einsum("btnh,bsnh->bnts", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(keep[:, None, None], scores, -jnp.inf), axis=-1)
        return jnp.einsum("bnts,bsnh->btnh", weights, v.astype(jnp.float32)).astype(q.dtype)

    def forward(q, k, v, seen):
        out, back = jax.vjp(lambda *x: run(*x, seen), q, k, v)
        return out, (back, seen)

    def backward(saved, gradient):
        dq, dk, dv = saved[0](gradient)
        padded = (jnp.arange(dk.shape[1])[None, :] >= saved[1][:, None])[:, :, None, None]
        return dq, jnp.where(padded, leak, dk).astype(dk.dtype), dv, None

    attend.defvjp(forward, backward)
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda q, k, v, implementation, key_value_seq_lengths: attend(
            q, k, v, key_value_seq_lengths
        ),
    )
    assert cudnn_attention.padding_works(64, jnp.dtype("bfloat16")) is works


@pytest.mark.parametrize(
    ("policy", "forward_kernels"), [("attention", 1), ("dots", 1), ("full", 2)]
)
def test_remat_runs_the_forward_kernel_once(monkeypatch, capsys, policy, forward_kernels):
    """Its output is kept with its sums for the gradient, and only once, also where an odd number of
    tokens was padded. Nothing is run: the trace is counted.
    """
    monkeypatch.setattr(internal, "check_cudnn_version", lambda: 91_000)
    layer = jax.checkpoint(
        lambda q, k, v: cudnn_attention.cudnn(q, k, v, None).sum(), policy=POLICIES[policy]
    )
    x = jax.ShapeDtypeStruct((1, 63, 2, 64), jnp.bfloat16)
    trace = str(jax.make_jaxpr(jax.grad(layer))(x, x, x))
    assert len(re.findall(r"= dot_product_attention_fwd\w*\[", trace)) == forward_kernels
    assert len(re.findall(r"= dot_product_attention_bwd\w*\[", trace)) == 1

    jax.ad_checkpoint.print_saved_residuals(layer, x, x, x)
    kept = [line for line in capsys.readouterr().out.splitlines() if "argument" not in line]
    assert len(kept) == (2 if forward_kernels == 1 else 0), kept
