"""Runs one prompt in pieces, between which other answers continue: the tower for some of its tiles,
or a chunk of its tokens.
"""

from collections.abc import Sequence

import jax

from internvl3_jax.inference.engine.device import Device
from internvl3_jax.inference.engine.image_store import ImageStore
from internvl3_jax.inference.engine.request import Ticket
from internvl3_jax.inference.engine.tower_run import TowerRun


class PromptRun:
    """The prompt of one or several equal requests on its way into the cache.

    Args:
      tickets: of requests with this prompt; their answers begin together.
      rows: the row of each.
      group: of `Device.groups`, or None.
      keep: how many tokens of the prompt the row `source` holds.
      tower: has features of the prompt's images already; None starts one.

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
        tower: TowerRun | None = None,
    ):
        self.tickets, self.rows, self.group = list(tickets), list(rows), group
        self.request = self.tickets[0].request
        self.hidden: jax.Array | None = None
        self._device = device
        self._tower = tower or TowerRun(device, store, self.tickets[0])
        prompt = self.request.prompt
        slots = device.sizes.for_prompt(len(prompt.tokens), keep)
        self._chunks = device.sizes.chunks_of(len(prompt.tokens), keep)
        self.cache = device.prompt_cache(slots, source if keep else None)
        self._visual = device.no_features(slots)
        # Images whose tokens are still to be run.
        self._images = [index for index, (start, _) in enumerate(prompt.runs) if start >= keep]

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
        index, prompt = self._images[0], self.request.prompt
        features, num_tokens = self._tower.step(index)
        if features is not None:
            compressed = None if prompt.compressed is None else prompt.compressed[index]
            self._visual = self._device.write_features(
                self._visual, features, prompt.runs[index][0], compressed
            )
            self._images.pop(0)
        return num_tokens
