"""Key/value cache: a list with one {"k", "v"} of [B,S,K,H] per layer, passed into the decoder and
returned by it.

One buffer per layer: a single stacked array would be copied at every decoding step. B rows, S
slots, K key/value heads, H head width.
"""

import jax
import jax.numpy as jnp

from internvl3_jax.config import LanguageConfig
from internvl3_jax.parallel.sharding import BATCH_AXES, constrain

Cache = list[dict[str, jax.Array]]


def init_cache(config: LanguageConfig, batch: int, slots: int, dtype=jnp.float32) -> Cache:
    shape = (batch, slots, config.num_kv_heads, config.head_dim)
    return [
        {"k": _placed(jnp.zeros(shape, dtype)), "v": _placed(jnp.zeros(shape, dtype))}
        for _ in range(config.num_layers)
    ]


def _placed(x):
    """Rows and heads over the mesh in context, as far as they divide."""
    return constrain(x, BATCH_AXES, None, "tensor", None)


def cache_bytes(config: LanguageConfig, slots: int, bytes_per_value: int = 2) -> int:
    """Bytes of one row of `slots` tokens, bf16 by default."""
    return 2 * config.num_layers * slots * config.num_kv_heads * config.head_dim * bytes_per_value


def write(layer: dict, k, v, slots):
    """Puts k, v [B,T,K,H] at slots i32[B,T]; each row's slots are consecutive. The caller keeps
    slots + T within the buffer.
    """

    def row(buffer, new, start):
        return jax.lax.dynamic_update_slice(buffer, new.astype(buffer.dtype), (start, 0, 0))

    start = slots[:, 0]
    return {
        name: _placed(jax.vmap(row)(layer[name], new, start)) for name, new in (("k", k), ("v", v))
    }


def grow(cache: Cache, slots: int) -> Cache:
    """The same cache with room for `slots` tokens."""

    def pad(x):
        return jnp.pad(x, ((0, 0), (0, slots - x.shape[1]), (0, 0), (0, 0)))

    return jax.tree.map(pad, cache)


def repeat(cache: Cache, copies: int) -> Cache:
    """Each row `copies` times, one after the other: [B,S,K,H] -> [B * copies,S,K,H]."""
    return jax.tree.map(lambda x: _placed(jnp.repeat(x, copies, axis=0)), cache)
