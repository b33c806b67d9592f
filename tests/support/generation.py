"""Makes prompts for the tiny model and generators that answer them."""

import functools

import numpy as np

from internvl3_jax.config import UNITS
from internvl3_jax.data.batch import Prompt
from internvl3_jax.inference.generation_config import GenerationConfig
from internvl3_jax.inference.generator import Generator
from internvl3_jax.inference.sampling import Sampling
from internvl3_jax.positions import build_positions
from tests.support.tiny_checkpoint import CONFIG, random_params

PARAMS = random_params(CONFIG)
IMAGE, PER_TILE = CONFIG.image_token_id, CONFIG.tokens_per_tile


@functools.cache
def generator(stop_ids=()) -> Generator:
    return Generator(CONFIG, PARAMS, stop_ids=stop_ids)


def make_run(rows=1, limit=20, seeds=None, **sampling) -> GenerationConfig:
    return GenerationConfig(limit, Sampling(**sampling), seeds or (0,) * rows, "none")


def make_prompt(images=(), seed=0, text=5) -> Prompt:
    """`text` tokens before, between and after images of noise, given as (tiles, delta in units)."""
    rng = np.random.default_rng(seed)
    tokens, runs, tiles = list(rng.integers(0, IMAGE, text)), [], []
    size = CONFIG.vision.image_size
    for count, _ in images:
        runs.append((len(tokens), count * PER_TILE))
        tokens += [IMAGE] * runs[-1][1] + list(rng.integers(0, IMAGE, text))
        tiles.append(rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8))
    positions = build_positions(len(tokens), runs, [delta for _, delta in images])
    return Prompt(np.asarray(tokens, np.int32), positions, runs, tiles)


# Prompts of different lengths: with and without images, with and without V2PE.
RAGGED = [
    make_prompt([(1, UNITS)], seed=1),
    make_prompt(seed=2, text=9),
    make_prompt([(2, 64), (1, 1)], seed=3),
    make_prompt([(4, 128)], seed=4, text=1),
]
