"""Rotary position embedding at integer or fractional positions (V2PE).

Positions arrive as int32 in units of 1/256 (see `positions.py`), so every delta is exact; only the
angle is a float. It is formed from the whole and the fractional part separately: at delta 1 the
fraction is zero and the angle equals the ordinary one bit for bit.

B batch, T sequence, N heads, H head width.
"""

import jax
import jax.numpy as jnp

from internvl3_jax.config import UNITS, LanguageConfig


def inverse_frequencies(
    config: LanguageConfig, positions=None, segments=None, scaling: str = "none"
):
    """f32[H/2], or f32[B,T,H/2] under "dynamic" scaling, where it depends on the length of each
    sequence.

    Dynamic NTK follows transformers >= 5 (`dynamic_frequency_update`): with L = highest position +
    1 beyond `max_position`, the base becomes theta * (factor * L / max_position - (factor - 1)) **
    (H / (H - 2)). L is taken per segment of a row, so that neither a neighbour in a packed row nor
    another row of the batch changes a sequence's frequencies.
    """
    width = config.head_dim
    exponent = jnp.arange(0, width, 2, dtype=jnp.float32) / width
    if scaling == "none":
        return 1.0 / (config.rope_theta**exponent)
    length = (_segment_max(positions, segments) // UNITS + 1).astype(jnp.float32)
    stretch = config.rope_factor * jnp.maximum(
        length, config.max_position
    ) / config.max_position - (config.rope_factor - 1)
    base = config.rope_theta * stretch ** (width / (width - 2))
    return 1.0 / (base[..., None] ** exponent[None, None])


def _segment_max(positions, segments):
    """For each token the highest position in its segment: i32[B,T]."""
    if segments is None:
        return jnp.broadcast_to(positions.max(axis=1, keepdims=True), positions.shape)

    def row(position, segment):
        highest = jax.ops.segment_max(position, segment, num_segments=position.shape[0] + 1)
        return highest[segment]

    return jax.vmap(row)(positions, segments)


def rope_tables(config: LanguageConfig, positions, segments=None, scaling: str = "none"):
    """cos, sin: f32[B,T,H/2] at `positions` i32[B,T], in units of 1/256."""
    frequencies = inverse_frequencies(config, positions, segments, scaling)
    if frequencies.ndim == 1:
        frequencies = frequencies[None, None]
    whole = (positions // UNITS).astype(jnp.float32)[..., None]
    fraction = (positions % UNITS).astype(jnp.float32)[..., None] / UNITS
    angle = whole * frequencies + fraction * frequencies
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x, cos, sin):
    """Rotates x [B,T,N,H]; pairs are (i, i + H/2) as in Llama checkpoints. Float32 inside, x's
    dtype outside.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)
