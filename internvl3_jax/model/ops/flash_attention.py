"""Flash attention (Dao et al. 2022) in plain JAX, for every backend: no table of scores is larger
than a block of queries by a block of keys.

Blocks in which no query sees a key are not computed, so causal rows cost half, and packed rows what
their segments cost. The backward pass makes the scores again, from the logarithm of each query's
sum of exponentials.

Rows whose tokens are split over devices gather all their keys and values, forward and backward, or
pass them round a ring (Liu et al.
2023).

B batch, T queries, S keys, N query heads, K key/value heads (N is a multiple of K), H head width;
I, J blocks of C queries or D keys, R = N / K * C the queries of a block that share a key head.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from internvl3_jax.model.ops.context_parallel import gather_keys
from internvl3_jax.model.ops.masks import MASKED, Mask, block_mask, full_mask, pad_mask
from internvl3_jax.model.ops.remat import checkpoint_name

BLOCK = 512  # queries, and keys, of a block
# where a running maximum begins: exp(MASKED - _LOWEST) is 0, so a query that sees nothing gives
# zeros
_LOWEST = MASKED / 2


def flash_attention(
    q, k, v, mask: Mask | None, axis: str | None = None, ring: bool = False, block: int = BLOCK
):
    """[B,T,N,H] in q's dtype. Memory: N * C * D float32 scores.

    Args:
      axis: of the mesh, inside a shard_map, that the keys are split over; None where all are here.
      ring: with an axis, the other devices' keys pass by, one part at a time, in place of being
          gathered.
    """
    if mask is None:
        mask = full_mask(q.shape[0], q.shape[1], k.shape[1])
    return _attend(q, k, v, mask, axis, ring and axis is not None, block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(q, k, v, mask, axis, ring, block):
    return _forward(q, k, v, mask, axis, ring, block)[0]


def _forward(q, k, v, mask, axis, ring, block):
    """([B,T,N,H], f32[B,T,N] logarithm of the sums of exponentials)"""
    if not ring:
        mixed, log_sums = _flash_forward(q, *gather_keys(k, v, mask, axis), block)
        return mixed.astype(q.dtype), log_sums

    def merge(_, carry):
        keys, mixed, log_sums = carry
        passed = _pass_on(keys, axis)  # while this part is computed
        more, more_sums = _flash_forward(q, *_with_keys(mask, keys), block)
        total = jnp.logaddexp(log_sums, more_sums)
        mixed = (
            mixed * jnp.exp(log_sums - total)[..., None]
            + more * jnp.exp(more_sums - total)[..., None]
        )
        return passed, mixed, total

    empty = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], _LOWEST)
    carry = (_keys(k, v, mask), *empty)
    _, mixed, log_sums = jax.lax.fori_loop(0, jax.lax.axis_size(axis), merge, carry)
    return mixed.astype(q.dtype), log_sums


def _attend_fwd(q, k, v, mask, axis, ring, block):
    mixed, log_sums = (
        checkpoint_name(x, "attention_output") for x in _forward(q, k, v, mask, axis, ring, block)
    )
    return mixed, (q, k, v, mask, mixed, log_sums)


def _attend_bwd(axis, ring, block, saved, d_mixed):
    q, k, v, mask, mixed, log_sums = saved
    offsets = (mixed.astype(jnp.float32) * d_mixed.astype(jnp.float32)).sum(axis=-1)
    queries = q, log_sums, offsets, d_mixed
    if not ring:
        d_q, d_k, d_v = _flash_backward(*queries, *gather_keys(k, v, mask, axis), block)
        if axis is not None:
            d_k, d_v = (
                jax.lax.psum_scatter(x, axis, scatter_dimension=1, tiled=True) for x in (d_k, d_v)
            )
        return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None

    def add(_, carry):
        keys, d_q, d_k, d_v = carry
        passed = _pass_on(keys, axis)
        more_q, more_k, more_v = _flash_backward(*queries, *_with_keys(mask, keys), block)
        # The gradients of a part travel along with it, and are at home after a whole round.
        d_k, d_v = _pass_on((d_k + more_k, d_v + more_v), axis)
        return passed, d_q + more_q, d_k, d_v

    carry = (_keys(k, v, mask), *(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)))
    _, d_q, d_k, d_v = jax.lax.fori_loop(0, jax.lax.axis_size(axis), add, carry)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _keys(k, v, mask: Mask):
    return k, v, mask.kv_slots, mask.kv_segments, mask.kv_until


def _with_keys(mask: Mask, keys):
    k, v, slots, segments, until = keys
    return (
        k,
        v,
        dataclasses.replace(mask, kv_slots=slots, kv_segments=segments, kv_until=until, own=False),
    )


def _pass_on(part, axis: str):
    """What the device before this one holds."""
    count = jax.lax.axis_size(axis)
    pairs = [(device, (device + 1) % count) for device in range(count)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, pairs), part)


# --- blocks --------------------------------------------------------------------------------------


class _Queries(NamedTuple):
    """What says which blocks of keys a block of queries meets; first dimension B * I."""

    slots: jax.Array  # i32[C]
    segments: jax.Array | None  # i32[C]
    order: jax.Array  # i32[J] blocks of keys among B * J, the needed ones first
    count: jax.Array  # i32[] of those that are needed


def _flash_forward(q, k, v, mask: Mask, block: int):
    """(f32[B,T,N,H], f32[B,T,N] logarithm of the sums of exponentials)"""
    queries, scores, values = _prepare(q, k, v, mask, block)

    def one(inputs):
        query, where = inputs

        def add(number, carry):
            index = where.order[number]
            score = scores(query, where, index)
            top = jnp.maximum(carry[0], score.max(axis=-1))
            weights, shrink = jnp.exp(score - top[..., None]), jnp.exp(carry[0] - top)
            more = jnp.einsum(
                "krc,kch->krh",
                weights.astype(v.dtype),
                values[index],
                preferred_element_type=jnp.float32,
            )
            return (
                top,
                carry[1] * shrink + weights.sum(axis=-1),
                carry[2] * shrink[..., None] + more,
            )

        empty = (
            jnp.full(query.shape[:2], _LOWEST),
            jnp.zeros(query.shape[:2]),
            jnp.zeros(query.shape),
        )
        top, total, mixed = jax.lax.fori_loop(0, where.count, add, empty)
        total = jnp.where(total == 0, 1.0, total)
        return mixed / total[..., None], top + jnp.log(total)

    mixed, log_sums = jax.lax.map(one, (_split(q, block, k.shape[2]), queries))
    return _join(mixed, q.shape[:3]), _join(log_sums, q.shape[:3])


def _flash_backward(q, log_sums, offsets, d_mixed, k, v, mask: Mask, block: int):
    """Gradients f32[B,T,N,H] of q, f32[B,S,K,H] of k and v. `offsets` f32[B,T,N]: sums of mixed *
    d_mixed over H.
    """
    queries, scores, values = _prepare(q, k, v, mask, block)
    keys = _split(k, block, k.shape[2])
    scale = q.shape[-1] ** -0.5

    def one(carry, inputs):
        query, log_sum, offset, d_mix, where = inputs

        def add(number, carry):
            d_query, d_k, d_v = carry
            index = where.order[number]
            weights = jnp.exp(scores(query, where, index) - log_sum[..., None])
            d_weights = jnp.einsum(
                "krh,kch->krc", d_mix, values[index], preferred_element_type=jnp.float32
            )
            d_score = (weights * (d_weights - offset[..., None])).astype(q.dtype)
            d_query += jnp.einsum(
                "krc,kch->krh", d_score, keys[index], preferred_element_type=jnp.float32
            )
            more_k = jnp.einsum("krc,krh->kch", d_score, query, preferred_element_type=jnp.float32)
            more_v = jnp.einsum(
                "krc,krh->kch",
                weights.astype(d_mix.dtype),
                d_mix,
                preferred_element_type=jnp.float32,
            )
            return d_query, _add_at(d_k, more_k, index), _add_at(d_v, more_v, index)

        d_query, *carry = jax.lax.fori_loop(0, where.count, add, (jnp.zeros(query.shape), *carry))
        return tuple(carry), d_query

    inputs = (*(_split(x, block, k.shape[2]) for x in (q, log_sums, offsets, d_mixed)), queries)
    zeros = jnp.zeros(keys.shape, jnp.float32)
    (d_k, d_v), d_q = jax.lax.scan(one, (zeros, zeros), inputs)
    return _join(d_q * scale, q.shape[:3]), _join(d_k * scale, k.shape[:3]), _join(d_v, v.shape[:3])


def _prepare(q, k, v, mask: Mask, block: int):
    """(`_Queries`, a function from a block [K,R,H], its `_Queries` and the index of a block of keys
    to scores f32[K,R,D], values)
    """
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    block_q, block_kv = min(block, length), min(block, k.shape[1])
    mask = pad_mask(mask, -(-length // block_q) * block_q, -(-k.shape[1] // block_kv) * block_kv)
    needed = block_mask(mask, block_q, block_kv)
    order = (
        jnp.argsort(~needed, axis=-1, stable=True)
        + jnp.arange(batch)[:, None, None] * needed.shape[2]
    )

    def per_block(x, size):
        return None if x is None else x.reshape(-1, size)

    queries = _Queries(
        per_block(mask.q_slots, block_q),
        per_block(mask.q_segments, block_q),
        order.astype(jnp.int32).reshape(-1, needed.shape[2]),
        needed.sum(axis=-1, dtype=jnp.int32).reshape(-1),
    )
    keys, values = _split(k, block, kv_heads), _split(v, block, kv_heads)
    slots, segments, until = (
        per_block(x, block_kv) for x in (mask.kv_slots, mask.kv_segments, mask.kv_until)
    )

    def scores(query, where: _Queries, index):
        score = (
            jnp.einsum("krh,kch->krc", query, keys[index], preferred_element_type=jnp.float32)
            * width**-0.5
        )
        visible = slots[index][None, :] <= where.slots[:, None]
        if segments is not None:
            visible &= segments[index][None, :] == where.segments[:, None]
        if until is not None:
            visible &= where.slots[:, None] <= until[index][None, :]
        grouped = score.reshape(kv_heads, heads // kv_heads, block_q, block_kv)
        return jnp.where(visible[None, None], grouped, MASKED).reshape(score.shape)

    return queries, scores, values


def _split(x, block: int, kv_heads: int):
    """[B,T,N,...] -> [B * I, K, R, ...], the last block filled up with zeros"""
    batch, length, heads, *rest = x.shape
    block = min(block, length)
    x = jnp.pad(x, ((0, 0), (0, -length % block), *((0, 0),) * (x.ndim - 2)))
    x = x.reshape(batch, -1, block, kv_heads, heads // kv_heads, *rest)
    return jnp.moveaxis(x, 2, 4).reshape(-1, kv_heads, heads // kv_heads * block, *rest)


def _join(x, shape: tuple[int, int, int]):
    """Back to [B,T,N,...]"""
    batch, length, heads = shape
    kv_heads = x.shape[1]
    group = heads // kv_heads
    x = x.reshape(batch, -1, kv_heads, group, x.shape[2] // group, *x.shape[3:])
    return jnp.moveaxis(x, 4, 2).reshape(batch, -1, heads, *x.shape[5:])[:, :length]


def _add_at(x, more, index):
    """One block changed, in place inside a loop."""
    return jax.lax.dynamic_update_index_in_dim(x, x[index] + more, index, 0)
