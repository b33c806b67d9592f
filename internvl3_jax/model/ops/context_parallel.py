"""Attention's parts on the devices of a mesh: rows or tiles, heads, and the tokens of a row.

What runs on each device is the same function as on a single one, of fewer rows and heads; where a
row's tokens are split, it is told the mesh axis over which it finds the other keys.

B rows, T queries, S keys, N query heads, K key/value heads (N is a multiple of K), H head width.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from internvl3_jax.model.ops.masks import Mask
from internvl3_jax.parallel.sharding import BATCH_AXES, TILE_AXES, axis_size

CONTEXT = "context"


def over_mesh(local, q, k, v, mask: Mask | None):
    """local(q, k, v, mask, axis) of each device's part; of the whole where no mesh is in context.

    With a mask (the decoder) rows are split over BATCH_AXES, heads over "tensor" and tokens over
    "context"; without (the vision tower)
    tiles over TILE_AXES, and heads stay together. Rows, tiles or tokens that do not divide stay
    whole. `axis` is "context" where keys and values are split, None where every device has all
    those of its rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return local(q, k, v, mask, None)
    if mask is None:
        spec = jax.P(_dividing(q.shape[0], TILE_AXES))
        part = functools.partial(local, mask=None, axis=None)
        return jax.shard_map(part, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)(
            q, k, v
        )
    rows, tokens = _dividing(q.shape[0], BATCH_AXES), _dividing(q.shape[1], (CONTEXT,))
    keys = tokens if mask.own else None
    # A part's keys are no longer all of its queries' row.
    axis = CONTEXT if keys and axis_size(CONTEXT) > 1 else None
    masks = Mask(
        jax.P(rows, tokens),
        jax.P(rows, keys),
        None if mask.q_segments is None else jax.P(rows, tokens),
        None if mask.kv_segments is None else jax.P(rows, keys),
        None if mask.kv_until is None else jax.P(rows, keys),
        own=mask.own,
        parts=mask.parts,
    )
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    tensor = "tensor" if axis_size("tensor") > 1 else None
    if tensor:
        q, k, v = spread_heads(q, k, v, axis_size(tensor))
    q_spec, kv_spec = jax.P(rows, tokens, tensor), jax.P(rows, keys, tensor)
    part = functools.partial(local, axis=axis)
    mixed = jax.shard_map(
        part, in_specs=(q_spec, kv_spec, kv_spec, masks), out_specs=q_spec, check_vma=False
    )(q, k, v, mask)
    if mixed.shape[2] == heads:
        return mixed
    mixed = mixed.reshape(*mixed.shape[:2], heads // group, -1, mixed.shape[3])
    return mixed[:, :, :, :group].reshape(*mixed.shape[:2], heads, -1)


def _dividing(size: int, axes: tuple[str, ...]):
    """The axes of the mesh that a dimension is split over; None where it does not divide, as
    `sharding.constrain`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = tuple(name for name in axes if name in mesh.axis_names)
    return names if names and size % math.prod(mesh.shape[name] for name in names) == 0 else None


def spread_heads(q, k, v, parts: int):
    """q [B,T,N,H], k and v [B,S,K,H] with heads that split evenly over `parts` devices, each with
    the key heads of its query heads.

    Key heads are repeated where they are too few, and the query heads of each are filled up with
    zeros to a multiple of the repeats:

        14 heads on 2, 4 devices      2 key heads twice, 8 query heads to each 2    4 query heads a device in place of 3.5
        28 heads on 4, 4 devices      as they are                                   7 query heads a device
    """
    kv_heads, group = k.shape[2], q.shape[2] // k.shape[2]
    repeats = parts // math.gcd(kv_heads, parts)
    if repeats == 1:
        return q, k, v
    q = q.reshape(*q.shape[:2], kv_heads, group, q.shape[3])
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, -group % repeats), (0, 0)))
    q = q.reshape(*q.shape[:2], -1, q.shape[4])
    return q, jnp.repeat(k, repeats, axis=2), jnp.repeat(v, repeats, axis=2)


def gather_keys(k, v, mask: Mask, axis: str | None):
    """Keys, values and mask with the whole rows' keys from the parts of each device along `axis`."""
    if axis is None:
        return k, v, mask

    def whole(x):
        return None if x is None else jax.lax.all_gather(x, axis, axis=1, tiled=True)

    of_keys = {name: whole(getattr(mask, name)) for name in ("kv_slots", "kv_segments", "kv_until")}
    mask = dataclasses.replace(mask, **of_keys, own=False)
    return whole(k), whole(v), mask


# --- the order of a row's tokens -----------------------------------------------------------------


def row_parts(length: int) -> int:
    """What to give `causal` for rows of so many tokens under the mesh in context, after
    `to_zigzag`.
    """
    parts = axis_size(CONTEXT)
    return parts if length % (2 * parts) == 0 else 1


def to_zigzag(x, parts: int):
    """x [B,T,...] to the order of `masks.zigzag`, each device sending what others are to have.
    `parts` is that of `row_parts`.
    """
    return x if parts == 1 else _exchange(x, _to_zigzag)


def from_zigzag(x, parts: int):
    """Back to the order of the row."""
    return x if parts == 1 else _exchange(x, _from_zigzag)


def _exchange(x, local):
    spec = jax.P(_dividing(x.shape[0], BATCH_AXES), CONTEXT)
    return jax.shard_map(local, in_specs=spec, out_specs=spec, check_vma=False)(x)


def _destinations(parts: int) -> list[list[tuple[int, int]]]:
    """Of the first and of the second piece of each device's two: (sender, receiver)."""
    return [
        [(d, min(2 * d + half, 2 * parts - 1 - (2 * d + half))) for d in range(parts)]
        for half in (0, 1)
    ]


def _to_zigzag(x):
    parts = jax.lax.axis_size(CONTEXT)
    even, odd = (
        jax.lax.ppermute(piece, CONTEXT, pairs)
        for piece, pairs in zip(jnp.split(x, 2, axis=1), _destinations(parts), strict=True)
    )
    # Device d has the pieces d and 2 * parts - 1 - d, of which one is even.
    is_even = jax.lax.axis_index(CONTEXT) % 2 == 0
    return jnp.where(
        is_even, jnp.concatenate([even, odd], axis=1), jnp.concatenate([odd, even], axis=1)
    )


def _from_zigzag(x):
    parts = jax.lax.axis_size(CONTEXT)
    early, late = jnp.split(x, 2, axis=1)
    is_even = jax.lax.axis_index(CONTEXT) % 2 == 0
    pieces = jnp.where(is_even, early, late), jnp.where(is_even, late, early)
    back = [[(receiver, sender) for sender, receiver in pairs] for pairs in _destinations(parts)]
    return jnp.concatenate(
        [
            jax.lax.ppermute(piece, CONTEXT, pairs)
            for piece, pairs in zip(pieces, back, strict=True)
        ],
        axis=1,
    )
