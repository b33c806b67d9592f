"""Dynamic tiling: an image becomes a grid of square tiles and a thumbnail, equal bit for bit to
the released model's.

The rule is that of `dynamic_preprocess` in the InternVL code
(internvl_chat/internvl/train/dataset.py): the grid of at most `max_tiles` tiles whose aspect is
nearest to the image's, one anisotropic bicubic resize by Pillow to the whole grid, tiles in
reading order, and the whole image squeezed into one more tile at the end. Other bicubic filters
(torchvision, jax.image) give different pixels.
"""

import functools

import numpy as np
from PIL import Image

from internvl3_jax.config import ProcessorConfig


@functools.lru_cache(maxsize=64)
def candidate_grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) with min_tiles <= columns * rows <= max_tiles, fewest tiles first.

    The order of grids with equally many tiles is free: for limits up to 40 no image is equally
    near to two of them.
    """
    grids = [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    ]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def choose_grid(
    width: int, height: int, min_tiles: int, max_tiles: int, image_size: int
) -> tuple[int, int]:
    """(columns, rows) of the grid whose columns / rows is nearest to width / height.

    Distances are differences of quotients in float64, as the released code computes them; in
    float32 765 x 540 and 289 x 408, among others, get another grid. Between exactly equal distances
    the grid with more tiles wins if the image has more than half of that grid's pixels. Where no
    grid has min_tiles to max_tiles tiles, as when `image_limit` leaves an image fewer than
    min_tiles, the grid is (1, 1), as in the released code.

    Raises:
      ValueError: for an image without pixels or a limit below one tile.
    """
    if width < 1 or height < 1:
        raise ValueError(
            f"an image of {width} x {height} pixels cannot be tiled; both sides must be at least 1"
        )
    if max_tiles < 1:
        raise ValueError(f"max_tiles is {max_tiles}; an image needs at least 1 tile")
    aspect = width / height
    best, smallest = (1, 1), float("inf")
    for columns, rows in candidate_grids(min_tiles, max_tiles):
        distance = abs(aspect - columns / rows)
        grid_pixels = image_size * image_size * columns * rows
        if distance < smallest or (distance == smallest and 2 * width * height > grid_pixels):
            best, smallest = (columns, rows), distance
    return best


def image_limit(processor: ProcessorConfig, n_images: int, max_tiles: int | None = None) -> int:
    """Most tiles of each image of a prompt with n_images, thumbnails not counted, at least 1.

    It is max_tiles by the rule "per image" and an equal part of it, rounded down, by "shared". An
    equal part of processor.max_total_tiles limits it by either rule (VLMEvalKit has 64 in all;
    InternVL's README, transformers and vLLM none).

    max_tiles: processor.max_tiles when None.
    """
    limit = processor.max_tiles if max_tiles is None else max_tiles
    n_images = max(1, n_images)
    if processor.tiles == "shared":
        limit //= n_images
    if processor.max_total_tiles:
        limit = min(limit, processor.max_total_tiles // n_images)
    return max(1, limit)


def count_tiles(
    width: int, height: int, processor: ProcessorConfig, max_tiles: int | None = None
) -> int:
    """Number of tiles `cut_tiles` makes of an image, thumbnail included. max_tiles as in
    `cut_tiles`.
    """
    return grid_tiles(*image_grid(width, height, processor, max_tiles), processor)


def cut_tiles(
    image: Image.Image, processor: ProcessorConfig, max_tiles: int | None = None
) -> np.ndarray:
    """Tiles u8[n, S, S, 3] of an RGB image with S = processor.image_size: the grid in reading
    order, then the thumbnail.

    A grid of one tile has no thumbnail, nor has any grid when processor.use_thumbnail is off.

    Args:
      image: what `open_image` returns.
      max_tiles: limit of this image without its thumbnail; processor.max_tiles when None.

    Raises:
      ValueError: if the image is not RGB or cannot be tiled (see `choose_grid`).
    """
    if image.mode != "RGB":
        raise ValueError(
            f"cut_tiles needs an RGB image, not mode {image.mode}; open it with internvl3_jax.data.media.images.open_image"
        )
    size = processor.image_size
    columns, rows = image_grid(image.width, image.height, processor, max_tiles)
    canvas = np.asarray(image.resize((columns * size, rows * size), Image.Resampling.BICUBIC))
    tiles = np.empty((grid_tiles(columns, rows, processor), size, size, 3), np.uint8)
    grid = tiles[: columns * rows].reshape(rows, columns, size, size, 3)
    grid[...] = canvas.reshape(rows, size, columns, size, 3).swapaxes(1, 2)
    if len(tiles) > columns * rows:
        tiles[-1] = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    return tiles


def image_grid(
    width: int, height: int, processor: ProcessorConfig, max_tiles: int | None = None
) -> tuple[int, int]:
    """`choose_grid` with the settings of a processor."""
    limit = processor.max_tiles if max_tiles is None else max_tiles
    return choose_grid(width, height, processor.min_tiles, limit, processor.image_size)


def grid_tiles(columns: int, rows: int, processor: ProcessorConfig) -> int:
    """Tiles of a grid together with its thumbnail, if it has one."""
    return columns * rows + (processor.use_thumbnail and columns * rows > 1)
