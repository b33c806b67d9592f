"""Rotary position embedding at integer or fractional positions (V2PE).

Positions are int32 in units of 1/256 (see positions.py), so every delta is exact; only the angle is
a float. The angle is the sum of those of the integer and of the fractional part. At delta 1 the
fraction is zero, and the angle equals that of ordinary RoPE bit for bit.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from internvl3_jax.config import UNITS, LanguageConfig

# cos and sin of each token's angles.
Rope = tuple[Float32[Array, "B T half"], Float32[Array, "B T half"]]


def inverse_frequencies(
    config: LanguageConfig,
    positions: Int[Array, "B T"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    scaling: str | Int[Array, " B"] = "none",
) -> Float32[Array, " half"] | Float32[Array, "B T half"]:
    """Returns the H/2 inverse frequencies; per token under "dynamic" scaling or one of each row.

    Dynamic NTK follows transformers >= 5 (`dynamic_frequency_update`). With L, the highest position
    plus 1, beyond `max_position`, the base becomes
    theta * (factor * L / max_position - (factor - 1)) ** (H / (H - 2)).

    L is that of the token's segment. Neither another sample of a packed row nor another row of the
    batch changes the frequencies of a sequence.

    Args:
      positions: In units of 1/256; needed for "dynamic".
      segments: Sample of each token; None: every row is one sequence.
      scaling: "none" or "dynamic"; or for each row the highest position of its sequence, in units
        of 1/256, which may have tokens that are not among these. 0 is no scaling.
    """
    width = config.head_dim
    exponent = jnp.arange(0, width, 2, dtype=jnp.float32) / width
    if isinstance(scaling, str) and scaling == "none":
        return 1.0 / (config.rope_theta**exponent)
    if isinstance(scaling, str):
        highest = _segment_max(positions, segments)
    else:
        highest = jnp.broadcast_to(scaling[:, None], positions.shape)
    length = (highest // UNITS + 1).astype(jnp.float32)
    stretch = config.rope_factor * jnp.maximum(
        length, config.max_position
    ) / config.max_position - (config.rope_factor - 1)
    base = config.rope_theta * stretch ** (width / (width - 2))
    return 1.0 / (base[..., None] ** exponent[None, None])


def _segment_max(
    positions: Int[Array, "B T"], segments: Int[Array, "B T"] | None
) -> Int[Array, "B T"]:
    """Returns the highest position in each token's segment."""
    if segments is None:
        return jnp.broadcast_to(positions.max(axis=1, keepdims=True), positions.shape)

    def row(position, segment):
        highest = jax.ops.segment_max(position, segment, num_segments=position.shape[0] + 1)
        return highest[segment]

    return jax.vmap(row)(positions, segments)


def rope_tables(
    config: LanguageConfig,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"] | None = None,
    scaling: str | Int[Array, " B"] = "none",
) -> Rope:
    """Returns cos and sin, f32[B,T,H/2] each; the arguments are those of `inverse_frequencies`."""
    frequencies = inverse_frequencies(config, positions, segments, scaling)
    if frequencies.ndim == 1:
        frequencies = frequencies[None, None]
    integer = (positions // UNITS).astype(jnp.float32)[..., None]
    fraction = (positions % UNITS).astype(jnp.float32)[..., None] / UNITS
    angle = integer * frequencies + fraction * frequencies
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(
    x: Float[Array, "B T N H"], cos: Float32[Array, "B T half"], sin: Float32[Array, "B T half"]
) -> Float[Array, "B T N H"]:
    """Rotates x in float32 and returns it in its dtype.

    Pairs are (i, i + H/2), as in Llama checkpoints.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
