"""Key/value cache: a list with one {"k", "v"} of [B,S,K,H] per layer.

The decoder takes the cache and returns the updated one. Each layer has a buffer of its own: a
single stacked array would be copied at every decoding step.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from internvl3_jax.config import LanguageConfig
from internvl3_jax.parallel.collectives import constrain
from internvl3_jax.parallel.sharding import BATCH_AXES

# [B,S,K,H] each. Rows and slots are not bound, since `grow` and `repeat` change them.
LayerCache = dict[str, Float[Array, "_ _ K H"]]
Cache = list[LayerCache]


def init_cache(
    config: LanguageConfig, batch: int, slots: int, dtype: DTypeLike = jnp.float32
) -> Cache:
    """Returns an empty cache for `batch` rows of up to `slots` tokens."""
    shape = (batch, slots, config.num_kv_heads, config.head_dim)
    return [
        {"k": _shard(jnp.zeros(shape, dtype)), "v": _shard(jnp.zeros(shape, dtype))}
        for _ in range(config.num_layers)
    ]


def _shard(x: Float[Array, "B S K H"]) -> Float[Array, "B S K H"]:
    """Shards rows and heads over the mesh in context, as far as they divide."""
    return constrain(x, BATCH_AXES, None, "tensor", None)


def write(
    layer: LayerCache,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    slots: Int[Array, "B T"],
) -> LayerCache:
    """Writes k and v into the slots of a layer's cache.

    The slots of each row are consecutive. The caller keeps slots + T within the buffer: JAX would
    silently shift an update that is not.
    """

    def write_row(buffer, new, start):
        return jax.lax.dynamic_update_slice(buffer, new.astype(buffer.dtype), (start, 0, 0))

    start = slots[:, 0]
    return {
        name: _shard(jax.vmap(write_row)(layer[name], new, start))
        for name, new in (("k", k), ("v", v))
    }


def grow(cache: Cache, slots: int) -> Cache:
    """Pads the cache to `slots` tokens per row."""

    def pad(x):
        return jnp.pad(x, ((0, 0), (0, slots - x.shape[1]), (0, 0), (0, 0)))

    return jax.tree.map(pad, cache)


def repeat(cache: Cache, copies: int) -> Cache:
    """Repeats each row `copies` times, one after the other: [B,S,K,H] -> [B*copies,S,K,H]."""
    return jax.tree.map(lambda x: _shard(jnp.repeat(x, copies, axis=0)), cache)
