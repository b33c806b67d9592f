"""Attention on a mesh: rows or tiles, heads, and the tokens of a row sharded over its devices.

Each device runs the function that a single device would run, on fewer rows and heads. Where the
tokens of a row are sharded over "context", the function gets that axis and fetches the other keys
itself. Sharded rows have their tokens in zigzag order (`masks.zigzag`), so that causal attention is
the same work on every device.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from internvl3_jax.model.ops.masks import Mask
from internvl3_jax.parallel.collectives import axis_size
from internvl3_jax.parallel.sharding import BATCH_AXES, TILE_AXES

CONTEXT = "context"


def over_mesh(
    attend: Callable,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask | None,
) -> Float[Array, "B T N H"]:
    """Runs attend(q, k, v, mask, axis) on each device's shards, or once where there is no mesh.

    With a mask (decoder) rows are sharded over BATCH_AXES, heads over "tensor" and tokens over
    "context". Without one (vision tower) tiles are sharded over TILE_AXES and heads are not.
    Dimensions that do not divide are replicated. `axis` is "context" where keys are sharded over
    it, and None where every device has all keys of its rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return attend(q, k, v, mask, None)
    if mask is None:
        spec = jax.P(dividing(q.shape[0], TILE_AXES))
        attend = functools.partial(attend, mask=None, axis=None)
        return jax.shard_map(attend, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)(
            q, k, v
        )

    # Tokens are sharded where they divide; a cache's keys never are.
    rows, tokens = dividing(q.shape[0], BATCH_AXES), dividing(q.shape[1], (CONTEXT,))
    keys = tokens if mask.self_attention else None
    axis = CONTEXT if keys and axis_size(CONTEXT) > 1 else None
    mask_specs = Mask(
        jax.P(rows, tokens),
        jax.P(rows, keys),
        None if mask.q_segments is None else jax.P(rows, tokens),
        None if mask.kv_segments is None else jax.P(rows, keys),
        None if mask.kv_last_query is None else jax.P(rows, keys),
        self_attention=mask.self_attention,
        context_shards=mask.context_shards,
        max_segments=mask.max_segments,
    )

    # Heads always divide: padded and repeated where they must be, and cut again afterwards.
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    tensor = "tensor" if axis_size("tensor") > 1 else None
    if tensor:
        q, k, v = pad_heads(q, k, v, axis_size(tensor))
    q_spec, kv_spec = jax.P(rows, tokens, tensor), jax.P(rows, keys, tensor)
    out = jax.shard_map(
        functools.partial(attend, axis=axis),
        in_specs=(q_spec, kv_spec, kv_spec, mask_specs),
        out_specs=q_spec,
        check_vma=False,
    )(q, k, v, mask)
    if out.shape[2] == heads:
        return out
    out = out.reshape(*out.shape[:2], heads // group, -1, out.shape[3])
    return out[:, :, :, :group].reshape(*out.shape[:2], heads, -1)


def dividing(size: int, axes: tuple[str, ...]):
    """Returns the axes that a dimension is sharded over; None where they do not divide it."""
    mesh = jax.sharding.get_abstract_mesh()
    names = tuple(name for name in axes if name in mesh.axis_names)
    return names if names and size % math.prod(mesh.shape[name] for name in names) == 0 else None


def pad_heads(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], shards: int
) -> tuple[Float[Array, "B T N2 H"], Float[Array, "B S K2 H"], Float[Array, "B S K2 H"]]:
    """Pads heads so that they divide over `shards` devices, with key heads next to their queries.

    Key heads are repeated where there are too few. The query heads of each key head are padded with
    zeros to a multiple of the repeats.

        14 and 2 heads, 4 devices   2 key heads twice, 8 query heads each: 4 query heads per device
        28 and 4 heads, 4 devices   unchanged: 7 query heads per device
    """
    kv_heads, group = k.shape[2], q.shape[2] // k.shape[2]
    repeats = shards // math.gcd(kv_heads, shards)
    if repeats == 1:
        return q, k, v
    q = q.reshape(*q.shape[:2], kv_heads, group, q.shape[3])
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, -group % repeats), (0, 0)))
    q = q.reshape(*q.shape[:2], -1, q.shape[4])
    return q, jnp.repeat(k, repeats, axis=2), jnp.repeat(v, repeats, axis=2)


def gather_keys(k, v, mask: Mask, axis: str | None):
    """All-gathers keys, values and the mask's key fields of whole rows over `axis`, in a shard_map.

    Returns (k, v, mask) unchanged if axis is None.
    """
    if axis is None:
        return k, v, mask

    def gather(x):
        return None if x is None else jax.lax.all_gather(x, axis, axis=1, tiled=True)

    key_fields = ("kv_slots", "kv_segments", "kv_last_query")
    gathered = {name: gather(getattr(mask, name)) for name in key_fields}
    return gather(k), gather(v), dataclasses.replace(mask, **gathered, self_attention=False)


# --- zigzag order --------------------------------------------------------------------------------


def num_context_shards(length: int) -> int:
    """Returns `context_shards` for `causal_mask`, of rows of `length` tokens under the mesh.

    1 where the pieces of the zigzag order would not divide the row.
    """
    shards = axis_size(CONTEXT)
    return shards if length % (2 * shards) == 0 else 1


def to_zigzag(x: Shaped[Array, "B T *rest"], shards: int) -> Shaped[Array, "B T *rest"]:
    """Reorders tokens to `masks.zigzag`; each device sends the tokens that move to another one.

    Args:
      shards: As `num_context_shards` returns it.
    """
    return x if shards == 1 else _exchange(x, _to_zigzag)


def from_zigzag(x: Shaped[Array, "B T *rest"], shards: int) -> Shaped[Array, "B T *rest"]:
    """Reorders tokens from `masks.zigzag` to the order of the row."""
    return x if shards == 1 else _exchange(x, _from_zigzag)


def _exchange(x, exchange):
    spec = jax.P(dividing(x.shape[0], BATCH_AXES), CONTEXT)
    return jax.shard_map(exchange, in_specs=spec, out_specs=spec, check_vma=False)(x)


def _destinations(shards: int) -> list[list[tuple[int, int]]]:
    """Returns (sender, receiver) pairs for the first and for the second piece of each device."""
    return [
        [(d, min(2 * d + half, 2 * shards - 1 - (2 * d + half))) for d in range(shards)]
        for half in (0, 1)
    ]


def _to_zigzag(x):
    # In row order device d has the pieces 2 d (even) and 2 d + 1 (odd); send each to its device.
    shards = jax.lax.axis_size(CONTEXT)
    even, odd = (
        jax.lax.ppermute(piece, CONTEXT, pairs)
        for piece, pairs in zip(jnp.split(x, 2, axis=1), _destinations(shards), strict=True)
    )
    # Device d now has the pieces d and 2 * shards - 1 - d, one of which is even.
    is_even = jax.lax.axis_index(CONTEXT) % 2 == 0
    return jnp.where(
        is_even, jnp.concatenate([even, odd], axis=1), jnp.concatenate([odd, even], axis=1)
    )


def _from_zigzag(x):
    shards = jax.lax.axis_size(CONTEXT)
    early, late = jnp.split(x, 2, axis=1)
    is_even = jax.lax.axis_index(CONTEXT) % 2 == 0
    pieces = jnp.where(is_even, early, late), jnp.where(is_even, late, early)
    back = [[(receiver, sender) for sender, receiver in pairs] for pairs in _destinations(shards)]
    return jnp.concatenate(
        [
            jax.lax.ppermute(piece, CONTEXT, pairs)
            for piece, pairs in zip(pieces, back, strict=True)
        ],
        axis=1,
    )
