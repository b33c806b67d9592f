"""Rows and batches of the tiny model, with images, targets and loss weights."""

import functools

import numpy as np

from internvl3_jax.config import UNITS
from internvl3_jax.data.batch import average_weights
from internvl3_jax.positions import build_positions
from tests.support.tiny_checkpoint import CONFIG

IMAGE, PER_TILE = CONFIG.image_token_id, CONFIG.tokens_per_tile
TOKENS, TILES = 48, 4
SHAPES = [
    [(2, 64)],
    [],
    [(1, 1), (1, UNITS)],
    [(1, 128), (2, UNITS)],
    [],
    [(3, 256)],
    [(1, 64), (1, 32)],
    [(1, UNITS)],
]


def make_row(images=(), seed=0, text=4):
    """Returns a row of one sample: `text` tokens before, between and after its images.

    images: (tiles, V2PE delta in units) of each image.
    """
    rng = np.random.default_rng(seed)
    tokens, runs = list(rng.integers(0, IMAGE, text)), []
    for tiles, _ in images:
        runs.append((len(tokens), tiles * PER_TILE))
        tokens += [IMAGE] * runs[-1][1] + list(rng.integers(0, IMAGE, text))
    size = CONFIG.vision.image_size
    shape = (1, sum(tiles for tiles, _ in images), size, size, 3)
    return {
        "tokens": np.asarray(tokens, np.int32)[None],
        "positions": build_positions(len(tokens), runs, [delta for _, delta in images])[None],
        "segments": np.ones((1, len(tokens)), np.int32),
        "tiles": rng.integers(0, 256, shape, dtype=np.uint8),
    }


def pack(rows):
    """Packs samples one after another into one row."""
    packed = {name: np.concatenate([row[name] for row in rows], axis=1) for name in rows[0]}
    lengths = [row["tokens"].shape[1] for row in rows]
    return packed | {
        "segments": np.repeat(np.arange(1, len(rows) + 1, dtype=np.int32), lengths)[None]
    }


def pad(row, tokens, tiles, filler):
    """Pads the row at its end with segment 0; its tokens, positions and tiles with `filler`."""
    extra = tokens - row["tokens"].shape[1]
    padded = {
        name: np.pad(row[name], ((0, 0), (0, extra)), constant_values=filler)
        for name in ("tokens", "positions")
    }
    padded["segments"] = np.pad(row["segments"], ((0, 0), (0, extra)))
    missing = tiles - row["tiles"].shape[1]
    return padded | {
        "tiles": np.pad(
            row["tiles"], ((0, 0), (0, missing), (0, 0), (0, 0), (0, 0)), constant_values=filler
        )
    }


def sample(images, seed, average="square", source=0):
    """Returns a row of one sample with targets; about a third of its tokens is supervised."""
    row = make_row(images, seed)
    rng = np.random.default_rng(seed)
    targets = np.append(row["tokens"][0, 1:], 0).astype(np.int32)
    trained = (
        (rng.random(len(targets)) < 0.4)
        & (np.arange(len(targets)) < len(targets) - 1)
        & (targets != CONFIG.image_token_id)
    )
    trained[0] = True
    weights = average_weights(trained, average)
    sources = np.full(len(targets), source, np.int32)
    return row | {"targets": targets[None], "loss_weights": weights[None], "sources": sources[None]}


def padded(row):
    extra = TOKENS - row["tokens"].shape[1]
    rest = {
        name: np.pad(row[name], ((0, 0), (0, extra)))
        for name in ("targets", "loss_weights", "sources")
    }
    return (
        pad(
            {name: row[name] for name in ("tokens", "positions", "segments", "tiles")},
            TOKENS,
            TILES,
            0,
        )
        | rest
    )


def stack(rows):
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


@functools.cache
def batch(count=4):
    return stack(
        [padded(sample(shape, seed, source=seed % 3)) for seed, shape in enumerate(SHAPES[:count])]
    )
