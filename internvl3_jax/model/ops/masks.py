"""Attention masks as per-token slot and segment ids.

A query sees a key of its own segment whose slot is not greater than its own. Each backend either
materializes the bool[B,T,S] table (`Mask.dense`) or evaluates the ids block by block
(`block_mask`), so that long rows never need the table.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped

MASKED = -1e30  # finite: a fully masked (padding) query gives numbers, never NaN
UNREACHABLE = np.iinfo(np.int32).max  # slot of a key that no query sees


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys each query sees; made by `causal_mask`, `cache_mask` or `full_mask`.

    Array fields hold arrays, or the arrays' PartitionSpecs where a mask describes a sharding.

    Attributes:
      q_slots: i32[B,T], the slot of each query in its row.
      kv_slots: i32[B,S], the slot of each key.
      q_segments: i32[B,T], the sample that each query belongs to; None: one sample per row.
      kv_segments: i32[B,S], the same of the keys.
      kv_last_query: i32[B,S], the last slot that sees each key; None: all later slots do.
      self_attention: The keys are the queries' own tokens.
      context_shards: The order of the tokens is `zigzag(T, context_shards)`; 1 is plain order.
      max_segments: No row has more segments than this, padding aside; 0: there is no such limit.
    """

    q_slots: Any
    kv_slots: Any
    q_segments: Any = None
    kv_segments: Any = None
    kv_last_query: Any = None
    self_attention: bool = dataclasses.field(default=False, metadata={"static": True})
    context_shards: int = dataclasses.field(default=1, metadata={"static": True})
    max_segments: int = dataclasses.field(default=0, metadata={"static": True})

    def dense(self) -> Bool[Array, "B T S"]:
        """Returns the mask as a table: whether query t sees key s."""
        visible = self.kv_slots[:, None, :] <= self.q_slots[:, :, None]
        if self.q_segments is not None:
            visible &= self.q_segments[:, :, None] == self.kv_segments[:, None, :]
        if self.kv_last_query is not None:
            visible &= self.q_slots[:, :, None] <= self.kv_last_query[:, None, :]
        return visible


def cache_mask(
    q_slots: Int[Array | np.ndarray, "B T"],
    num_keys: int,
    q_segments: Int[Array | np.ndarray, "B T"] | None = None,
    kv_segments: Int[Array | np.ndarray, "B S"] | None = None,
) -> Mask:
    """Returns the mask of queries against a cache, whose keys are in slots 0 to num_keys - 1.

    A query sees the keys at or before its own slot. Segments (0 is padding) restrict it to keys of
    its own segment. The order in the row decides, not the positions, which may be fractional under
    V2PE.

        three tokens, plain                    slots 0 1 2                      100 / 110 / 111
        two packed samples of two tokens       slots 0 1 2 3, segments 1 1 2 2  1000/1100/0010/0011
        decoding token 5 into a cache of 8     slots 5                          11111100

    Args:
      q_slots: The slot of each query's own key.
      num_keys: Slots of the cache.
    """
    kv_slots = jnp.broadcast_to(jnp.arange(num_keys, dtype=jnp.int32), (q_slots.shape[0], num_keys))
    return Mask(q_slots, kv_slots, q_segments, kv_segments)


def causal_mask(
    shape: tuple[int, int],
    segments: Int[Array | np.ndarray, "B T"] | None = None,
    context_shards: int = 1,
    last_query: Int[Array | np.ndarray, "B T"] | None = None,
    max_segments: int = 0,
) -> Mask:
    """Returns the causal mask of rows: a token sees itself and earlier tokens of its segment.

    Args:
      shape: (B, T).
      context_shards: Above 1, the tokens are in the order of `zigzag(T, context_shards)`.
      last_query: The last token that sees each token; None: all later ones of its segment do.
      max_segments: No row has more segments than this; 0: there is no such limit.
    """
    if context_shards == 1:
        order = jnp.arange(shape[1], dtype=jnp.int32)
    else:
        order = jnp.asarray(zigzag(shape[1], context_shards))
    slots = jnp.broadcast_to(order, shape)
    return Mask(
        slots,
        slots,
        segments,
        segments,
        last_query,
        self_attention=True,
        context_shards=context_shards,
        max_segments=max_segments,
    )


def full_mask(batch: int, num_queries: int, num_keys: int) -> Mask:
    """Returns the mask in which every query sees every key."""
    return Mask(jnp.zeros((batch, num_queries), jnp.int32), jnp.zeros((batch, num_keys), jnp.int32))


def zigzag(length: int, shards: int) -> Int[np.ndarray, " length"]:
    """Returns the token at each place of a row sharded over `shards` devices, in balanced order.

    The row is cut into 2 * shards pieces. Device d holds pieces d and 2 * shards - 1 - d, an early
    and a late one, so that causal attention is the same work on every device.

        length 8, 2 shards     0 1 6 7 | 2 3 4 5

    Raises:
      ValueError: The row does not divide into the pieces.
    """
    if shards == 1:
        return np.arange(length, dtype=np.int32)
    if length % (2 * shards):
        raise ValueError(
            f"a row of {length} tokens does not split into 2 x {shards} pieces; its length must be "
            f"a multiple of {2 * shards}"
        )
    pieces = np.arange(length, dtype=np.int32).reshape(2 * shards, -1)
    return np.stack([pieces[:shards], pieces[: shards - 1 : -1]], axis=1).reshape(length)


def undo_zigzag(x: Shaped[Array, "B S *rest"], shards: int) -> Shaped[Array, "B S *rest"]:
    """Reorders the keys of x from the order of `zigzag` to that of the slots."""
    if shards == 1:
        return x
    pieces = x.reshape(x.shape[0], shards, 2, -1, *x.shape[2:])
    return jnp.concatenate([pieces[:, :, 0], pieces[:, ::-1, 1]], axis=1).reshape(x.shape)


def pad_mask(mask: Mask, num_queries: int, num_keys: int) -> Mask:
    """Pads a mask to the given sizes.

    Added queries see what the last query sees. No query sees an added key.
    """

    def pad(x, length, **options):
        return None if x is None else jnp.pad(x, ((0, 0), (0, length - x.shape[1])), **options)

    return dataclasses.replace(
        mask,
        q_slots=pad(mask.q_slots, num_queries, mode="edge"),
        kv_slots=pad(mask.kv_slots, num_keys, constant_values=UNREACHABLE),
        q_segments=pad(mask.q_segments, num_queries, mode="edge"),
        kv_segments=pad(mask.kv_segments, num_keys, mode="edge"),
        kv_last_query=pad(mask.kv_last_query, num_keys, constant_values=UNREACHABLE),
    )


def block_mask(mask: Mask, block_q: int, block_kv: int) -> Bool[Array, "B q_blocks kv_blocks"]:
    """Returns which blocks of keys each block of queries needs.

    False where no query of a block sees a key of the other. The decision compares the lowest and
    highest slots and segments of two blocks. That is exact for rows whose segments ascend, as
    packed rows do, and never drops a block that is needed.
    """

    def extremes(x, block):
        x = x.reshape(x.shape[0], -1, block)
        return x.min(axis=-1), x.max(axis=-1)

    # Causality: the first key of a block is not beyond the last query.
    _, q_last = extremes(mask.q_slots, block_q)
    kv_first, _ = extremes(mask.kv_slots, block_kv)
    needed = kv_first[:, None, :] <= q_last[:, :, None]

    # Segments: the ranges of the two blocks overlap. Padding (0) is at the end of a row.
    if mask.q_segments is not None:
        (q_low, q_high), (kv_low, kv_high) = (
            extremes(jnp.where(x == 0, UNREACHABLE, x), block)
            for x, block in ((mask.q_segments, block_q), (mask.kv_segments, block_kv))
        )
        needed &= (q_low[:, :, None] <= kv_high[:, None, :]) & (
            kv_low[:, None, :] <= q_high[:, :, None]
        )
    return needed
