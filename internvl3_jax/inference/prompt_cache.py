"""The key/value cache of a conversation, and how much of the next prompt it already holds."""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, UInt8

from internvl3_jax.config import UNITS
from internvl3_jax.data.batch import Prompt
from internvl3_jax.inference.programs import DecodeState


@dataclasses.dataclass
class PromptCache:
    """A cache after an answer, and the tokens whose keys and values are in its slots.

    Attributes:
      state: of the decode loop after the answer.
      prompt: the prompt of the answer.
      tokens: token ids of the prompt and of the answer but its last one.
      positions: their positions in units of 1/256.
      scaling: the rope scaling that they were run with.
    """

    state: DecodeState
    prompt: Prompt
    tokens: Int32[np.ndarray, " T"]
    positions: Int32[np.ndarray, " T"]
    scaling: str

    @classmethod
    def after(
        cls, state: DecodeState, prompt: Prompt, answer_ids: Sequence[int], scaling: str
    ) -> "PromptCache":
        """Returns the cache after an answer. Its last id was not run: it has no keys and values."""
        extended = extend_prompt(prompt, answer_ids[:-1])
        return cls(state, prompt, extended.tokens, extended.positions, scaling)

    def reusable(self, prompt: Prompt, scaling: str, max_position: int) -> int:
        """Returns how many leading tokens of `prompt` the cache holds; it leaves one at least.

        Tokens, positions and images are compared, so that the answer is the one without reuse, even
        where the text of an earlier answer is tokenized differently from how it was generated.
        """
        if self.scaling != scaling:
            return 0
        if scaling == "dynamic" and prompt.positions[-1] // UNITS >= max_position:
            return 0  # the rope frequencies depend on the length, which has changed
        length = min(len(self.tokens), len(prompt.tokens) - 1)
        same = (self.tokens[:length] == prompt.tokens[:length]) & (
            self.positions[:length] == prompt.positions[:length]
        )
        keep = length if same.all() else int(np.argmin(same))
        # An image is reused as a whole, if its pixels are the same.
        for index, (start, count) in enumerate(prompt.runs):
            same_image = index < len(self.prompt.tiles) and _digest(
                self.prompt.tiles[index]
            ) == _digest(prompt.tiles[index])
            if start < keep and (not same_image or keep < start + count):
                return start
        return keep


def extend_prompt(prompt: Prompt, ids: Sequence[int]) -> Prompt:
    """Returns the prompt with text tokens after it."""
    steps = UNITS * np.arange(1, len(ids) + 1, dtype=np.int32)
    tokens = np.concatenate([prompt.tokens, np.asarray(ids, np.int32)])
    positions = np.concatenate([prompt.positions, prompt.positions[-1] + steps])
    return dataclasses.replace(prompt, tokens=tokens, positions=positions)


def _digest(tiles: UInt8[np.ndarray, "n S S 3"]) -> bytes:
    return hashlib.sha256(tiles.tobytes()).digest()
