"""Attention with all scores in memory: of all heads at once, or of one head after another."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8

from internvl3_jax.model.ops.masks import MASKED, Mask


def xla_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"] | Int8[Array, "B S K H"],
    v: Float[Array, "B S K H"] | Int8[Array, "B S K H"],
    mask: Mask | None,
    scales: tuple[Float32[Array, "B K S"], Float32[Array, "B K S"]] | None = None,
) -> Float[Array, "B T N H"]:
    """Computes attention of all heads at once. Memory: B * N * T * S float32 scores.

    With `scales`, keys and values are int8 and each is multiplied with its scale: the scores with
    that of their key, the weights with that of their value. No unpacked key is kept in memory.
    """
    if scales is not None:
        k, v = k.astype(q.dtype), v.astype(q.dtype)
    visible = None if mask is None else mask.dense()
    batch, num_queries, heads, width = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads

    # Stack the G query heads of a key head along T, so that one batched product serves them all.
    q = (q * width**-0.5).reshape(batch, num_queries, kv_heads, group, width)
    q = q.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, group * num_queries, width)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bkrh,bksh->bkrs", q, k, preferred_element_type=jnp.float32)
    if scales is not None:
        scores = scores * scales[0][:, :, None]
    if visible is not None:
        scores = scores.reshape(batch, kv_heads, group, num_queries, -1)
        scores = jnp.where(visible[:, None, None], scores, MASKED).reshape(
            batch, kv_heads, group * num_queries, -1
        )

    # Softmax, normalized after the product with v: that divides [T,H] values instead of [T,S].
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    scaled = weights if scales is None else weights * scales[1][:, :, None]
    out = jnp.einsum(
        "bkrs,bksh->bkrh", scaled.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    out = (out / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)
    return out.reshape(batch, heads, num_queries, width).transpose(0, 2, 1, 3)


def xla_attention_per_head(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask | None,
) -> Float[Array, "B T N H"]:
    """Computes attention one head after another. Memory: T * S float32 scores.

    With gradients it holds as many scores as `xla_attention`. On a CPU it is the faster of the two
    from about 128k scores per head.
    """
    visible = None if mask is None else mask.dense()
    batch, num_queries, heads, width = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads

    # For each of the B * N query heads: its row, and its key head among B * K.
    rows = jnp.repeat(jnp.arange(batch), heads)
    kv_indices = (jnp.arange(batch * heads) // heads) * kv_heads + (
        jnp.arange(batch * heads) % heads
    ) // group

    def flatten(x):  # [B,S,K,H] -> [B*K,S,H]
        return x.transpose(0, 2, 1, 3).reshape(-1, x.shape[1], width)

    keys, values = flatten(k), flatten(v)

    def head(inputs):
        query, kv_index, row = inputs
        scores = jnp.einsum("th,sh->ts", query, keys[kv_index], preferred_element_type=jnp.float32)
        if visible is not None:
            scores = jnp.where(visible[row], scores, MASKED)
        # Softmax, normalized after the product with v, as in `xla_attention`.
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        out = jnp.einsum(
            "ts,sh->th",
            weights.astype(values.dtype),
            values[kv_index],
            preferred_element_type=jnp.float32,
        )
        return (out / weights.sum(axis=-1, keepdims=True)).astype(values.dtype)

    out = jax.lax.map(head, (flatten(q * width**-0.5), kv_indices, rows))
    return out.reshape(batch, heads, num_queries, width).transpose(0, 2, 1, 3)
