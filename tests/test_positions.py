"""Positions of text and visual tokens (V2PE), against a step-by-step float64 reading of the rule."""

import math
from fractions import Fraction

import numpy as np
import pytest

from internvl3_jax.config import UNITS
from internvl3_jax.positions import (
    DELTAS,
    build_positions,
    next_position,
    parse_delta,
    sample_deltas,
)

LAST_WHOLE = 8_388_607  # (2**31 - 1) // 256


def step_by_step(length, runs, deltas):
    """The published rule, one token at a time in float64: exact here, since every position is a
    small multiple of 1/256.
    """
    owner = {start + k: image for image, (start, count) in enumerate(runs) for k in range(count)}
    positions = []
    for index in range(length):
        previous = positions[-1] if positions else None
        if previous is None:
            positions.append(0.0)
        elif index in owner:
            positions.append(previous + deltas[owner[index]] / UNITS)
        else:
            positions.append(float(math.ceil(previous)) + 1.0)
    return np.array(positions, np.float64)


def assert_follows_rule(length, runs, deltas):
    positions = build_positions(length, runs, deltas)
    assert positions.dtype == np.int32 and positions.shape == (length,)
    np.testing.assert_array_equal(positions / UNITS, step_by_step(length, runs, deltas))
    return positions


def test_worked_example_of_the_docstring():
    positions = build_positions(6, [(2, 2)], [64])
    np.testing.assert_array_equal(positions, [0, 256, 320, 384, 768, 1024])


def test_text_only_counts_up():
    np.testing.assert_array_equal(build_positions(5, [], []), np.arange(5) * UNITS)
    assert build_positions(0, [], []).shape == (0,)


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize(
    ("length", "runs"),
    [
        (20, [(1, 16)]),  # the image comes first, after <img>
        (18, [(2, 16)]),  # the sequence ends inside the run, as a truncated sample does
        (20, [(0, 16)]),  # nothing before the run
        (16, [(0, 16)]),  # nothing but the run
        (300, [(7, 256)]),
        (700, [(5, 512), (530, 16), (560, 1)]),
        (40, [(1, 16), (18, 16)]),  # </img> alone between two runs
    ],
)
def test_equals_step_by_step(length, runs, delta):
    assert_follows_rule(length, runs, [delta] * len(runs))


def test_random_sequences_with_a_delta_for_each_image():
    rng = np.random.default_rng(7)
    for _ in range(200):
        runs, free = [], int(rng.integers(0, 3))
        for _ in range(rng.integers(0, 6)):
            count = int(rng.choice([1, 3, 16, 48, 80]))
            runs.append((free, count))
            free += count + int(rng.integers(1, 6))
        length = free + int(rng.integers(0, 5))
        deltas = [int(delta) for delta in rng.integers(1, UNITS + 1, len(runs))]
        assert_follows_rule(length, runs, deltas)


def test_delta_one_is_plain_positions():
    runs = [(2, 16), (30, 3328), (3400, 256)]
    np.testing.assert_array_equal(build_positions(4000, runs, [UNITS] * 3), np.arange(4000) * UNITS)


def test_one_run_covers_all_tiles():
    tiles, per_tile = 13, 256
    positions = build_positions(tiles * per_tile + 2, [(1, tiles * per_tile)], [parse_delta("1/4")])
    assert set(np.diff(positions[:-1])) == {64}
    assert positions[-1] == (tiles * per_tile // 4 + 1) * UNITS


def test_text_after_a_partial_step_is_at_the_next_integer_position():
    # 16 tokens at 1/256 end at 16/256 after <img>, so </img> is at 1 + 1 after it.
    positions = build_positions(20, [(1, 16)], [1])
    assert positions[16] == 16
    assert positions[17] == 2 * UNITS and positions[18] == 3 * UNITS


def test_positions_are_distinct_far_beyond_65536():
    text, visual = 8_000_000, 3328
    positions = build_positions(text + visual + 2, [(text, visual)], [1])
    steps = np.diff(positions[text - 1 :].astype(np.int64))
    assert np.all(steps[:visual] == 1) and np.all(steps >= 1)
    collapsed = np.unique((positions[text : text + visual] / UNITS).astype(np.float32))
    assert len(collapsed) < visual, "float32 would have been enough, so this test proves nothing"


def test_overflow_is_an_error():
    positions = build_positions(LAST_WHOLE + 1, [], [])
    assert positions[-1] == LAST_WHOLE * UNITS
    with pytest.raises(ValueError, match=r"position 8,388,608, beyond 8,388,607"):
        build_positions(LAST_WHOLE + 2, [], [])
    with pytest.raises(ValueError, match="beyond"):
        next_position(positions[-1:])
    # The same number of tokens fits where an image takes smaller steps.
    assert build_positions(LAST_WHOLE + 2, [(5, 256)], [128])[-1] < LAST_WHOLE * UNITS


def test_next_position():
    assert next_position(build_positions(0, [], [])) == 0
    assert next_position(build_positions(5, [], [])) == 5 * UNITS
    assert (
        next_position(build_positions(20, [(1, 16)], [64]))
        == build_positions(21, [(1, 16)], [64])[-1]
    )
    for delta in (1, 64, 100, 256):
        ends_inside_run, one_longer = (
            build_positions(17, [(1, 16)], [delta]),
            build_positions(18, [(1, 16)], [delta]),
        )
        assert next_position(ends_inside_run) == one_longer[-1]


@pytest.mark.parametrize(
    ("runs", "deltas", "message"),
    [
        ([(0, 4)], [], "1 images but 0 deltas"),
        ([(0, 4)], [0], r"image 0 .*delta 0 is not an integer"),
        ([(0, 4)], [257], "delta 257"),
        ([(0, 4)], [0.25], r"delta 0\.25 .* use parse_delta"),
        ([(0, 4)], [True], "delta True"),
        ([(0, 0)], [64], "has 0 context tokens"),
        ([(-1, 4)], [64], "inside the 20 tokens"),
        ([(17, 4)], [64], "inside the 20 tokens"),
        ([(2, 4), (5, 4)], [64, 64], "image 1 .*overlaps or touches"),
        ([(2, 4), (6, 4)], [64, 64], "image 1 .*overlaps or touches"),
        ([(10, 4), (2, 4)], [64, 64], "image 1 .*overlaps or touches"),
    ],
)
def test_bad_runs_and_deltas_are_errors(runs, deltas, message):
    with pytest.raises(ValueError, match=message):
        build_positions(20, runs, deltas)


def test_negative_length_is_an_error():
    with pytest.raises(ValueError, match="-1 tokens"):
        build_positions(-1, [], [])


@pytest.mark.parametrize(
    ("value", "units"),
    [
        ("1/4", 64),
        ("0.25", 64),
        (" 1 ", 256),
        (0.25, 64),
        (1, 256),
        (1.0, 256),
        (Fraction(1, 256), 1),
    ]
    + [(np.float32(0.5), 128), (np.int64(1), 256), ("3/256", 3), ("1/256", 1)],
)
def test_parse_delta(value, units):
    parsed = parse_delta(value)
    assert parsed == units and type(parsed) is int


@pytest.mark.parametrize(
    "value", [0, -0.25, "2", 1.5, "1/3", 1 / 512, Fraction(1, 3), Fraction(257, 256)]
)
def test_delta_out_of_range_is_an_error(value):
    with pytest.raises(ValueError, match="multiple of 1/256"):
        parse_delta(value)


@pytest.mark.parametrize(
    "value", ["", "quarter", "1/0", None, True, float("nan"), float("inf"), [0.25]]
)
def test_delta_that_is_no_number_is_an_error(value):
    with pytest.raises(ValueError, match="is not a number"):
        parse_delta(value)


def test_deltas_are_drawn_from_the_published_set_and_repeat_with_the_seed():
    drawn = sample_deltas(900, np.random.default_rng(3))
    assert drawn == sample_deltas(900, np.random.default_rng(3))
    assert drawn != sample_deltas(900, np.random.default_rng(4))
    counts = [drawn.count(delta) for delta in DELTAS]
    assert sum(counts) == 900 and min(counts) > 60  # 100 expected of each
    assert sample_deltas(0, np.random.default_rng(0)) == []
    build_positions(40, [(1, 16), (20, 16)], sample_deltas(2, np.random.default_rng(0)))
