"""One attention function; the rest of the code reaches every implementation through it.

B batch, T queries, S keys, N query heads, K key/value heads (N is a multiple of K), G = N / K, H head width.
"""

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a fully masked (padding) query gives numbers, never NaN
_MAP_HEADS_FROM = 128 * 1024  # scores per head (T * S) from which one head at a time is faster on a CPU


def visibility(q_slots, num_keys: int, q_segments=None, kv_segments=None):
    """Which keys each query may see: bool[B,T,S].

    `q_slots` i32[B,T] is the index of each query's own key; a query sees keys at or before it. Segments (i32, 0 is padding) confine it
    to keys of its own segment. Order in the row decides, not positions: under V2PE positions may be fractional.

        three tokens, plain                    slots 0 1 2                      1 0 0 / 1 1 0 / 1 1 1
        two packed samples of two tokens       slots 0 1 2 3, segments 1 1 2 2  1000 / 1100 / 0010 / 0011
        decoding token 5 into a cache of 8     slots 5                          11111100
    """
    keys = jnp.arange(num_keys, dtype=jnp.int32)
    visible = keys[None, None, :] <= q_slots[:, :, None]
    if q_segments is not None:
        visible &= q_segments[:, :, None] == kv_segments[:, None, :]
    return visible


def attention(q, k, v, visible=None, implementation: str = "auto"):
    """Softmax(q k^T / sqrt(H)) v with a float32 softmax.

    Args:
      q: [B,T,N,H]; k, v: [B,S,K,H] of the same dtype.
      visible: bool[B,T,S] from `visibility`, or None where every query sees every key (the vision tower).
      implementation: "xla" (all scores at once), "heads" (one head at a time: less memory, and faster on CPUs for long
        sequences) or "auto".

    Returns [B,T,N,H] in q's dtype.
    """
    if implementation == "auto":
        large = q.shape[1] * k.shape[1] >= _MAP_HEADS_FROM
        implementation = "heads" if large and jax.default_backend() == "cpu" else "xla"
    if implementation == "xla":
        return _all_heads(q, k, v, visible)
    if implementation == "heads":
        return _head_by_head(q, k, v, visible)
    raise ValueError(f"attention implementation {implementation!r} is not one of auto, xla, heads")


def _all_heads(q, k, v, visible):
    # The G query heads that share a key head are stacked along T, so that one plain batched product serves them all.
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    q = (q * width**-0.5).reshape(batch, length, kv_heads, group, width)
    q = q.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, group * length, width)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bkrh,bksh->bkrs", q, k, preferred_element_type=jnp.float32)
    if visible is not None:
        scores = scores.reshape(batch, kv_heads, group, length, -1)
        scores = jnp.where(visible[:, None, None], scores, MASKED).reshape(batch, kv_heads, group * length, -1)
    # Dividing after the product with v touches [T,H] in place of [T,S].
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    mixed = jnp.einsum("bkrs,bksh->bkrh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    mixed = (mixed / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)
    return mixed.reshape(batch, heads, length, width).transpose(0, 2, 1, 3)


def _head_by_head(q, k, v, visible):
    batch, length, heads, width = q.shape
    group = heads // k.shape[2]
    rows = jnp.repeat(jnp.arange(batch), heads)
    kv_rows = (jnp.arange(batch * heads) // heads) * k.shape[2] + (jnp.arange(batch * heads) % heads) // group

    def flatten(x):  # [B,S,K,H] -> [B*K,S,H]
        return x.transpose(0, 2, 1, 3).reshape(-1, x.shape[1], width)

    keys, values = flatten(k), flatten(v)

    def one(inputs):
        query, kv_row, row = inputs
        scores = jnp.einsum("th,sh->ts", query, keys[kv_row], preferred_element_type=jnp.float32)
        if visible is not None:
            scores = jnp.where(visible[row], scores, MASKED)
        # Dividing after the product with v touches [T,H] in place of [T,S].
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        mixed = jnp.einsum("ts,sh->th", weights.astype(values.dtype), values[kv_row], preferred_element_type=jnp.float32)
        return (mixed / weights.sum(axis=-1, keepdims=True)).astype(values.dtype)

    mixed = jax.lax.map(one, (flatten(q * width**-0.5), kv_rows, rows))
    return mixed.reshape(batch, heads, length, width).transpose(0, 2, 1, 3)
