"""JPEG recompression, the only augmentation of InternVL's training."""

import io

import numpy as np
from PIL import Image

QUALITIES = range(75, 101)


def recompress(tiles: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Writes each tile of u8[n, S, S, 3] as JPEG and reads it again.

    The quality of each is sampled uniformly from 75..100. InternVL's code does the same, but
    recompresses a video frame before it is resized to a tile.
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
