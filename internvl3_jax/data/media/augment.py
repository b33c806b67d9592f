"""The one augmentation of InternVL's training: JPEG recompression."""

import io

import numpy as np
from PIL import Image

QUALITIES = range(75, 101)


def recompress(tiles: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Tiles u8[n,S,S,3], each written as JPEG and read again, at a quality of its own drawn
    uniformly from 75..100.

    As in the reference, but for video frames: there it comes before the frame is resized to a tile.
    """
    qualities = rng.integers(QUALITIES.start, QUALITIES.stop, len(tiles))
    return np.stack(
        [_through_jpeg(tile, int(quality)) for tile, quality in zip(tiles, qualities, strict=True)]
    )


def _through_jpeg(tile: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(tile).save(file, format="JPEG", quality=quality)
    file.seek(0)
    return np.asarray(Image.open(file))
