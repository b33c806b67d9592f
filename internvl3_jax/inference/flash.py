"""Which tiles of a request the visual resolution router compresses, and the prompt after that.

The rule is that of InternVL3.5-Flash's code: a tile is compressed if its probability is above a
quantile of the tiles' and at least a threshold. The quantile is of one request, all images of its
conversation included. So it is in the `chat` of that code; serving engines take it over a whole
batch, where an answer depends on its neighbors.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32

from internvl3_jax.config import ModelConfig
from internvl3_jax.data.batch import Prompt
from internvl3_jax.io.terminal import excerpt
from internvl3_jax.positions import build_positions

MODES = ("off", "auto")


def check_mode(flash: str | None) -> None:
    """Raises ValueError unless `flash` is one of MODES, or None."""
    if flash is not None and flash not in MODES:
        raise ValueError(f"flash is {excerpt(flash)}; it must be 'off' or 'auto'")


def uses_router(flash: str | None, config: ModelConfig) -> bool:
    """Returns whether the router decides about tiles.

    Args:
      flash: "off", "auto", or None for "auto" where the model has a router.

    Raises:
      ValueError: it is something else, or "auto" of a model without a router.
    """
    check_mode(flash)
    if flash == "auto" and not config.flash:
        raise ValueError(
            "flash is 'auto', but the checkpoint has no router, as InternVL3.5-Flash has; leave it "
            "out"
        )
    return config.flash and flash != "off"


def quantile(values: Float32[np.ndarray, " n"], share: float) -> np.float32:
    """Returns the quantile of n > 0 values with linear interpolation.

    In float32, step by step as `torch.quantile`: the comparison with it is strict.
    """
    rank = np.float32(share) * np.float32(len(values) - 1)
    below, ordered = int(rank), np.sort(values)
    weight = rank - np.float32(below)
    low, high = ordered[below], ordered[min(below + 1, len(values) - 1)]
    if weight < 0.5:
        return low + weight * (high - low)
    return high - (high - low) * (np.float32(1) - weight)


def choose(
    probabilities: Sequence[Float32[np.ndarray, " n"]], config: ModelConfig
) -> list[Bool[np.ndarray, " n"]]:
    """Returns which tiles of each image of a request are compressed.

    A single tile never is: no number is above its own quantile.

    Args:
      probabilities: the router's, of the tiles of each image.
    """
    if not probabilities:
        return []
    every = np.concatenate(probabilities).astype(np.float32)
    chosen = (every > quantile(every, config.flash_relative)) & (
        every >= np.float32(config.flash_absolute)
    )
    return np.split(chosen, np.cumsum([len(image) for image in probabilities])[:-1])


def compress(
    prompt: Prompt, compressed: Sequence[Bool[np.ndarray, " n"]], config: ModelConfig
) -> Prompt:
    """Returns the prompt with fewer image tokens for the tiles that are compressed.

    Args:
      prompt: with all tokens of every tile.
      compressed: which tiles of each image are.

    Raises:
      ValueError: the positions of the prompt are not those of one V2PE step per image.
    """
    full, few = config.tokens_per_tile, config.tokens_per_compressed_tile
    # 1) The step of each image: its first tile has several tokens.
    deltas = [
        int(prompt.positions[start + 1] - prompt.positions[start]) for start, _ in prompt.runs
    ]
    if not np.array_equal(
        build_positions(len(prompt.tokens), prompt.runs, deltas), prompt.positions
    ):
        raise ValueError(
            "the router needs a prompt whose positions have one V2PE step per image; make it with "
            "make_prompt, or give flash='off'"
        )
    # 2) Which tokens stay: the first ones of each compressed tile.
    keep, runs = np.ones(len(prompt.tokens), bool), []
    for (start, count), tiles in zip(prompt.runs, compressed, strict=True):
        keep[start : start + count].reshape(len(tiles), full)[tiles, few:] = False
        runs.append((int(keep[:start].sum()), int(keep[start : start + count].sum())))
    # 3) Positions of the shorter sequence.
    tokens = prompt.tokens[keep]
    return dataclasses.replace(
        prompt,
        tokens=tokens,
        positions=build_positions(len(tokens), runs, deltas),
        runs=runs,
        compressed=list(compressed),
    )


def counts(prompt: Prompt) -> tuple[int, int]:
    """Returns the tiles of a prompt, and how many of them are compressed."""
    return sum(map(len, prompt.tiles)), sum(int(tiles.sum()) for tiles in prompt.compressed or ())
