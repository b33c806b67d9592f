"""Dynamic tiling, against an exhaustive reading of the rule, transformers' helper and Pillow."""

import dataclasses
import itertools

import numpy as np
import pytest
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)

from internvl3_jax.config import ProcessorConfig
from internvl3_jax.data.batch import cut_images
from internvl3_jax.data.media.tiles import choose_grid, count_tiles, cut_tiles, image_limit

PROCESSOR = ProcessorConfig()
TINY = ProcessorConfig(image_size=32, tokens_per_tile=16)
LIMITS = (1, 6, 12, 24)
SIZES = [(width, height) for width in range(28, 1401, 14) for height in range(28, 1401, 14)] + [
    *[(1, n) for n in (1, 2, 3, 5, 11, 12, 13, 100, 50_000)],
    *[(n, 1) for n in (2, 3, 5, 11, 12, 13, 100, 50_000)],
    (765, 540),
    (289, 408),
    (8192, 8192),
    (10_000, 6_667),
]


def grid_by_rule(width, height, smallest, largest, side, number=float):
    """The rule read literally: look at every grid, few tiles first, and keep a running best.
    `number` is the float type.
    """
    aspect = number(width) / number(height)
    best_grid, best_difference = (1, 1), None
    for area in range(smallest, largest + 1):
        for columns in range(1, area + 1):
            if area % columns:
                continue
            rows = area // columns
            difference = abs(aspect - number(columns) / number(rows))
            if best_difference is None or difference < best_difference:
                best_grid, best_difference = (columns, rows), difference
            elif (
                difference == best_difference
                and width * height > 0.5 * side * side * columns * rows
            ):
                best_grid = (columns, rows)
    return best_grid


def cut_by_hand(image, side, limit, thumbnail=True):
    """One crop at a time, as the released code does it."""
    columns, rows = grid_by_rule(image.width, image.height, 1, limit, side)
    canvas = image.resize((columns * side, rows * side))
    tiles = []
    for index in range(columns * rows):
        left, top = index % columns * side, index // columns * side
        tiles.append(canvas.crop((left, top, left + side, top + side)))
    if thumbnail and columns * rows > 1:
        tiles.append(image.resize((side, side)))
    return np.stack([np.asarray(tile) for tile in tiles])


def noise(width, height, seed=0):
    """An image with structure at every scale, so that any change of filter or order shows."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 120, width)[None, :, None] + np.linspace(0, 100, height)[:, None, None]
    pixels = ramp + rng.integers(0, 36, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def test_the_table_is_large_enough():
    assert len(set(SIZES)) >= 5000


@pytest.mark.parametrize("limit", LIMITS)
def test_grid_follows_the_rule(limit):
    for width, height in SIZES:
        assert choose_grid(width, height, 1, limit, 448) == grid_by_rule(
            width, height, 1, limit, 448
        ), (width, height)


@pytest.mark.parametrize("limit", LIMITS)
def test_grid_equals_transformers(limit):
    for width, height in SIZES:
        expected = get_optimal_tiled_canvas((height, width), (448, 448), 1, limit)
        assert choose_grid(width, height, 1, limit, 448) == expected, (width, height)


@pytest.mark.parametrize(
    ("smallest", "largest", "side"),
    [(1, 12, 32), (2, 6, 448), (4, 9, 336), (5, 5, 28), (12, 24, 448)],
)
def test_grid_with_other_limits_and_tile_sizes(smallest, largest, side):
    for width, height in SIZES[::7]:
        assert choose_grid(width, height, smallest, largest, side) == grid_by_rule(
            width, height, smallest, largest, side
        )


def test_exact_ties_go_to_the_larger_grid_only_with_enough_pixels():
    # 1x1, 2x2 and 3x3 are equally near to a square. A grid needs more than half of its own pixels:
    # 2 * side**2 for 2x2.
    assert choose_grid(448, 448, 1, 12, 448) == (1, 1)
    assert choose_grid(633, 633, 1, 12, 448) == (1, 1)  # 400,689 pixels of more than 401,408
    assert choose_grid(634, 634, 1, 12, 448) == (2, 2)
    assert choose_grid(950, 950, 1, 12, 448) == (2, 2)  # 902,500 of more than 903,168
    assert choose_grid(951, 951, 1, 12, 448) == (3, 3)
    assert choose_grid(90, 45, 1, 8, 32) == (2, 1)  # 4,050 pixels of more than 4,096 for 4x2
    assert choose_grid(92, 46, 1, 8, 32) == (4, 2)
    assert choose_grid(96, 64, 1, 24, 32) == (3, 2)  # 6,144 pixels of more than 12,288 for 6x4
    # 1.5 is equally far from 1/1 and 2/1, the only choices with two tiles.
    assert choose_grid(300, 200, 1, 2, 448) == (1, 1)
    assert choose_grid(900, 600, 1, 2, 448) == (2, 1)


@pytest.mark.parametrize("size", [(765, 540), (289, 408)])
def test_quotients_need_float64(size):
    chosen = choose_grid(*size, 1, 12, 448)
    assert chosen == grid_by_rule(*size, 1, 12, 448)
    assert chosen != grid_by_rule(*size, 1, 12, 448, number=np.float32), (
        "float32 would have been enough"
    )


def test_pinned_grids():
    """Values of the released rule, written down so that an error shared with the oracles above
    cannot hide.
    """
    pinned = {
        (1920, 1080): (4, 2),
        (1080, 1920): (2, 4),
        (800, 600): (4, 3),
        (640, 480): (4, 3),
        (3000, 2000): (3, 2),
    }
    pinned |= {
        (224, 224): (1, 1),
        (1, 50_000): (1, 12),
        (50_000, 1): (12, 1),
        (2480, 3508): (2, 3),
        (1170, 2532): (2, 4),
    }
    assert {size: choose_grid(*size, 1, 12, 448) for size in pinned} == pinned


def test_equally_large_grids_are_never_equally_near():
    """What makes the scan order within an area irrelevant: another grid is always nearer to the
    point between the two.
    """
    for limit in range(1, 41):
        grids = [
            (columns, rows)
            for columns in range(1, limit + 1)
            for rows in range(1, limit // columns + 1)
        ]
        ratios = {columns / rows for columns, rows in grids}
        for (c1, r1), (c2, r2) in itertools.combinations(grids, 2):
            if c1 * r1 == c2 * r2:
                low, high = sorted((c1 / r1, c2 / r2))
                assert any(low < ratio < high for ratio in ratios), (limit, c1, r1, c2, r2)


def test_no_grid_within_the_limits_means_one_tile():
    assert choose_grid(2000, 500, 6, 3, 448) == (1, 1) == grid_by_rule(2000, 500, 6, 3, 448)


@pytest.mark.parametrize(
    ("width", "height", "largest", "message"),
    [(0, 5, 12, "0 x 5"), (5, -1, 12, "5 x -1"), (5, 5, 0, "max_tiles")],
)
def test_impossible_grids_are_errors(width, height, largest, message):
    with pytest.raises(ValueError, match=message):
        choose_grid(width, height, 1, largest, 448)


COUNTS = (0, 1, 2, 3, 5, 7, 12, 13, 65)


@pytest.mark.parametrize(
    ("rule", "total", "limits"),
    [
        ("per image", 0, [12] * 9),  # InternVL3's README, transformers, vLLM
        ("shared", 0, [12, 12, 6, 4, 2, 1, 1, 1, 1]),  # InternVL's training scripts
        ("per image", 64, [12, 12, 12, 12, 12, 9, 5, 4, 1]),  # VLMEvalKit: max(1, min(12, 64 // n))
        ("shared", 5, [5, 5, 2, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_limit_of_each_image(rule, total, limits):
    processor = dataclasses.replace(PROCESSOR, tiles=rule, max_total_tiles=total)
    assert [image_limit(processor, n) for n in COUNTS] == limits
    assert [image_limit(processor, n, max_tiles=12) for n in COUNTS] == limits
    assert image_limit(processor, 2, max_tiles=3) == {"per image": 3, "shared": 1}[rule]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tiles": "each"}, "processor.tiles is 'each'; .*'per image', 'shared'"),
        ({"max_total_tiles": -1}, "max_total_tiles is -1"),
    ],
)
def test_wrong_tile_rules(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PROCESSOR, **change)
    with pytest.raises(ValueError, match=message):
        cut_images([noise(9, 9)], PROCESSOR, **change)


@pytest.mark.parametrize("count", [1, 2, 4, 11, 65])
def test_tiles_and_pixels_of_several_images_equal_transformers(count):
    """The processor of transformers' InternVL: each image has its own limit, however many there
    are.
    """
    rng = np.random.default_rng(count)
    images = [noise(*(int(side) for side in rng.integers(8, 90, 2)), seed) for seed in range(count)]
    size = {"height": 14, "width": 14}
    theirs = GotOcr2ImageProcessorPil(
        size=size, crop_to_patches=True, max_patches=12, do_rescale=False, do_normalize=False
    )(images, return_tensors="np")
    ours = cut_images(images, ProcessorConfig(image_size=14))
    assert [len(part) for part in ours] == list(theirs["num_patches"])
    assert count < 4 or max(theirs["num_patches"]) == 13
    np.testing.assert_array_equal(
        np.concatenate(ours), theirs["pixel_values"].transpose(0, 2, 3, 1)
    )


@pytest.mark.parametrize(("count", "tiles"), [(1, 13), (2, 7), (4, 1), (11, 1), (65, 1)])
def test_tiles_of_several_images_by_the_rule_of_training(count, tiles):
    """`max(1, max_dynamic_patch // num_image)` of InternVL's dataset.py, for images of 4 x 3."""
    shared = cut_images([noise(64, 48)] * count, TINY, tiles="shared")
    assert [len(part) for part in shared] == [tiles] * count
    capped = cut_images([noise(64, 48)] * count, TINY, max_total_tiles=64)
    assert [len(part) - (len(part) > 1) for part in capped] == [
        {1: 12, 2: 12, 4: 12, 11: 4, 65: 1}[count]
    ] * count


@pytest.mark.parametrize("limit", [1, 6, 12])
@pytest.mark.parametrize(
    "size",
    [
        (1, 1),
        (1, 300),
        (300, 1),
        (448, 448),
        (500, 499),
        (765, 540),
        (289, 408),
        (1003, 717),
        (97, 1201),
        (1344, 896),
    ],
)
def test_pixels_equal_resizes_and_crops_by_pillow(size, limit):
    image = noise(*size)
    np.testing.assert_array_equal(
        cut_tiles(image, PROCESSOR, limit), cut_by_hand(image, 448, limit)
    )


@pytest.mark.parametrize(
    "processor",
    [TINY, dataclasses.replace(PROCESSOR, image_size=50), dataclasses.replace(TINY, image_size=28)],
)
def test_pixels_with_other_tile_sizes(processor):
    rng = np.random.default_rng(1)
    for index in range(60):
        width, height = (int(side) for side in rng.integers(1, 400, 2))
        image, limit = noise(width, height, index), int(rng.integers(1, 25))
        np.testing.assert_array_equal(
            cut_tiles(image, processor, limit), cut_by_hand(image, processor.image_size, limit)
        )


@pytest.mark.parametrize("size", [(640, 480), (90, 300), (448, 448), (765, 540)])
def test_pixels_equal_transformers_pillow_backend(size):
    image = noise(*size)
    theirs = GotOcr2ImageProcessorPil(
        size={"height": 448, "width": 448},
        crop_to_patches=True,
        max_patches=12,
        do_rescale=False,
        do_normalize=False,
    )(image, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(cut_tiles(image, PROCESSOR), theirs.transpose(0, 2, 3, 1))


def test_tiles_are_in_reading_order_with_the_thumbnail_last():
    side = TINY.image_size
    blocks = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    image = Image.fromarray(np.repeat(np.repeat(blocks, side, 0), side, 1)).convert("RGB")
    tiles = cut_tiles(image, dataclasses.replace(TINY, max_tiles=6))
    assert tiles.shape == (7, side, side, 3) and tiles.dtype == np.uint8
    assert [int(tile[side // 2, side // 2, 0]) for tile in tiles[:6]] == [0, 40, 80, 120, 160, 200]
    assert tiles[6].min() < 10 and tiles[6].max() > 190


def test_thumbnail_only_where_asked_for_and_only_beside_several_tiles():
    wide, square = noise(96, 32), noise(32, 32)
    without = dataclasses.replace(TINY, use_thumbnail=False)
    assert len(cut_tiles(wide, TINY)) == 4 and len(cut_tiles(wide, without)) == 3
    assert len(cut_tiles(square, TINY)) == len(cut_tiles(square, without)) == 1
    np.testing.assert_array_equal(cut_tiles(wide, TINY)[:3], cut_tiles(wide, without))


def test_count_equals_what_is_cut():
    rng = np.random.default_rng(2)
    for processor in (
        TINY,
        dataclasses.replace(TINY, use_thumbnail=False),
        dataclasses.replace(TINY, min_tiles=3, max_tiles=8),
    ):
        for _ in range(30):
            width, height = (int(side) for side in rng.integers(1, 300, 2))
            for limit in (None, 1, 5):
                count = count_tiles(width, height, processor, limit)
                assert count == len(cut_tiles(noise(width, height), processor, limit))
    assert count_tiles(1344, 1792, PROCESSOR) == 13


def test_only_rgb_images_are_cut():
    with pytest.raises(ValueError, match="not mode L; .*open_image"):
        cut_tiles(Image.new("L", (10, 10)), PROCESSOR)


def test_the_image_and_the_tiles_share_no_memory():
    image = noise(32, 32)
    before = np.asarray(image).copy()
    cut_tiles(image, TINY)[:] = 0
    np.testing.assert_array_equal(np.asarray(image), before)
