"""Runs one prompt in pieces, between which other answers continue: the tower for some of its tiles,
or a chunk of its tokens.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import UInt8

from internvl3_jax.inference.engine.device import Device
from internvl3_jax.inference.engine.image_store import Features, ImageStore
from internvl3_jax.inference.engine.request import Ticket


class PromptRun:
    """The prompt of one or several equal requests on its way into the cache.

    Args:
      tickets: of requests with this prompt; their answers begin together.
      rows: the row of each.
      group: of `Device.groups`, or None.
      keep: how many tokens of the prompt the row `source` holds.

    Attributes:
      hidden: the decoder's output at the last token, once the whole prompt has been run.
      cache: of one row.
    """

    def __init__(
        self,
        device: Device,
        store: ImageStore,
        tickets: Sequence[Ticket],
        rows: Sequence[int],
        group: str | None,
        keep: int,
        source: int | None,
    ):
        self.tickets, self.rows, self.group = list(tickets), list(rows), group
        self.request = self.tickets[0].request
        self.hidden: jax.Array | None = None
        self._device, self._store = device, store
        prompt = self.request.prompt
        slots = device.sizes.for_prompt(len(prompt.tokens), keep)
        self._chunks = device.sizes.chunks_of(len(prompt.tokens), keep)
        self.cache = device.prompt_cache(slots, source if keep else None)
        self._visual = device.no_features(slots)
        # Images whose tokens are still to be run.
        self._images = [index for index, (start, _) in enumerate(prompt.runs) if start >= keep]
        self._encoded: Features = []  # pieces of the first of them

    def step(self) -> int:
        """Encodes some tiles, or runs a chunk; returns how many tokens that were."""
        device = self._device
        if self._images:
            return self._encode()
        start, size = self._chunks.pop(0)
        hidden, self.cache = device.run_chunk(
            self.request, self.group, start, size, self._visual, self.cache
        )
        if not self._chunks:
            self.hidden, self._visual = hidden, None
        return size

    def _encode(self) -> int:
        device, request = self._device, self.request
        index = self._images[0]
        tiles = request.prompt.tiles[index]
        column = request.prompt.runs[index][0]
        key = (device.vision_of(request.adapter), self.tickets[0].digests[index])
        features, num_tokens = None if self._encoded else self._store.get(key), 0
        if features is None:
            done = sum(len(piece) for piece in self._encoded)
            piece = self._next_piece(tiles[done:])
            self._encoded.append(device.encode(piece, request.adapter))
            num_tokens = len(piece) * self._encoded[-1].shape[1]
            if done + len(piece) < len(tiles):
                return num_tokens
            features, self._encoded = self._encoded, []
            self._store.put(key, features)
        self._visual = device.write_features(self._visual, features, column)
        self._images.pop(0)
        return num_tokens

    def _next_piece(self, tiles: UInt8[np.ndarray, "m S S 3"]) -> UInt8[np.ndarray, "n S S 3"]:
        return tiles[: self._device.pieces(len(tiles))[0]]
