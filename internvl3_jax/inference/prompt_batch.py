"""Packs prompts into the rows of one call of the model. Sizes come from a few buckets, so that few
programs are compiled.

B rows, T tokens of a row after padding.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from internvl3_jax.data.batch import Prompt

# Tiles are encoded in calls of these sizes: no tile is ever padded. An accelerator encodes up to
# 16 tiles in one call.
TILE_BUCKETS = {True: (8, 4, 2, 1), False: tuple(range(16, 0, -1))}
# From 1,024 on the steps are eighths, so that a prompt has at most 12 % of padding.
LENGTH_BUCKETS = tuple(
    part * 2**power // parts
    for power in range(6, 24)
    for parts in (4 if power < 10 else 8,)
    for part in range(parts, 2 * parts)
)


def bucket(length: int) -> int:
    """Returns the smallest of 64, 80, 96, 112, 128, 160 ... 1024, 1152, 1280 ... >= `length`."""
    return next(size for size in LENGTH_BUCKETS if size >= length)


def tile_pieces(count: int, on_cpu: bool) -> list[int]:
    """Returns bucket sizes that add up to `count`: 13 -> [8, 4, 1] on a CPU, [13] elsewhere."""
    pieces = []
    for size in TILE_BUCKETS[on_cpu]:
        pieces += [size] * (count // size)
        count %= size
    return pieces


@dataclasses.dataclass(frozen=True)
class PackedPrompts:
    """Right-padded rows of tokens.

    Attributes:
      tokens: token ids; 0 is padding.
      positions: positions in units of 1/256; padding repeats the row's last one.
      slots: cache slot of each token.
      last: index of each row's last token.
    """

    tokens: Int32[np.ndarray, "B T"]
    positions: Int32[np.ndarray, "B T"]
    slots: Int32[np.ndarray, "B T"]
    last: Int32[np.ndarray, " B"]

    @property
    def length(self) -> int:
        return self.tokens.shape[1]


def pack_prompts(prompts: Sequence[Prompt], keep: int = 0) -> PackedPrompts:
    """Packs the tokens of each prompt from index `keep` on; earlier ones are in the cache already.

    Every prompt must have more than `keep` tokens.
    """
    counts = [len(prompt.tokens) - keep for prompt in prompts]
    length = bucket(max(counts))
    tokens, positions = np.zeros((2, len(prompts), length), np.int32)
    for row, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
        tokens[row, :count] = prompt.tokens[keep:]
        positions[row, :count] = prompt.positions[keep:]
        positions[row, count:] = prompt.positions[-1]
    slots = np.broadcast_to(keep + np.arange(length, dtype=np.int32), tokens.shape)
    return PackedPrompts(tokens, positions, slots, np.asarray(counts, np.int32) - 1)


def feature_columns(
    prompts: Sequence[Prompt], keep: int, tokens_per_tile: int
) -> tuple[list[np.ndarray], Int32[np.ndarray, " M"], Int32[np.ndarray, " M"]]:
    """Returns the tiles of the images from token `keep` on, and where their features belong.

    Returns:
      (tiles u8[n,S,S,3] of each image, row of each tile, column of the first token of each tile)
    """
    tiles, rows, columns = [], [], []
    for row, prompt in enumerate(prompts):
        for (start, _), image_tiles in zip(prompt.runs, prompt.tiles, strict=True):
            if start >= keep:
                tiles.append(image_tiles)
                for index in range(len(image_tiles)):
                    rows.append(row)
                    columns.append(start - keep + index * tokens_per_tile)
    return tiles, np.asarray(rows, np.int32), np.asarray(columns, np.int32)
