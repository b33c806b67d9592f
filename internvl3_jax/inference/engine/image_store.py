"""Features of images by the hash of their tiles, within a number of bytes."""

import collections
from collections.abc import Hashable

import jax

Features = list[jax.Array]  # [m,P,D] each: the pieces in which the tiles of an image were encoded


class ImageStore:
    """Keeps the features of the images that were used last.

    Args:
      max_bytes: of all features; the least recently used leave.

    Attributes:
      hits, misses: how many images were found, and not.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.num_bytes = self.hits = self.misses = 0
        self._features: collections.OrderedDict[Hashable, Features] = collections.OrderedDict()

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


def _num_bytes(features: Features) -> int:
    return sum(piece.nbytes for piece in features)
