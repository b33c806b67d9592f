"""Runs the vision tower over one prompt's images in pieces; other answers continue in between."""

import numpy as np
from jaxtyping import Float32

from internvl3_jax.inference.engine.device import Device
from internvl3_jax.inference.engine.image_store import Features, ImageStore
from internvl3_jax.inference.engine.request import Ticket


class TowerRun:
    """The features of the images of a request, from the store or the tower.

    Args:
      ticket: of the request.
    """

    def __init__(self, device: Device, store: ImageStore, ticket: Ticket):
        self._device, self._store = device, store
        self._adapter, self._tiles = ticket.request.adapter, ticket.request.prompt.tiles
        tower = device.vision_of(self._adapter)
        self._keys = [(tower, digest) for digest in ticket.digests]
        self._done: dict[int, Features] = {}
        self._pieces: Features = []  # of the image that is being encoded

    def step(self, index: int) -> tuple[Features | None, int]:
        """Encodes some tiles of an image, one image after the other.

        Returns:
          (its features, once all of them are there, and how many tokens were made)
        """
        key, tiles = self._keys[index], self._tiles[index]
        features = self._done.get(index)
        if features is None and not self._pieces:
            features = self._store.get(key)
        if features is not None:
            self._done[index] = features
            return features, 0
        done = sum(piece.tiles for piece in self._pieces)
        count = self._device.pieces(len(tiles) - done)[0]
        piece = self._device.encode(tiles[done : done + count], self._adapter)
        self._pieces.append(piece)
        if done + count == len(tiles):
            features, self._pieces = self._pieces, []
            self._store.put(key, features)
            self._done[index] = features
        return features, count * piece.full.shape[1]

    def probabilities(self, index: int) -> Float32[np.ndarray, " n"] | None:
        """Returns the router's probabilities of an image; None if it has to be encoded."""
        known = self._store.probabilities.get(self._keys[index])
        if known is None and index in self._done:
            pieces = [np.asarray(piece.probability) for piece in self._done[index]]
            known = self._store.note(self._keys[index], np.concatenate(pieces))
        return known
