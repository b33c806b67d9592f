"""Attention on NVIDIA GPUs: cuDNN's fused kernel.

The kernel supports causal rows, rows of given lengths, and, from Hopper on, packed rows whose
number of samples is bounded (`Mask.max_segments`). Any other mask needs a dense [T, S] table: 2
bytes for each pair of tokens, and no block is skipped. `dense_mask_bytes` is what
`attention.choose` decides by.

jax has no public function for packed rows, and does not say what the kernel does to padded keys.
`packed_works` and `padding_works` try both on the device before they are used.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from internvl3_jax.model.ops import device_trial
from internvl3_jax.model.ops.context_parallel import gather_keys
from internvl3_jax.model.ops.masks import Mask, causal_mask
from internvl3_jax.model.ops.xla_attention import xla_attention

# Largest error of the packed kernel in `packed_works`, as a share of the largest value. bfloat16
# has 8 bits, and gradients sum many rounded products.
_TOLERANCE = 0.03


def cudnn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask | None,
    axis: str | None = None,
    num_keys: int | None = None,
) -> Float[Array, "B T N H"]:
    """Computes attention of bfloat16 or float16 arrays; `axis` as in `over_mesh`.

    num_keys: Without a mask, the number of keys that are seen; None: all.
    """
    if is_packed(mask) and axis is None:
        return _packed(q, k, v, mask)
    if mask is not None:
        k, v, mask = gather_keys(k, v, mask, axis)
    batch, num_queries, length = q.shape[0], q.shape[1], k.shape[1]

    # Express the mask in the kernel's terms.
    options = {}
    if needs_dense_mask(mask):
        dense = jnp.pad(mask.dense(), ((0, 0), (0, num_queries % 2), (0, length % 2)))
        options["mask"] = dense[:, None]
    elif mask is not None:
        options["is_causal"] = True
    elif length % 2 or num_keys not in (None, length):
        seen = length if num_keys is None else num_keys
        options["key_value_seq_lengths"] = jnp.full(batch, seen, jnp.int32)

    # The kernel's backward pass rejects odd lengths. No token of a causal row sees what is padded
    # after it.
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **options)
    return out[:, :num_queries]


def needs_dense_mask(mask: Mask | None) -> bool:
    """Returns whether the kernel cannot express the mask by causality and lengths."""
    if mask is None:
        return False
    return not (mask.self_attention and mask.context_shards == 1 and mask.q_segments is None)


def dense_mask_bytes(q, k, mask: Mask | None) -> int:
    """Returns the bytes of the dense mask for local arrays q and k; 0 if none is needed."""
    if is_packed(mask) or not needs_dense_mask(mask):
        return 0
    return 2 * q.shape[0] * q.shape[1] * k.shape[1]


# --- packed rows ---------------------------------------------------------------------------------


def is_packed(mask: Mask | None) -> bool:
    """Returns whether the mask is that of packed rows with a bounded number of samples."""
    return (
        mask is not None
        and mask.self_attention
        and mask.context_shards == 1
        and mask.q_segments is not None
        and mask.kv_last_query is None
        and mask.max_segments > 0
    )


def _packed(q, k, v, mask: Mask):
    from jax._src.cudnn import fused_attention_stablehlo as internal

    lengths, offsets = segment_layout(mask.q_segments, mask.max_segments)
    return internal.dot_product_attention(
        q,
        k,
        v,
        None,
        None,
        lengths,
        lengths,
        offsets,
        offsets,
        scale=q.shape[-1] ** -0.5,
        mask_type=internal.MaskType.PADDING_CAUSAL,
    )


def segment_layout(
    segments: Int[Array, "B T"], max_segments: int
) -> tuple[Int[Array, "B M"], Int[Array, "B M1"]]:
    """Returns the lengths and offsets of a packed row's segments, as cuDNN takes them.

    Padding counts as one more segment, so that the kernel writes all of its output: M is
    max_segments + 1, and M1 is M + 1. Missing segments have length and offset -1; the offset after
    the last segment is the length of the row.
    """
    length, slots = segments.shape[1], max_segments + 1
    is_first = jnp.concatenate(
        [jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1
    )
    run = jnp.cumsum(is_first, axis=1) - 1
    belongs = run[:, None, :] == jnp.arange(slots)[None, :, None]
    lengths = belongs.sum(axis=-1, dtype=jnp.int32)
    ends = jnp.cumsum(lengths, axis=1, dtype=jnp.int32)
    offsets = jnp.concatenate([jnp.zeros_like(ends[:, :1]), ends], axis=1)
    count = run[:, -1:] + 1
    offsets = jnp.where(jnp.arange(slots + 1)[None] < count, offsets, -1)
    offsets = jnp.where(jnp.arange(slots + 1)[None] == count, length, offsets)
    return jnp.where(lengths > 0, lengths, -1), offsets


def packed_works(width: int, dtype: DTypeLike) -> bool:
    """Returns whether this GPU's packed kernel gives the right outputs and gradients.

    Args:
      width: Of the heads.
    """
    return _works("packed rows", _packed_error, width, dtype)


def padding_works(width: int, dtype: DTypeLike) -> bool:
    """Returns whether this GPU's kernel ignores padded keys, and gives them gradients of zero."""
    return _works("padded tiles", _padding_error, width, dtype)


@functools.cache
def _works(case: str, error_of: Callable, width: int, dtype: DTypeLike) -> bool:
    """Returns whether the kernel's error is small, in float32 terms; tried once per process."""
    return device_trial.works(
        functools.partial(error_of, width, dtype),
        _TOLERANCE,
        "it is wrong by {error:.1%} of the largest value",
        f"cuDNN's attention is not used for {case} here ({{reason}}); a slower way is",
    )


def _packed_error(width: int, dtype: DTypeLike) -> float:
    """Returns the largest error of outputs and gradients, as a share of the largest value."""
    segments = np.zeros((2, 256), np.int32)
    segments[0, :100], segments[0, 100:101], segments[0, 101:230] = 1, 2, 3
    segments[1] = 1
    mask = causal_mask(segments.shape, jnp.asarray(segments), max_segments=5)

    def packed(q, k, v):
        return _packed(q, k, v, mask)

    def expected(q, k, v):
        return xla_attention(q, k, v, mask)

    # Padding is not compared: the implementations treat it differently.
    return _error(packed, expected, segments > 0, width, dtype)


def _padding_error(width: int, dtype: DTypeLike) -> float:
    """Returns the largest error of outputs and gradients, as a share of the largest value."""
    seen = 257

    def padded(q, k, v):
        return cudnn(q, k, v, None, None, seen)

    def expected(q, k, v):
        return xla_attention(q, k[:, :seen], v[:, :seen], None)

    return _error(padded, expected, np.ones((2, 264), bool), width, dtype)


def _error(actual: Callable, expected: Callable, used, width: int, dtype: DTypeLike) -> float:
    """Compares outputs and gradients of `actual` in `dtype` with those of `expected` in float32.

    used: bool[B,T], the queries that the loss depends on.
    """
    rng = np.random.default_rng(0)
    batch, length = used.shape
    shapes = (batch, length, 4, width), (batch, length, 2, width), (batch, length, 2, width)
    # Both get the same numbers.
    inputs = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    weights = rng.normal(size=shapes[0]) * used[:, :, None, None]

    def run(attend, inputs):
        def loss(*inputs):
            out = attend(*inputs).astype(jnp.float32)
            return (out * jnp.asarray(weights, jnp.float32)).sum(), out

        # What a kernel does not write shows: memory of this size was full of NaN before.
        for x in [jnp.full_like(inputs[0], jnp.nan) for _ in range(16)]:
            x.block_until_ready().delete()
        grads, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*inputs)
        out = jnp.where(used[:, :, None, None], out, 0)
        return [np.asarray(x, np.float32) for x in (out, *grads)]

    with jax.default_matmul_precision("highest"):
        right = run(expected, [x.astype(jnp.float32) for x in inputs])
    found = run(actual, inputs)
    errors = [np.abs(x - y).max() / np.abs(y).max() for x, y in zip(found, right, strict=True)]
    return max(float(error) if np.isfinite(error) else np.inf for error in errors)
