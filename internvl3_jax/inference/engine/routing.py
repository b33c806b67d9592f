"""Decides, before a prompt enters, which of its tiles are compressed (InternVL3.5-Flash)."""

import dataclasses
from collections.abc import Iterable

from internvl3_jax.inference import flash
from internvl3_jax.inference.engine.device import Device
from internvl3_jax.inference.engine.image_store import ImageStore
from internvl3_jax.inference.engine.request import Ticket
from internvl3_jax.inference.engine.tower_run import TowerRun


class Routing:
    """The decision about the tiles of a waiting request, which needs their features.

    Attributes:
      ticket: of the request.
      tower: with the features that were computed for it.
    """

    def __init__(self, device: Device, store: ImageStore, ticket: Ticket):
        self.ticket, self.tower = ticket, TowerRun(device, store, ticket)
        self._config = device.config
        self._left = list(range(len(ticket.request.prompt.tiles)))

    def step(self) -> int:
        """Encodes some tiles; returns how many tokens that were. 0: all is known."""
        while self._left:
            if self.tower.probabilities(self._left[0]) is not None:
                self._left.pop(0)
                continue
            _, num_tokens = self.tower.step(self._left[0])
            if num_tokens:
                return num_tokens
        return 0

    def decide(self, tickets: Iterable[Ticket]) -> None:
        """Gives equal requests their prompt of fewer tokens, once all is known."""
        prompt = self.ticket.request.prompt
        found = [self.tower.probabilities(index) for index in range(len(prompt.tiles))]
        prompt = flash.compress(prompt, flash.choose(found, self._config), self._config)
        for ticket in tickets:
            ticket.request = dataclasses.replace(ticket.request, prompt=prompt)
            ticket.awaits_routing = False
