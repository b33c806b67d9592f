"""Makes samples of conversations, and defines `Batch`, which the model and the loss take.

B rows, T tokens per row, N tiles per row, S pixels along a tile's side, P tokens per tile.
"""

import dataclasses
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from PIL import Image

from internvl3_jax.config import ProcessorConfig
from internvl3_jax.data.boxes import ShownImage
from internvl3_jax.data.media.tiles import cut_tiles, image_limit
from internvl3_jax.data.plan import Plan
from internvl3_jax.data.text.chat_template import Encoded, encode_chat
from internvl3_jax.positions import build_positions

# A trained token is weighted by this power of the sample's number of trained tokens.
AVERAGES = {"token": 0.0, "sample": -1.0, "square": -0.5}


class Batch(TypedDict):
    """Rows of packed samples. A row holds one or several; nothing refers to another row.

    tokens        i32[B,T]       ids; P * tiles of them are <IMG_CONTEXT>, in the order of the tiles
    targets       i32[B,T]       the id that should follow each token
    loss_weights  f32[B,T]       weight of each target, 0 where it is not trained
    segments      i32[B,T]       number of the sample in its row from 1, 0 for padding
    positions     i32[B,T]       in units of 1/256, from 0 in each sample
    tiles         u8[B,N,S,S,3]  RGB; unused ones at the end of a row are zero

    Batches of pairs (data/pairs.py) have further fields; their `loss_weights` are of the chosen
    answers.

    answers       i32[B,T]       the answer that the target belongs to: 2 k + 1 for the chosen and
                                 2 k + 2 for the rejected answer of the row's pair k, 0 for neither
    features      i32[B,T]       number of the visual feature of the row's tiles that the token
                                 takes; arbitrary where the token is not visual
    last_query    i32[B,T]       only if the answers share their question: the last place in the row
                                 that attends to this token
    reference     f32[B,T]       only if precomputed: the reference model's log-probability of an
                                 answer, at its first target
    """

    tokens: np.ndarray
    targets: np.ndarray
    loss_weights: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    tiles: np.ndarray


class Sample(TypedDict, total=False):
    """One conversation before packing: arrays of [T] and u8[N,S,S,3], without segments.

    The pipeline adds `source`, the number of the source in the mixture; `row`, the row in its
    source; and `index`, the place in the mixture, by which it can make the sample again.
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
    """A sample that cannot be used. The message names its source and row, and the reason."""


def cut_images(
    images: Sequence[Image.Image],
    processor: ProcessorConfig,
    max_tiles: int | None = None,
    *,
    tiles: str | None = None,
    max_total_tiles: int | None = None,
) -> list[np.ndarray]:
    """Cuts each image of one prompt into tiles u8[n,S,S,3], thumbnails included.

    max_tiles, tiles, max_total_tiles: In place of the processor's fields, unless None.

    Raises:
      ValueError: The rule is unknown, or a limit is out of range.
    """
    changes = {"tiles": tiles, "max_total_tiles": max_total_tiles}
    changes = {name: value for name, value in changes.items() if value is not None}
    processor = dataclasses.replace(processor, **changes)
    limit = image_limit(processor, len(images), max_tiles)
    return [cut_tiles(image, processor, limit) for image in images]


def finish_sample(
    encoded: Encoded,
    tiles: Sequence[np.ndarray],
    deltas: Sequence[int],
    processor,
    loss_reduction: str,
) -> Sample:
    """Makes a training sample of an encoded conversation and the tiles of its images."""
    trained = np.append(encoded.loss_mask[1:], False)
    return {
        "tokens": encoded.tokens,
        "targets": np.append(encoded.tokens[1:], 0).astype(np.int32),
        "loss_weights": average_weights(trained, loss_reduction),
        "positions": build_positions(len(encoded.tokens), encoded.runs, deltas),
        "tiles": join_tiles(tiles, processor.image_size),
    }


def average_weights(trained: np.ndarray, average: str) -> np.ndarray:
    """Returns loss weights f32[T] of a sample.

    A trained token of x has the weight 1 ("token"), 1 / x ("sample") or 1 / sqrt(x) ("square", as
    in InternVL2.5 and 3).
    """
    return (trained * max(1.0, trained.sum()) ** AVERAGES[average]).astype(np.float32)


def join_tiles(tiles: Sequence[np.ndarray], size: int) -> np.ndarray:
    return np.concatenate([np.zeros((0, size, size, 3), np.uint8), *tiles])


@dataclasses.dataclass
class Prompt:
    """A conversation up to the point where the model answers.

    Attributes:
      tokens: i32[T].
      positions: i32[T], in units of 1/256.
      runs: (first token, number of tokens) of each image.
      tiles: u8[n,S,S,3] of each image.
      shown: The images that the question is about, as far as known: its own, or the last ones.
      plan: What was chosen so that videos and documents fit; None without them.
      compressed: bool[n] of each image, which of its tiles the router compressed to fewer tokens;
        None before it has decided, and without a router.
    """

    tokens: np.ndarray
    positions: np.ndarray
    runs: list[tuple[int, int]]
    tiles: list[np.ndarray]
    shown: Sequence[ShownImage] = ()
    plan: Plan | None = None
    compressed: list[np.ndarray] | None = None


def make_prompt(
    messages,
    tiles: Sequence[np.ndarray],
    tokenizer,
    processor,
    deltas: Sequence[int],
    where: str = "",
) -> Prompt:
    """Makes a `Prompt` of messages that end with a user turn.

    Args:
      tiles: u8[n,S,S,3] of each image, in order.
      deltas: V2PE units, one per image.
      where: Names the conversation in errors.
    """
    encoded = encode_chat(
        messages,
        [len(image_tiles) for image_tiles in tiles],
        tokenizer,
        processor,
        add_generation_prompt=True,
        where=where,
    )
    positions = build_positions(len(encoded.tokens), encoded.runs, deltas)
    return Prompt(encoded.tokens, positions, list(encoded.runs), list(tiles))
