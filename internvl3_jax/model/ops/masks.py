"""Who sees whom: a few numbers at every token, from which an implementation makes the table of
queries by keys, or never makes it.

B batch, T queries, S keys.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

MASKED = -1e30  # finite, so that a fully masked (padding) query gives numbers, never NaN
UNREACHABLE = np.iinfo(np.int32).max  # slot of a key that nobody sees


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """A query sees the keys of its own segment whose slot is not beyond its own, nor its own beyond
    the key's `until`. See `cache_mask` and `causal`.
    """

    q_slots: jax.Array  # i32[B,T]
    kv_slots: jax.Array  # i32[B,S]
    q_segments: jax.Array | None = None  # i32[B,T]; None: all the same
    kv_segments: jax.Array | None = None  # i32[B,S]
    # i32[B,S], the last slot that sees each key; None: all later ones do
    kv_until: jax.Array | None = None
    # the keys are the queries' own tokens
    own: bool = dataclasses.field(default=False, metadata={"static": True})
    parts: int = dataclasses.field(
        default=1, metadata={"static": True}
    )  # order of the keys: that of `zigzag`; 1: slot 0, 1, 2 ...

    def dense(self):
        """bool[B,T,S]"""
        visible = self.kv_slots[:, None, :] <= self.q_slots[:, :, None]
        if self.q_segments is not None:
            visible &= self.q_segments[:, :, None] == self.kv_segments[:, None, :]
        if self.kv_until is not None:
            visible &= self.q_slots[:, :, None] <= self.kv_until[:, None, :]
        return visible


def cache_mask(q_slots, num_keys: int, q_segments=None, kv_segments=None) -> Mask:
    """Queries against keys in the slots 0 to num_keys - 1, as a cache has them.

    `q_slots` i32[B,T] is the index of each query's own key; a query sees keys at or before it.
    Segments (i32, 0 is padding) confine it to keys of its own segment. Order in the row decides,
    not positions: under V2PE positions may be fractional.

        three tokens, plain                    slots 0 1 2                      1 0 0 / 1 1 0 / 1 1 1
        two packed samples of two tokens       slots 0 1 2 3, segments 1 1 2 2  1000 / 1100 / 0010 / 0011
        decoding token 5 into a cache of 8     slots 5                          11111100
    """
    kv_slots = jnp.broadcast_to(jnp.arange(num_keys, dtype=jnp.int32), (q_slots.shape[0], num_keys))
    return Mask(q_slots, kv_slots, q_segments, kv_segments)


def causal(shape: tuple[int, int], segments=None, parts: int = 1, until=None) -> Mask:
    """The tokens of rows, shape (B, T), among themselves: each sees those before it in its segment,
    and itself.

    `parts` > 1: the tokens stand in the order of `zigzag`. until: i32[B,T], the last token that
    sees each.
    """
    order = (
        jnp.arange(shape[1], dtype=jnp.int32)
        if parts == 1
        else jnp.asarray(zigzag(shape[1], parts))
    )
    slots = jnp.broadcast_to(order, shape)
    return Mask(slots, slots, segments, segments, until, own=True, parts=parts)


def full_mask(batch: int, queries: int, keys: int) -> Mask:
    """Every query sees every key."""
    return Mask(jnp.zeros((batch, queries), jnp.int32), jnp.zeros((batch, keys), jnp.int32))


def zigzag(length: int, parts: int) -> np.ndarray:
    """i32[length]: the token at each place of a row that is split over `parts` devices, so that
    causal attention is equal work for all.

    The row is cut into 2 * parts pieces; device d has pieces d and 2 * parts - 1 - d, an early and
    a late one.

        length 8, 2 parts      0 1 6 7 | 2 3 4 5
    """
    if parts == 1:
        return np.arange(length, dtype=np.int32)
    if length % (2 * parts):
        raise ValueError(
            f"a row of {length} tokens does not split into 2 x {parts} pieces; its length must be a multiple of {2 * parts}"
        )
    pieces = np.arange(length, dtype=np.int32).reshape(2 * parts, -1)
    return np.stack([pieces[:parts], pieces[: parts - 1 : -1]], axis=1).reshape(length)


def in_order(x, parts: int):
    """x [B,S,...] from the order of `zigzag` to that of the slots."""
    if parts == 1:
        return x
    pieces = x.reshape(x.shape[0], parts, 2, -1, *x.shape[2:])
    return jnp.concatenate([pieces[:, :, 0], pieces[:, ::-1, 1]], axis=1).reshape(x.shape)


def pad_mask(mask: Mask, queries: int, keys: int) -> Mask:
    """The mask with more queries, which see what the last one sees, and more keys, which nobody
    sees.
    """

    def pad(x, length, **how):
        return None if x is None else jnp.pad(x, ((0, 0), (0, length - x.shape[1])), **how)

    return dataclasses.replace(
        mask,
        q_slots=pad(mask.q_slots, queries, mode="edge"),
        kv_slots=pad(mask.kv_slots, keys, constant_values=UNREACHABLE),
        q_segments=pad(mask.q_segments, queries, mode="edge"),
        kv_segments=pad(mask.kv_segments, keys, mode="edge"),
        kv_until=pad(mask.kv_until, keys, constant_values=UNREACHABLE),
    )


def block_mask(mask: Mask, block_q: int, block_kv: int):
    """bool[B, T / block_q, S / block_kv]: False where no query of a block sees a key of the other.

    Judged by the lowest and highest slots and segments of the blocks: exact enough for rows whose
    segments ascend, as packed ones do.
    """

    def extremes(x, block):
        x = x.reshape(x.shape[0], -1, block)
        return x.min(axis=-1), x.max(axis=-1)

    _, q_last = extremes(mask.q_slots, block_q)
    kv_first, _ = extremes(mask.kv_slots, block_kv)
    needed = kv_first[:, None, :] <= q_last[:, :, None]
    if mask.q_segments is not None:
        # Padding, 0, stands at the end of a row.
        (q_low, q_high), (kv_low, kv_high) = (
            extremes(jnp.where(x == 0, UNREACHABLE, x), block)
            for x, block in ((mask.q_segments, block_q), (mask.kv_segments, block_kv))
        )
        needed &= (q_low[:, :, None] <= kv_high[:, None, :]) & (
            kv_low[:, None, :] <= q_high[:, :, None]
        )
    return needed
