"""The compiled programs for prompts: chunks into a cache of their own, and that cache into a row.

B rows, S cache slots, R slots of the cache of one prompt, C tokens of a chunk, D decoder width,
P tokens per tile, M tiles.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped

from internvl3_jax.model import kv_cache, lora
from internvl3_jax.model.internvl import InternVL


def adapted(params: dict, rows: Int32[Array, " B"]) -> dict:
    """Returns the variables of the model, in which each row has the adapter of its number.

    params: With stacked adapters (`adapter_stack.py`), or none.
    """
    variables = lora.variables(params)
    if lora.SUBTREE in variables:
        variables[lora.SUBTREE] = lora.map_adapters(
            lambda adapter: adapter | {"row": rows}, variables[lora.SUBTREE]
        )
    return variables


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=7)
def run_chunk(
    model: InternVL,
    is_start: bool,
    params: dict,
    tokens: Int32[Array, "1 C"],
    visual: Float[Array, "1 R D"],
    positions: Int32[Array, "1 C"],
    scalars: dict[str, Int32[Array, ""]],
    cache: kv_cache.Cache,
) -> tuple[Float[Array, "1 1 D"], kv_cache.Cache]:
    """Runs tokens of one prompt into its cache.

    Args:
      is_start: the cache is empty.
      visual: the feature of each image token of the prompt, at its place; anything elsewhere.
      scalars: `start`, the first token's index; `last`, the index in the chunk whose output is
        returned; `adapter`; and `rope`, the highest position if the rope is stretched, else 0.

    Returns:
      (the decoder's output at `last`, the cache)
    """
    length = tokens.shape[1]
    start = scalars["start"]
    visual = jax.lax.dynamic_slice_in_dim(visual, start, length, axis=1)
    slots = (start + jnp.arange(length, dtype=jnp.int32))[None]
    has_scaling = model.config.language.rope_scaling != "none"
    scaling = scalars["rope"][None] if has_scaling else "none"
    hidden, cache = model.apply(
        adapted(params, scalars["adapter"][None]),
        tokens,
        visual,
        positions,
        slots,
        cache,
        scaling,
        is_start,
        method=InternVL.step,
    )
    return jax.lax.dynamic_slice_in_dim(hidden, scalars["last"], 1, axis=1), cache


@functools.partial(jax.jit, donate_argnums=0)
def write_tile(
    visual: Float[Array, "1 R D"],
    features: Float[Array, "M P D"],
    tile: Int32[Array, ""],
    column: Int32[Array, ""],
) -> Float[Array, "1 R D"]:
    """Writes the features of one of the tiles at its tokens."""
    piece = jax.lax.dynamic_slice_in_dim(features, tile, 1, axis=0)
    return jax.lax.dynamic_update_slice(visual, piece.astype(visual.dtype), (0, column, 0))


@functools.partial(jax.jit, donate_argnums=0)
def insert_row(
    cache: kv_cache.Cache, prompt: kv_cache.Cache, index: Int32[Array, ""]
) -> kv_cache.Cache:
    """Writes the cache of one prompt into a row of the cache."""

    def insert(buffer: Shaped[Array, "B K S *H"], row: Shaped[Array, "1 K R *H"]):
        start = (index, *(0,) * (buffer.ndim - 1))
        return jax.lax.dynamic_update_slice(buffer, row[:, :, : buffer.shape[2]], start)

    return jax.tree.map(insert, cache, prompt)


@functools.partial(jax.jit, static_argnums=2)
def take_row(
    buffer: Shaped[Array, "B K S *H"], index: Int32[Array, ""], slots: int
) -> Shaped[Array, "1 K R *H"]:
    """Returns the beginning of a row of one array of the cache, padded to `slots`."""
    row = jax.lax.dynamic_slice_in_dim(buffer, index, 1, axis=0)[:, :, :slots]
    return _padded(row, slots)


@functools.partial(jax.jit, static_argnums=1)
def grow(buffer: Shaped[Array, "B K S *H"], slots: int) -> Shaped[Array, "B K R *H"]:
    """Pads the slots of one array of the cache."""
    return _padded(buffer, slots)


def _padded(x, slots: int):
    return jnp.pad(x, [(0, slots - x.shape[2] if axis == 2 else 0) for axis in range(x.ndim)])
