"""Trains InternVL3.5-Flash: rows with compressed tiles, the divergence of two models, and the
targets of the router. flash_loss.py makes the losses of these.

Two stages (ViCO, InternVL3.5 paper, section 2.3; Cui et al. 2025). First the model learns to answer
alike whether tiles are compressed or not; then the router learns which tiles lose little.

Axes: B rows, T tokens, N tiles of a row, P and Q visual tokens of a tile and of a compressed one, D
width, V vocabulary, W ratios of the window.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, PRNGKeyArray

from internvl3_jax.config import UNITS, ModelConfig

_MASKED = -1e30
# Nats. A tile whose loss without compression is below is as good as one with this loss: a ratio of
# two roundings means nothing.
FLOOR = 1e-3


# --- rows with compressed tiles ------------------------------------------------------------------


def compress_rows(
    batch: Mapping, compressed: Bool[Array, "B N"], config: ModelConfig
) -> tuple[dict, Int32[Array, "B T"]]:
    """Returns the batch with fewer tokens for compressed tiles, as `inference.flash.compress` has it.

    The shapes stay: tokens that fall away are padding at the end of their row. "features" numbers
    the features of a row as `InternVL.all_features` returns them.

    Returns:
      (the batch, the place of each token of the given batch in it)
    """
    full, few = config.tokens_per_tile, config.tokens_per_compressed_tile
    tokens, count = batch["tokens"], batch["tiles"].shape[1]
    is_visual = tokens == config.image_token_id
    # 1) The tile of each visual token, its number within it, and the feature that it takes.
    number = jnp.cumsum(is_visual, axis=1) - 1
    tile, within = jnp.clip(number // full, 0, count - 1), number % full
    is_compressed = is_visual & jnp.take_along_axis(compressed, tile, axis=1)
    feature = jnp.where(is_compressed, count * full + tile * few + within, number)
    keep = ~is_compressed | (within < few)
    # 2) Kept tokens first, in order.
    order = jnp.argsort(~keep, axis=1, stable=True)
    place = jnp.argsort(order, axis=1).astype(jnp.int32)

    def moved(x):
        return jnp.take_along_axis(x, order, axis=1)

    kept = moved(keep)
    result = dict(batch) | {"features": moved(feature), "tokens": moved(tokens)}
    result["targets"] = moved(batch["targets"])
    result["loss_weights"] = jnp.where(kept, moved(batch["loss_weights"]), 0.0)
    result["segments"] = jnp.where(kept, moved(batch["segments"]), 0)
    # 3) Positions of what is left.
    steps = jnp.diff(batch["positions"], axis=1, prepend=0)
    visual = moved(is_visual) & kept
    result["positions"] = _positions(moved(steps), visual, result["segments"])
    return result, place


def _positions(
    steps: Int32[Array, "B T"], is_visual: Bool[Array, "B T"], segments: Int32[Array, "B T"]
) -> Int32[Array, "B T"]:
    """Returns V2PE positions, in units, as `positions.build_positions` does for each segment.

    Args:
      steps: the V2PE step of the image at each visual token, anything elsewhere.
    """
    # Text after an image rounds the steps of the image up to a whole position.
    advanced = jnp.cumsum(jnp.where(is_visual, steps, 0), axis=1)
    before = jax.lax.cummax(jnp.where(is_visual, 0, advanced), axis=1)
    run = advanced - jnp.pad(before, ((0, 0), (1, 0)))[:, :-1]
    places = jnp.cumsum(jnp.where(is_visual, steps, UNITS + -run % UNITS), axis=1)
    is_first = segments != jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1]
    start = jax.lax.cummax(jnp.where(is_first, places, 0), axis=1)
    return jnp.where(segments > 0, places - start, 0)


# --- the tiles of samples ------------------------------------------------------------------------


def samples_of_tiles(batch: Mapping, config: ModelConfig) -> Int32[Array, "B N"]:
    """Returns the number of each tile's sample in its row, from 1; 0 is padding."""
    is_visual = batch["tokens"] == config.image_token_id
    number = jnp.cumsum(is_visual, axis=1) - 1
    starts = is_visual & (number % config.tokens_per_tile == 0)
    tiles = jnp.arange(batch["tiles"].shape[1])[None, None]
    is_start = starts[..., None] & ((number // config.tokens_per_tile)[..., None] == tiles)
    return jnp.where(is_start, batch["segments"][..., None], 0).sum(axis=1)


def random_mix(
    key: PRNGKeyArray, batch: Mapping, share: float, config: ModelConfig
) -> Bool[Array, "B N"]:
    """Returns which tiles are compressed: each with the probability of its sample.

    That of a sample is uniform in share +- min(share, 1 - share). With one probability for all,
    samples with nearly all or nearly none of their tiles compressed would be rare, and a router
    makes such samples.
    """
    samples = samples_of_tiles(batch, config)
    draws = jax.random.uniform(key, (2, *samples.shape))
    first = jnp.argmax(_alike(samples), axis=2)  # tile of the sample
    width = min(share, 1.0 - share)
    shares = share + width * (2 * jnp.take_along_axis(draws[0], first, axis=1) - 1)
    return draws[1] < shares


def turns_of_tiles(key: PRNGKeyArray, samples: Int32[Array, "B N"]) -> Int32[Array, "B N"]:
    """Returns the place of each tile in a random order of its sample's tiles, from 0.

    With one tile of a sample compressed at a time, what the sample's loss gains is that tile's.
    """
    ranks = jax.random.uniform(key, samples.shape)
    is_before = _alike(samples) & (ranks[:, None, :] < ranks[:, :, None])
    return is_before.sum(axis=2)


def tiles_alike(chosen: Bool[Array, "B N"], samples: Int32[Array, "B N"]) -> Int32[Array, "B N"]:
    """Returns how many chosen tiles the sample of each tile has, at least 1."""
    return jnp.maximum((_alike(samples) & chosen[:, None, :]).sum(axis=2), 1)


def _alike(samples: Int32[Array, "B N"]) -> Bool[Array, "B N N"]:
    return samples[:, :, None] == samples[:, None, :]


# --- the divergence ------------------------------------------------------------------------------


def divergence(
    policy: tuple[Float[Array, "B T D"], Float[Array, "D V"]],
    reference: tuple[Float[Array, "B T D"], Float[Array, "D V"]],
    vocab_size: int,
    tokens_at_once: int,
) -> Float32[Array, "B T"]:
    """Returns KL(reference || policy) of the next token at each token, in nats.

    The gradient is the policy's. Logits of some tokens of each row are in memory at a time, and are
    computed again for the gradient.

    Args:
      policy, reference: hidden states and the head's kernel of both models, token for token.
      tokens_at_once: of each row.
    """
    (hidden, kernel), (wanted, wanted_kernel) = policy, jax.lax.stop_gradient(reference)
    rows, length, width = hidden.shape
    chunk = min(tokens_at_once, length)
    spare = -length % chunk

    def chunks(x):
        x = jnp.pad(x, ((0, 0), (0, spare), (0, 0)))
        return x.reshape(rows, -1, chunk, width).swapaxes(0, 1)

    real = (jnp.arange(kernel.shape[1]) < vocab_size)[None, None]

    def log_probabilities(x, kernel):
        logits = jnp.dot(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
        return jax.nn.log_softmax(jnp.where(real, logits, _MASKED))

    @jax.checkpoint
    def of_chunk(parts):
        found = log_probabilities(parts[0], kernel)
        expected = log_probabilities(parts[1], wanted_kernel)
        return (jnp.exp(expected) * (expected - found)).sum(axis=-1)

    losses = jax.lax.map(of_chunk, (chunks(hidden), chunks(wanted)))
    return losses.swapaxes(0, 1).reshape(rows, -1)[:, :length]


# --- the router's targets ------------------------------------------------------------------------


class RatioWindow(NamedTuple):
    """The last W loss ratios of tiles. It is saved with the run."""

    values: Float32[Array, " W"]
    # Ratios so far until they fill the window; from then on W + the place of the next one.
    count: Float32[Array, ""]


def init_window(size: int) -> RatioWindow:
    """Returns the window before the first update."""
    return RatioWindow(jnp.zeros(size, jnp.float32), jnp.zeros((), jnp.float32))


def tile_losses(
    losses: Float32[Array, "B T"], batch: Mapping, samples: Int32[Array, "B N"]
) -> Float32[Array, "B N"]:
    """Returns the weighted mean loss of the trained tokens of each tile's sample."""
    weights = batch["loss_weights"]
    is_of = batch["segments"][:, :, None] == samples[:, None, :]
    total = jnp.where(is_of, weights[..., None], 0.0).sum(axis=1)
    summed = jnp.where(is_of, (losses * weights)[..., None], 0.0).sum(axis=1)
    return summed / jnp.maximum(total, 1e-30)


def add_ratios(
    window: RatioWindow, ratios: Float32[Array, "B N"], present: Bool[Array, "B N"]
) -> RatioWindow:
    """Returns the window with the ratios that are present, in place of the oldest ones.

    Of more ratios than it holds the last are kept.
    """
    size, before = len(window.values), window.count.astype(jnp.int32)
    flat = present.reshape(-1)
    number, total = jnp.cumsum(flat) - 1, flat.sum()
    is_kept = flat & (number >= total - size)
    index = jnp.where(is_kept, (before + number) % size, size)  # beyond the end: dropped
    values = window.values.at[index].set(ratios.reshape(-1), mode="drop")
    after = before + total
    # Small enough to be exact in float32, however long the run.
    after = jnp.where(after < size, after, size + after % size)
    return RatioWindow(values, after.astype(jnp.float32))


def threshold(window: RatioWindow, share: float) -> Float32[Array, ""]:
    """Returns the ratio below which a share of the window lies."""
    size = len(window.values)
    known = jnp.minimum(window.count, size)
    values = jnp.sort(jnp.where(jnp.arange(size) < known, window.values, jnp.inf))
    return values[jnp.clip((share * known).astype(jnp.int32), 0, size - 1)]
