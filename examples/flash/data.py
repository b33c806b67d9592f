"""Sheets of handwritten digits of which most cells are empty, so that most tiles are blank.

The questions are those of configs/tiny_digits.py about where a digit is and how many there are, on
sheets of two by three cells with one or two digits. A sheet has six tiles and a thumbnail.
"""

import numpy as np

from examples.tiny_digits.recipe import data as digits
from internvl3_jax.config import DataConfig

MOST = 2  # digits on a sheet
_TWO_ROWS = 42  # pixels: higher than any image of one row


def question(rng: np.random.Generator, split: str) -> digits.Question:
    """Returns a question about a sheet of two by three cells."""
    while True:
        found = digits.ask(str(rng.choice(["count", "locate"])), rng, split, MOST)
        width, height = found.images[0].size
        if height > _TWO_ROWS and width > 1.25 * height:
            return found


class Sheets(digits.DigitsSource):
    """Random-access source: item i depends on (seed, i) alone."""

    def __getitem__(self, index: int) -> digits.Question:
        return question(np.random.default_rng((self.seed, 7, index)), self.split)


class SheetConversations(digits.DigitsConversations):
    """The questions as a source of training data."""

    name = "sheets"

    def __init__(self, length: int, seed: int):
        self.questions = Sheets(length, seed)

    @property
    def identity(self) -> str:
        return f"{len(self)} questions about sheets, seed {self.questions.seed}"


def sources(config: DataConfig) -> list[SheetConversations]:
    """Returns the sources of the mixture: the function that configs/flash.py names."""
    return [SheetConversations(config.samples, config.seed)]


def held_out(count: int) -> list[digits.Question]:
    """Returns questions about unseen handwriting."""
    return [question(np.random.default_rng((1, 8, index)), "test") for index in range(count)]


def is_blank(tiles: np.ndarray) -> np.ndarray:
    """Returns which tiles u8[n,S,S,3] have no pixel that is much darker than the paper."""
    light = tiles.min(axis=3).reshape(len(tiles), -1).astype(int)
    return np.median(light, axis=1) - light.min(axis=1) < 40
