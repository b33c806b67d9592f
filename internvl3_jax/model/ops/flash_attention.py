"""FlashAttention (Dao et al. 2022) in plain JAX, for every backend.

Scores exist only for one block of queries and one block of keys at a time. Blocks in which no query
sees a key are skipped, so causal rows cost half and packed rows what their samples cost. The
backward pass recomputes the scores from the log-sum-exp of each query (FlashAttention-2, Dao 2023,
whose names are used here: out, lse, delta).

Rows whose tokens are sharded over devices all-gather their keys and values, forward and backward,
or pass them round a ring (Liu et al. 2023, Ring Attention).

Axis letters are those of model/__init__.py, and of blocks: I blocks of c_q queries, J blocks of
c_kv keys, R = G * c_q queries of a block that share a key head.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from internvl3_jax.model.ops.context_parallel import gather_keys
from internvl3_jax.model.ops.masks import MASKED, Mask, block_mask, full_mask, pad_mask
from internvl3_jax.model.ops.remat import checkpoint_name

BLOCK = 512  # queries, and keys, of a block
# Start of a running maximum. exp(MASKED - _LOWEST) is 0, so a query that sees nothing gives zeros.
_LOWEST = MASKED / 2


def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask | None,
    axis: str | None = None,
    ring: bool = False,
    block: int = BLOCK,
) -> Float[Array, "B T N H"]:
    """Computes attention block by block. Memory: N * block * block float32 scores.

    Args:
      axis: Mesh axis, inside a shard_map, that keys are sharded over; None: all keys are local.
      ring: With an axis, pass the shards of the keys round instead of all-gathering them.
      block: Queries, and keys, of a block.
    """
    if mask is None:
        mask = full_mask(q.shape[0], q.shape[1], k.shape[1])
    return _attend(q, k, v, mask, axis, ring and axis is not None, block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(q, k, v, mask, axis, ring, block):
    return _forward(q, k, v, mask, axis, ring, block)[0]


def _forward(q, k, v, mask, axis, ring, block):
    """Returns the output [B,T,N,H] and the log-sum-exp of the scores, f32[B,T,N]."""
    if not ring:
        out, lse = _flash_forward(q, *gather_keys(k, v, mask, axis), block)
        return out.astype(q.dtype), lse

    def merge(_, carry):
        keys, out, lse = carry
        next_keys = _rotate(keys, axis)  # sent while this shard is computed
        shard_out, shard_lse = _flash_forward(q, *_with_keys(mask, keys), block)
        # Outputs over disjoint keys combine by their log-sum-exps.
        total = jnp.logaddexp(lse, shard_lse)
        out = (
            out * jnp.exp(lse - total)[..., None]
            + shard_out * jnp.exp(shard_lse - total)[..., None]
        )
        return next_keys, out, total

    empty = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], _LOWEST)
    carry = (_keys(k, v, mask), *empty)
    _, out, lse = jax.lax.fori_loop(0, jax.lax.axis_size(axis), merge, carry)
    return out.astype(q.dtype), lse


def _attend_fwd(q, k, v, mask, axis, ring, block):
    out, lse = (
        checkpoint_name(x, "attention_output") for x in _forward(q, k, v, mask, axis, ring, block)
    )
    return out, (q, k, v, mask, out, lse)


def _attend_bwd(axis, ring, block, residuals, d_out):
    q, k, v, mask, out, lse = residuals
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis=-1)
    queries = q, lse, delta, d_out
    if not ring:
        d_q, d_k, d_v = _flash_backward(*queries, *gather_keys(k, v, mask, axis), block)
        if axis is not None:
            d_k, d_v = (
                jax.lax.psum_scatter(x, axis, scatter_dimension=1, tiled=True) for x in (d_k, d_v)
            )
        return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None

    def add(_, carry):
        keys, d_q, d_k, d_v = carry
        next_keys = _rotate(keys, axis)
        shard_d_q, shard_d_k, shard_d_v = _flash_backward(*queries, *_with_keys(mask, keys), block)
        # The gradients of a shard travel with it, and are back on its device after a full round.
        d_k, d_v = _rotate((d_k + shard_d_k, d_v + shard_d_v), axis)
        return next_keys, d_q + shard_d_q, d_k, d_v

    carry = (_keys(k, v, mask), *(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)))
    _, d_q, d_k, d_v = jax.lax.fori_loop(0, jax.lax.axis_size(axis), add, carry)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _keys(k, v, mask: Mask):
    """Returns all that belongs to the keys, as it goes round the ring."""
    return k, v, mask.kv_slots, mask.kv_segments, mask.kv_last_query


def _with_keys(mask: Mask, keys):
    k, v, slots, segments, last_query = keys
    shard_mask = dataclasses.replace(
        mask,
        kv_slots=slots,
        kv_segments=segments,
        kv_last_query=last_query,
        self_attention=False,
    )
    return k, v, shard_mask


def _rotate(shard, axis: str):
    """Sends the shard to the next device along `axis` and returns that of the previous one."""
    size = jax.lax.axis_size(axis)
    pairs = [(device, (device + 1) % size) for device in range(size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, pairs), shard)


# --- blocks --------------------------------------------------------------------------------------


class _QueryBlocks(NamedTuple):
    """State of blocks of queries over their keys; the first dimension is B * I."""

    slots: jax.Array  # i32[B*I, c_q]
    segments: jax.Array | None  # i32[B*I, c_q]
    order: jax.Array  # i32[B*I, J], blocks of keys among B * J, the needed ones first
    count: jax.Array  # i32[B*I], the number of needed ones


class _KeyBlocks(NamedTuple):
    """Blocks of keys and values; the first dimension is B * J."""

    k: jax.Array  # [B*J, K, c_kv, H]
    v: jax.Array  # [B*J, K, c_kv, H]
    slots: jax.Array  # i32[B*J, c_kv]
    segments: jax.Array | None  # i32[B*J, c_kv]
    last_query: jax.Array | None  # i32[B*J, c_kv]


def _flash_forward(q, k, v, mask: Mask, block: int):
    """Returns the output f32[B,T,N,H] and the log-sum-exp of the scores, f32[B,T,N]."""
    query_blocks, key_blocks = _make_blocks(q, k, v, mask, block)

    def attend_block(inputs):
        q_block, info = inputs

        # One block of keys: rescale the running sum and output to the new maximum.
        def add(step, carry):
            top, total, out = carry
            index = info.order[step]
            scores = _block_scores(q_block, info, key_blocks, index)
            new_top = jnp.maximum(top, scores.max(axis=-1))
            weights, shrink = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
            block_out = jnp.einsum(
                "krc,kch->krh",
                weights.astype(v.dtype),
                key_blocks.v[index],
                preferred_element_type=jnp.float32,
            )
            total = total * shrink + weights.sum(axis=-1)
            return new_top, total, out * shrink[..., None] + block_out

        empty = (
            jnp.full(q_block.shape[:2], _LOWEST),
            jnp.zeros(q_block.shape[:2]),
            jnp.zeros(q_block.shape),
        )
        top, total, out = jax.lax.fori_loop(0, info.count, add, empty)
        total = jnp.where(total == 0, 1.0, total)
        return out / total[..., None], top + jnp.log(total)

    out, lse = jax.lax.map(attend_block, (_split(q, block, k.shape[2]), query_blocks))
    return _join(out, q.shape[:3]), _join(lse, q.shape[:3])


def _flash_backward(q, lse, delta, d_out, k, v, mask: Mask, block: int):
    """Returns the gradients of q f32[B,T,N,H] and of k and v f32[B,S,K,H].

    delta: f32[B,T,N], the sum of out * d_out over H.
    """
    query_blocks, key_blocks = _make_blocks(q, k, v, mask, block)
    scale = q.shape[-1] ** -0.5

    def attend_block(carry, inputs):
        q_block, lse_block, delta_block, d_out_block, info = inputs

        # One block of keys: recompute its softmax weights, then the three gradients.
        def add(step, carry):
            d_q, d_k, d_v = carry
            index = info.order[step]
            # The softmax weights of the forward pass.
            scores = _block_scores(q_block, info, key_blocks, index)
            weights = jnp.exp(scores - lse_block[..., None])
            d_weights = jnp.einsum(
                "krh,kch->krc", d_out_block, key_blocks.v[index], preferred_element_type=jnp.float32
            )
            d_scores = (weights * (d_weights - delta_block[..., None])).astype(q.dtype)
            # The gradients; d_k and d_v add up over all blocks of queries.
            d_q += jnp.einsum(
                "krc,kch->krh", d_scores, key_blocks.k[index], preferred_element_type=jnp.float32
            )
            block_d_k = jnp.einsum(
                "krc,krh->kch", d_scores, q_block, preferred_element_type=jnp.float32
            )
            block_d_v = jnp.einsum(
                "krc,krh->kch",
                weights.astype(d_out_block.dtype),
                d_out_block,
                preferred_element_type=jnp.float32,
            )
            return d_q, _add_block(d_k, block_d_k, index), _add_block(d_v, block_d_v, index)

        d_q, *carry = jax.lax.fori_loop(0, info.count, add, (jnp.zeros(q_block.shape), *carry))
        return tuple(carry), d_q

    inputs = (*(_split(x, block, k.shape[2]) for x in (q, lse, delta, d_out)), query_blocks)
    zeros = jnp.zeros(key_blocks.k.shape, jnp.float32)
    (d_k, d_v), d_q = jax.lax.scan(attend_block, (zeros, zeros), inputs)
    return _join(d_q * scale, q.shape[:3]), _join(d_k * scale, k.shape[:3]), _join(d_v, v.shape[:3])


def _make_blocks(q, k, v, mask: Mask, block: int) -> tuple[_QueryBlocks, _KeyBlocks]:
    batch, num_queries = q.shape[:2]
    num_keys, kv_heads = k.shape[1:3]
    block_q, block_kv = min(block, num_queries), min(block, num_keys)
    mask = pad_mask(mask, -(-num_queries // block_q) * block_q, -(-num_keys // block_kv) * block_kv)

    # The needed blocks of keys first, numbered among the blocks of all rows.
    needed = block_mask(mask, block_q, block_kv)
    order = (
        jnp.argsort(~needed, axis=-1, stable=True)
        + jnp.arange(batch)[:, None, None] * needed.shape[2]
    )

    def per_block(x, size):
        return None if x is None else x.reshape(-1, size)

    query_blocks = _QueryBlocks(
        per_block(mask.q_slots, block_q),
        per_block(mask.q_segments, block_q),
        order.astype(jnp.int32).reshape(-1, needed.shape[2]),
        needed.sum(axis=-1, dtype=jnp.int32).reshape(-1),
    )
    key_fields = mask.kv_slots, mask.kv_segments, mask.kv_last_query
    key_blocks = _KeyBlocks(
        _split(k, block, kv_heads),
        _split(v, block, kv_heads),
        *(per_block(x, block_kv) for x in key_fields),
    )
    return query_blocks, key_blocks


def _block_scores(q_block, info: _QueryBlocks, keys: _KeyBlocks, index):
    """Returns the masked scores f32[K,R,c_kv] of a block of queries [K,R,H] and key block `index`.

    info: The rows of `_QueryBlocks` of this block.
    """
    k_block = keys.k[index]
    scores = (
        jnp.einsum("krh,kch->krc", q_block, k_block, preferred_element_type=jnp.float32)
        * q_block.shape[-1] ** -0.5
    )
    visible = keys.slots[index][None, :] <= info.slots[:, None]
    if keys.segments is not None:
        visible &= keys.segments[index][None, :] == info.segments[:, None]
    if keys.last_query is not None:
        visible &= info.slots[:, None] <= keys.last_query[index][None, :]
    # The same mask for the G query heads of each key head.
    grouped = scores.reshape(scores.shape[0], -1, *visible.shape)
    return jnp.where(visible[None, None], grouped, MASKED).reshape(scores.shape)


def _split(x, block: int, kv_heads: int):
    """Splits [B,T,N,...] -> [B*I, K, R, ...]; the last block is padded with zeros."""
    batch, length, heads, *rest = x.shape
    block = min(block, length)
    x = jnp.pad(x, ((0, 0), (0, -length % block), *((0, 0),) * (x.ndim - 2)))
    x = x.reshape(batch, -1, block, kv_heads, heads // kv_heads, *rest)
    return jnp.moveaxis(x, 2, 4).reshape(-1, kv_heads, heads // kv_heads * block, *rest)


def _join(x, shape: tuple[int, int, int]):
    """Inverts `_split`: [B*I, K, R, ...] -> [B,T,N,...], `shape` is (B, T, N)."""
    batch, length, heads = shape
    kv_heads = x.shape[1]
    group = heads // kv_heads
    x = x.reshape(batch, -1, kv_heads, group, x.shape[2] // group, *x.shape[3:])
    return jnp.moveaxis(x, 4, 2).reshape(batch, -1, heads, *x.shape[5:])[:, :length]


def _add_block(x, update, index):
    """Adds to block `index` of x, in place inside a loop."""
    return jax.lax.dynamic_update_index_in_dim(x, x[index] + update, index, 0)
