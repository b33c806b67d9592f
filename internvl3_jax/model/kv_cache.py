"""Key/value cache: a list with one {"k", "v"} of [B,K,S,H] per layer.

The decoder takes the cache and returns the updated one. Each layer has a buffer of its own: a
single stacked array would be copied at every decoding step. Heads come before slots, as the
products of decoding take them: otherwise a GPU would transpose the whole cache in every call.

An int8 cache has "k_scale" and "v_scale" f32[B,K,S], too: a vector of H values is stored as
x / scale, with scale = max(abs(x)) / 127.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int8, Shaped

from internvl3_jax.config import LanguageConfig
from internvl3_jax.parallel.collectives import constrain, platform
from internvl3_jax.parallel.sharding import BATCH_AXES

# [B,K,S,H] each, scales [B,K,S]. `grow` and `repeat` change rows and slots.
LayerCache = dict[str, Shaped[Array, "_ K _ *H"]]
Cache = list[LayerCache]


def init_cache(
    config: LanguageConfig, batch: int, slots: int, dtype: DTypeLike = jnp.float32
) -> Cache:
    """Returns an empty cache for `batch` rows of up to `slots` tokens; int8 has scales."""
    shape = (batch, config.num_kv_heads, slots, config.head_dim)
    leaves = dict.fromkeys(("k", "v"), (shape, dtype))
    if jnp.dtype(dtype) == jnp.int8:
        leaves |= dict.fromkeys(("k_scale", "v_scale"), (shape[:3], jnp.float32))
    return [
        {name: _shard(jnp.zeros(*leaf)) for name, leaf in leaves.items()}
        for _ in range(config.num_layers)
    ]


def num_slots(cache: Cache) -> int:
    """Returns the slots of each row."""
    return cache[0]["k"].shape[2]


def is_int8(layer: LayerCache) -> bool:
    """Returns whether a layer's cache has scales."""
    return "k_scale" in layer


def _shard(x: Shaped[Array, "B K S *H"]) -> Shaped[Array, "B K S *H"]:
    """Shards rows and heads over the mesh in context, as far as they divide."""
    return constrain(x, BATCH_AXES, "tensor", *(None,) * (x.ndim - 2))


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
    start, added = slots[:, 0], {"k": k, "v": v}
    if is_int8(layer):
        added = _quantized("k", k) | _quantized("v", v)
    if slots.shape[1] == 1 and platform() == "tpu":
        # Importing Pallas takes a quarter of a second.
        from internvl3_jax.model.ops import tpu_cache_write

        if tpu_cache_write.is_supported(layer["k"]):
            return _written_on_tpu(layer, added, start, tpu_cache_write.write_token)

    def write_row(buffer, new, start):
        new = new.astype(buffer.dtype).swapaxes(0, 1)
        return jax.lax.dynamic_update_slice(buffer, new, (0, start, *(0,) * (new.ndim - 2)))

    return {
        name: _shard(jax.vmap(write_row)(layer[name], new, start)) for name, new in added.items()
    }


def _written_on_tpu(
    layer: LayerCache, added: dict[str, Array], start: Int[Array, " B"], write_token: Callable
) -> LayerCache:
    """Writes keys and values of one token per row in place, and selects the scales, which are few."""
    k, v = write_token((layer["k"], layer["v"]), (added["k"], added["v"]), start)
    here = jnp.arange(layer["k"].shape[2])[None, None] == start[:, None, None]
    scales = {
        name: jnp.where(here, new.swapaxes(1, 2), layer[name])
        for name, new in added.items()
        if name not in ("k", "v")
    }
    return {name: _shard(x) for name, x in ({"k": k, "v": v} | scales).items()}


def _quantized(name: str, x: Float[Array, "B T K H"]) -> dict[str, Array]:
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(axis=-1) / 127
    values = jnp.round(x / jnp.where(scale > 0, scale, 1.0)[..., None])
    return {name: values.astype(jnp.int8), f"{name}_scale": scale}


def read(
    layer: LayerCache, dtype: DTypeLike
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Returns the keys and values of all slots, as `attention` takes them."""

    def unpacked(name):
        values = layer[name]
        if is_int8(layer):
            values = values.astype(jnp.float32) * layer[f"{name}_scale"][..., None]
        return values.astype(dtype).swapaxes(1, 2)

    return unpacked("k"), unpacked("v")


def read_int8(
    layer: LayerCache,
) -> tuple[Int8[Array, "B S K H"], Int8[Array, "B S K H"], tuple[Array, Array]]:
    """Returns keys, values and their scales f32[B,K,S] as `int8_attention` takes them."""
    k, v = (layer[name].swapaxes(1, 2) for name in ("k", "v"))
    return k, v, (layer["k_scale"], layer["v_scale"])


def grow(cache: Cache, slots: int) -> Cache:
    """Pads the cache to `slots` tokens per row."""

    def pad(x):
        return jnp.pad(x, [(0, slots - x.shape[2] if axis == 2 else 0) for axis in range(x.ndim)])

    return jax.tree.map(pad, cache)


def repeat(cache: Cache, copies: int) -> Cache:
    """Repeats each row `copies` times, one after the other: [B,K,S,H] -> [B*copies,K,S,H]."""
    return jax.tree.map(lambda x: _shard(jnp.repeat(x, copies, axis=0)), cache)
