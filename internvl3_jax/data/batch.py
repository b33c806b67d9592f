"""The contract between the numpy side and the jax side: `Batch`, and how one conversation becomes a `Sample`.

B rows, T tokens a row, N tiles a row, S pixels along a tile's side, P tokens per tile.
"""

import dataclasses
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from PIL import Image

from internvl3_jax.config import ProcessorConfig
from internvl3_jax.data.chat import Encoded, encode_chat
from internvl3_jax.data.tiles import cut_tiles, tiles_per_image
from internvl3_jax.positions import build_positions


class Batch(TypedDict):
    """What the model and the loss take. A row holds one or several samples; nothing refers to another row.

    tokens        i32[B,T]       ids; P * tiles of them are <IMG_CONTEXT>, in the order of the row's tiles
    targets       i32[B,T]       the id that should follow each token
    loss_weights  f32[B,T]       weight of each target, 0 where it is not trained
    segments      i32[B,T]       number of the sample in its row from 1, 0 for padding
    positions     i32[B,T]       in units of 1/256, from 0 in each sample
    tiles         u8[B,N,S,S,3]  RGB; unused ones at the end of a row are zero
    """

    tokens: np.ndarray
    targets: np.ndarray
    loss_weights: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    tiles: np.ndarray


class Sample(TypedDict):
    """One conversation: a row of `Batch` before packing and without segments; arrays of [T] and u8[N,S,S,3]."""

    tokens: np.ndarray
    targets: np.ndarray
    loss_weights: np.ndarray
    positions: np.ndarray
    tiles: np.ndarray


def cut_pictures(pictures: Sequence[Image.Image], processor: ProcessorConfig, max_tiles: int | None = None) -> list[np.ndarray]:
    """Tiles u8[n,S,S,3] of each picture; the pictures share the limit, as the reference does."""
    limit = tiles_per_image(processor.max_tiles if max_tiles is None else max_tiles, max(1, len(pictures)))
    return [cut_tiles(picture, processor, limit) for picture in pictures]


def make_sample(messages, pictures, tokenizer, processor: ProcessorConfig, deltas: Sequence[int], where: str = "") -> Sample:
    """Messages and PIL pictures to a training sample; `deltas` are V2PE units, one per picture.

    Weights follow "square averaging" of InternVL2.5 and 3: each of the sample's x trained tokens weighs 1 / sqrt(x).
    """
    tiles = cut_pictures(pictures, processor)
    encoded = encode_chat(
        messages, [len(part) for part in tiles], tokenizer, processor, add_generation_prompt=False, where=where
    )
    positions = build_positions(len(encoded.tokens), encoded.runs, deltas)
    return _shift(encoded) | {"positions": positions, "tiles": join_tiles(tiles, processor.image_size)}


def join_tiles(tiles: Sequence[np.ndarray], size: int) -> np.ndarray:
    return np.concatenate([np.zeros((0, size, size, 3), np.uint8), *tiles])


def _shift(encoded: Encoded) -> dict:
    targets = np.append(encoded.tokens[1:], 0).astype(np.int32)
    trained = np.append(encoded.loss_mask[1:], False)
    weights = trained / np.sqrt(max(1, trained.sum()))
    return {"tokens": encoded.tokens, "targets": targets, "loss_weights": weights.astype(np.float32)}


@dataclasses.dataclass
class Prompt:
    """A conversation up to the point where the model answers.

    tokens i32[T]; positions i32[T] in units of 1/256; runs: (first token, number of tokens) of each picture; tiles: u8[n,S,S,3] of each
    picture.
    """

    tokens: np.ndarray
    positions: np.ndarray
    runs: list[tuple[int, int]]
    tiles: list[np.ndarray]


def make_prompt(messages, tiles: Sequence[np.ndarray], tokenizer, processor, deltas: Sequence[int], where: str = "") -> Prompt:
    """Messages ending with a user turn to a `Prompt`. `tiles` are those of each picture in order, `deltas` their V2PE units."""
    encoded = encode_chat(
        messages, [len(part) for part in tiles], tokenizer, processor, add_generation_prompt=True, where=where
    )
    positions = build_positions(len(encoded.tokens), encoded.runs, deltas)
    return Prompt(encoded.tokens, positions, list(encoded.runs), list(tiles))
