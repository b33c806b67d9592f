"""Dynamic tiling: cuts an image into a grid of square tiles and a thumbnail, bit for bit as the
released model's code.

The rule is that of `dynamic_preprocess` in the InternVL code
(internvl_chat/internvl/train/dataset.py). The grid has at most `max_tiles` tiles and the aspect
nearest to the image's. Pillow resizes the image to the full grid, bicubic and anisotropic. Tiles
are in reading order, followed by the full image squeezed into one more tile. Other bicubic filters
(torchvision, jax.image) give different pixels.
"""

import functools

import numpy as np
from PIL import Image

from internvl3_jax.config import ProcessorConfig


@functools.lru_cache(maxsize=64)
def candidate_grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Lists all (columns, rows) with min_tiles <= columns * rows <= max_tiles, fewest tiles first.

    The order among grids with the same number of tiles does not matter: for limits up to 40 no
    image is equally near to two of them.
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
    """Returns (columns, rows) of the grid whose columns / rows is nearest to width / height.

    Distances are differences of quotients in float64, as the released code computes them; in
    float32 765 x 540 and 289 x 408, among others, get another grid. Between exactly equal distances
    the grid with more tiles wins if the image has more than half of that grid's pixels. Where no
    grid has min_tiles to max_tiles tiles, as when `image_limit` leaves an image fewer than
    min_tiles, the grid is (1, 1), as in the released code.

    Raises:
      ValueError: The image has no pixels, or the limit is below one tile.
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
    """Returns the limit of tiles for each of n_images, thumbnails not counted; at least 1.

    By the rule "per image" it is max_tiles, by "shared" max_tiles / n_images, rounded down. By both
    it is at most processor.max_total_tiles / n_images (64 in VLMEvalKit; InternVL's README,
    transformers and vLLM have no such limit).

    max_tiles: None takes processor.max_tiles.
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
    """Counts the tiles that `cut_tiles` makes of an image, with the thumbnail."""
    return grid_tiles(*image_grid(width, height, processor, max_tiles), processor)


def cut_tiles(
    image: Image.Image, processor: ProcessorConfig, max_tiles: int | None = None
) -> np.ndarray:
    """Cuts an RGB image into tiles u8[n, S, S, 3], S = processor.image_size.

    The grid comes in reading order, then the thumbnail. A grid of one tile has no thumbnail, nor
    has any grid if processor.use_thumbnail is off.

    Args:
      image: As `open_image` returns it.
      max_tiles: Limit without the thumbnail; None takes processor.max_tiles.

    Raises:
      ValueError: The image is not RGB or cannot be tiled (see `choose_grid`).
    """
    if image.mode != "RGB":
        raise ValueError(
            f"cut_tiles needs an RGB image, not mode {image.mode}; open it with "
            f"internvl3_jax.data.media.images.open_image"
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
    """Returns (columns, rows) of `choose_grid` with the settings of a processor."""
    limit = processor.max_tiles if max_tiles is None else max_tiles
    return choose_grid(width, height, processor.min_tiles, limit, processor.image_size)


def grid_tiles(columns: int, rows: int, processor: ProcessorConfig) -> int:
    """Counts the tiles of a grid and its thumbnail, if it has one."""
    return columns * rows + (processor.use_thumbnail and columns * rows > 1)
