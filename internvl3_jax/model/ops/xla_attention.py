"""Attention with whole tables of scores: all heads at once, or one head at a time.

B batch, T queries, S keys, N query heads, K key/value heads (N is a multiple of K), G = N / K, H
head width.
"""

import jax
import jax.numpy as jnp

from internvl3_jax.model.ops.masks import MASKED, Mask


def xla_attention(q, k, v, mask: Mask | None):
    """[B,T,N,H] in q's dtype. Memory: B * N * T * S float32 scores."""
    visible = None if mask is None else mask.dense()
    # The G query heads that share a key head are stacked along T, so that one plain batched product
    # serves them all.
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    q = (q * width**-0.5).reshape(batch, length, kv_heads, group, width)
    q = q.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, group * length, width)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bkrh,bksh->bkrs", q, k, preferred_element_type=jnp.float32)
    if visible is not None:
        scores = scores.reshape(batch, kv_heads, group, length, -1)
        scores = jnp.where(visible[:, None, None], scores, MASKED).reshape(
            batch, kv_heads, group * length, -1
        )
    # Dividing after the product with v touches [T,H] in place of [T,S].
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    mixed = jnp.einsum(
        "bkrs,bksh->bkrh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    mixed = (mixed / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)
    return mixed.reshape(batch, heads, length, width).transpose(0, 2, 1, 3)


def xla_attention_per_head(q, k, v, mask: Mask | None):
    """The same with T * S float32 scores; as many as `all_heads` where gradients follow. On a CPU
    faster from about 128k scores on.
    """
    visible = None if mask is None else mask.dense()
    batch, length, heads, width = q.shape
    group = heads // k.shape[2]
    rows = jnp.repeat(jnp.arange(batch), heads)
    kv_rows = (jnp.arange(batch * heads) // heads) * k.shape[2] + (
        jnp.arange(batch * heads) % heads
    ) // group

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
        mixed = jnp.einsum(
            "ts,sh->th",
            weights.astype(values.dtype),
            values[kv_row],
            preferred_element_type=jnp.float32,
        )
        return (mixed / weights.sum(axis=-1, keepdims=True)).astype(values.dtype)

    mixed = jax.lax.map(one, (flatten(q * width**-0.5), kv_rows, rows))
    return mixed.reshape(batch, heads, length, width).transpose(0, 2, 1, 3)
