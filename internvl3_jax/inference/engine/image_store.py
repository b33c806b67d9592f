"""Features of images by the hash of their tiles, within a number of bytes."""

import collections
from collections.abc import Hashable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Float32

_MOST_PROBABILITIES = 1 << 16  # images


class EncodedTiles(NamedTuple):
    """Tiles of an image that were encoded together.

    Attributes:
      full: their features.
      compressed: those of the tiles if they are compressed; None without a router, as the next one.
      probability: the router's.
    """

    full: Float[Array, "m P D"]
    compressed: Float[Array, "m Q D"] | None = None
    probability: Float32[Array, " m"] | None = None

    @property
    def tiles(self) -> int:
        return self.full.shape[0]


Features = list[EncodedTiles]


class ImageStore:
    """Keeps the features of the images that were used last.

    Args:
      max_bytes: of all features; the least recently used leave.

    Attributes:
      hits, misses: how many images were found, and not.
      probabilities: the router's, by the hash of the tiles. They outlast the features.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.num_bytes = self.hits = self.misses = 0
        self._features: collections.OrderedDict[Hashable, Features] = collections.OrderedDict()
        self.probabilities: collections.OrderedDict[Hashable, np.ndarray] = (
            collections.OrderedDict()
        )

    def get(self, key: Hashable) -> Features | None:
        """Returns the features of an image, or None."""
        features = self._features.get(key)
        if features is None:
            self.misses += 1
            return None
        self.hits += 1
        self._features.move_to_end(key)
        return features

    def put(self, key: Hashable, features: Features) -> None:
        """Keeps the features of an image; one that is larger than the budget is not kept."""
        size = _num_bytes(features)
        if key in self._features or size > self.max_bytes:
            return
        self._features[key] = features
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            _, oldest = self._features.popitem(last=False)
            self.num_bytes -= _num_bytes(oldest)

    def note(
        self, key: Hashable, probabilities: Float32[np.ndarray, " n"]
    ) -> Float32[np.ndarray, " n"]:
        """Keeps the router's probabilities of an image, and returns them."""
        self.probabilities[key] = probabilities
        if len(self.probabilities) > _MOST_PROBABILITIES:
            self.probabilities.popitem(last=False)
        return probabilities


def _num_bytes(features: Features) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(features))
