"""The cache of one new token per row on TPUs: a Pallas kernel that writes in place.

Rows have different lengths, so their slots differ. XLA writes them in a loop over the rows, of
several operations each; for 64 rows that takes longer than the products of a layer. The kernel
copies one tile of slots per row in, replaces the token's slot, and copies the tile back.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from internvl3_jax.model.ops.context_parallel import dividing
from internvl3_jax.parallel.sharding import BATCH_AXES

_TILE_BYTES = 32  # of a column of a TPU's tile: 8 float32 slots, 16 of bfloat16


def is_supported(cache: Float[Array, "B K S H"]) -> bool:
    """Returns whether the slots of a cache are whole tiles."""
    return cache.shape[2] % _tile(cache) == 0


def write_token(
    caches: tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]],
    new: tuple[Float[Array, "B 1 K H"], Float[Array, "B 1 K H"]],
    slots: Int[Array, " B"],
    interpret: bool = False,
) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """Returns the caches of keys and values with one token per row written at its slot.

    Over a mesh rows and heads are sharded as the cache is.

    Args:
      interpret: Emulate the kernel, on any backend.
    """
    # [B,1,K,H] -> [B,K,1,H], the order of the cache
    new = tuple(x.astype(cache.dtype).swapaxes(1, 2) for x, cache in zip(new, caches, strict=True))
    write = functools.partial(_write, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return write(*caches, *new, slots)
    batch, heads = caches[0].shape[:2]
    rows, tensor = dividing(batch, BATCH_AXES), dividing(heads, ("tensor",))
    spec = jax.P(rows, tensor)
    return jax.shard_map(
        write,
        in_specs=(spec, spec, spec, spec, jax.P(rows)),
        out_specs=(spec, spec),
        check_vma=False,
    )(*caches, *new, slots)


def _tile(cache) -> int:
    return _TILE_BYTES // cache.dtype.itemsize


def _write(k_cache, v_cache, k, v, slots, interpret: bool):
    batch, heads, _, width = k_cache.shape
    tile = _tile(k_cache)

    def kernel(slots, k_old, v_old, k, v, k_new, v_new):
        row = slots[pl.program_id(0)] % tile
        is_row = jax.lax.broadcasted_iota(jnp.int32, (1, heads, tile, width), 2) == row
        k_new[...] = jnp.where(is_row, k[...], k_old[...])
        v_new[...] = jnp.where(is_row, v[...], v_old[...])

    tiles = pl.BlockSpec((1, heads, tile, width), lambda b, slots: (b, 0, slots[b] // tile, 0))
    tokens = pl.BlockSpec((1, heads, 1, width), lambda b, slots: (b, 0, 0, 0))
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch,),
            in_specs=[tiles, tiles, tokens, tokens],
            out_specs=[tiles, tiles],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_cache, v_cache)],
        input_output_aliases={1: 0, 2: 1},  # the slots are operand 0
        interpret=interpret,
        name="cache_write",
    )(slots, k_cache, v_cache, k, v)
