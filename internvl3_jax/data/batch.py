"""The contract between the numpy side and the jax side: `Batch`, and how one conversation becomes a
`Sample`.

B rows, T tokens a row, N tiles a row, S pixels along a tile's side, P tokens per tile.
"""

import dataclasses
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from PIL import Image

from internvl3_jax.config import ProcessorConfig
from internvl3_jax.data.media.tiles import cut_tiles, image_limit
from internvl3_jax.data.text.chat_template import Encoded, encode_chat
from internvl3_jax.positions import build_positions

AVERAGES = {
    "token": 0.0,
    "sample": -1.0,
    "square": -0.5,
}  # power of a sample's number of trained tokens that each of them weighs


class Batch(TypedDict):
    """What the model and the loss take. A row holds one or several samples; nothing refers to
    another row.

    tokens        i32[B,T]       ids; P * tiles of them are <IMG_CONTEXT>, in the order of the row's tiles
    targets       i32[B,T]       the id that should follow each token
    loss_weights  f32[B,T]       weight of each target, 0 where it is not trained
    segments      i32[B,T]       number of the sample in its row from 1, 0 for padding
    positions     i32[B,T]       in units of 1/256, from 0 in each sample
    tiles         u8[B,N,S,S,3]  RGB; unused ones at the end of a row are zero

    Batches of pairs (data/pairs.py), whose `loss_weights` are of the chosen answers, have besides

    answers       i32[B,T]       whose token the target is: 2 k + 1 of the chosen and 2 k + 2 of the rejected answer of the row's pair k,
                                 0 of neither
    features      i32[B,T]       which feature of the row's tiles a visual token stands for; elsewhere any
    until         i32[B,T]       only if the answers share their question: the last place in the row that sees this token
    reference     f32[B,T]       only if it was computed beforehand: the reference's log-probability of an answer, at its first target
    """

    tokens: np.ndarray
    targets: np.ndarray
    loss_weights: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    tiles: np.ndarray


class Sample(TypedDict, total=False):
    """One conversation: a row of `Batch` before packing and without segments; arrays of [T] and
    u8[N,S,S,3].

    Those of the pipeline also say where they come from: `source`, the number of the source in the
    mixture; `row`, the row in its source; `index`, the place in the mixture, by which the pipeline
    can make the sample again.
    """

    tokens: np.ndarray
    targets: np.ndarray
    loss_weights: np.ndarray
    positions: np.ndarray
    tiles: np.ndarray
    source: int
    row: int
    index: int


class SampleError(ValueError):
    """A sample that cannot be used. The message names its source and row and says why."""


def cut_images(
    images: Sequence[Image.Image],
    processor: ProcessorConfig,
    max_tiles: int | None = None,
    *,
    tiles: str | None = None,
    max_total_tiles: int | None = None,
) -> list[np.ndarray]:
    """Tiles u8[n,S,S,3] of each image of one prompt, thumbnails included, by `tiles.image_limit`.

    max_tiles, tiles, max_total_tiles: in place of the processor's fields of these names, unless
        None.

    Raises:
      ValueError: for an unknown rule or a limit out of range.
    """
    changes = {"tiles": tiles, "max_total_tiles": max_total_tiles}
    changes = {name: value for name, value in changes.items() if value is not None}
    processor = dataclasses.replace(processor, **changes)
    limit = image_limit(processor, len(images), max_tiles)
    return [cut_tiles(image, processor, limit) for image in images]


def make_sample(
    messages,
    images,
    tokenizer,
    processor: ProcessorConfig,
    deltas: Sequence[int],
    where: str = "",
    *,
    max_tiles: int | None = None,
    loss_reduction: str = "square",
) -> Sample:
    """Messages and PIL images to a training sample; `deltas` are V2PE units, one per image.

    max_tiles: processor.max_tiles when None; processor.tiles says whether of each image or of
        all. loss_reduction: see
      `average_weights`.
    """
    tiles = cut_images(images, processor, max_tiles)
    encoded = encode_chat(
        messages,
        [len(part) for part in tiles],
        tokenizer,
        processor,
        add_generation_prompt=False,
        where=where,
    )
    return finish_sample(encoded, tiles, deltas, processor, loss_reduction)


def finish_sample(
    encoded: Encoded,
    tiles: Sequence[np.ndarray],
    deltas: Sequence[int],
    processor,
    loss_reduction: str,
) -> Sample:
    """An encoded conversation and the tiles of its images to a training sample."""
    trained = np.append(encoded.loss_mask[1:], False)
    return {
        "tokens": encoded.tokens,
        "targets": np.append(encoded.tokens[1:], 0).astype(np.int32),
        "loss_weights": average_weights(trained, loss_reduction),
        "positions": build_positions(len(encoded.tokens), encoded.runs, deltas),
        "tiles": join_tiles(tiles, processor.image_size),
    }


def average_weights(trained: np.ndarray, average: str) -> np.ndarray:
    """Weights f32[T] of a sample with x trained tokens: "token" 1 each, "sample" 1 / x, "square" 1
    / sqrt(x) (InternVL2.5 and 3).
    """
    return (trained * max(1.0, trained.sum()) ** AVERAGES[average]).astype(np.float32)


def join_tiles(tiles: Sequence[np.ndarray], size: int) -> np.ndarray:
    return np.concatenate([np.zeros((0, size, size, 3), np.uint8), *tiles])


@dataclasses.dataclass
class Prompt:
    """A conversation up to the point where the model answers.

    tokens i32[T]; positions i32[T] in units of 1/256; runs: (first token, number of tokens) of each
    image; tiles: u8[n,S,S,3] of each image.
    """

    tokens: np.ndarray
    positions: np.ndarray
    runs: list[tuple[int, int]]
    tiles: list[np.ndarray]


def make_prompt(
    messages,
    tiles: Sequence[np.ndarray],
    tokenizer,
    processor,
    deltas: Sequence[int],
    where: str = "",
) -> Prompt:
    """Messages ending with a user turn to a `Prompt`. `tiles` are those of each image in order,
    `deltas` their V2PE units.
    """
    encoded = encode_chat(
        messages,
        [len(part) for part in tiles],
        tokenizer,
        processor,
        add_generation_prompt=True,
        where=where,
    )
    positions = build_positions(len(encoded.tokens), encoded.runs, deltas)
    return Prompt(encoded.tokens, positions, list(encoded.runs), list(tiles))
