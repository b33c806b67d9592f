"""Packing: whole samples under both budgets, each with its own segment, positions and tiles; a stream that resumes exactly."""

import functools
import itertools
import json

import grain.python as grain
import numpy as np
import pytest
from grain.experimental import assert_equal_output_after_checkpoint
from tiny_checkpoint import CONFIG, PROCESSOR, train_config

from internvl3_jax.config import UNITS
from internvl3_jax.data.packing import pack
from internvl3_jax.data.pipeline import make_batches, make_tokenizer

TOKENS, TILES, SIZE = 32, 6, 2
FIELDS = ("tokens", "targets", "loss_weights", "positions")


def make_samples(count, seed=0, longest=TOKENS, most_tiles=TILES):
    """Samples that tell from every value which of them it belongs to, and where."""
    rng = np.random.default_rng(seed)
    samples = []
    for number in range(1, count + 1):
        length, tiles = int(rng.integers(1, longest + 1)), int(rng.integers(0, most_tiles + 1))
        tokens = 100 * number + np.arange(length, dtype=np.int32)
        pixels = 10 * (number % 25) + np.arange(tiles, dtype=np.uint8) + 1
        samples.append(
            {
                "tokens": tokens,
                "targets": tokens + 1,
                "loss_weights": rng.random(length, np.float32),
                "positions": rng.integers(0, 99, length, dtype=np.int32),
                "tiles": np.broadcast_to(pixels[:, None, None, None], (tiles, SIZE, SIZE, 3)).copy(),
            }
        )
    return samples


def packed(samples, rows=1, bins=4):
    stream = grain.MapDataset.source(samples).to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
    return pack(stream, rows, TOKENS, TILES, bins)


def segments_of(row):
    """The samples of a row, in order, cut out by its segment numbers; what is not theirs must be zero."""
    segments = row["segments"]
    used = int((segments > 0).sum())
    count = int(segments.max(initial=0))
    assert (np.diff(segments[:used]) >= 0).all() and set(segments[:used]) == set(range(1, count + 1))
    assert all((row[name][used:] == 0).all() for name in (*FIELDS, "segments"))
    return [{name: row[name][segments == number] for name in FIELDS} for number in range(1, count + 1)]


def rows_of(batches):
    return [{name: batch[name][row] for name in batch} for batch in batches for row in range(len(batch["tokens"]))]


@pytest.mark.parametrize("bins", [1, 4, 16])
def test_every_sample_is_in_one_piece(bins):
    samples = make_samples(60)
    found, filled = [], 0
    for row in rows_of(packed(samples, bins=bins)):
        assert row["tokens"].shape == row["segments"].shape == (TOKENS,) and row["tiles"].shape == (TILES, SIZE, SIZE, 3)
        assert (row["tokens"].dtype, row["segments"].dtype, row["positions"].dtype) == (np.int32, np.int32, np.int32)
        assert (row["loss_weights"].dtype, row["tiles"].dtype) == (np.float32, np.uint8)
        tiles = 0
        for part in segments_of(row):
            number = int(part["tokens"][0]) // 100
            sample = samples[number - 1]
            for name in FIELDS:
                np.testing.assert_array_equal(part[name], sample[name], err_msg=f"{name} of sample {number}")
            # Its tiles come where those of the samples before it in the row end.
            count = len(sample["tiles"])
            np.testing.assert_array_equal(row["tiles"][tiles : tiles + count], sample["tiles"])
            tiles += count
            found.append(number)
        assert (row["tiles"][tiles:] == 0).all()
        filled += 1
    assert sorted(found) == list(range(1, len(samples) + 1))
    assert filled < len(samples)


def test_either_budget_closes_a_row():
    """Many tiles and few tokens, or the reverse: no row takes more than it holds."""
    for limits in ({"longest": 3}, {"most_tiles": 1}):
        samples = make_samples(40, **limits)
        rows = rows_of(packed(samples))
        assert sum(len(segments_of(row)) for row in rows) == 40
        tokens = [int((row["segments"] > 0).sum()) for row in rows[:-4]]
        tiles = [int((row["tiles"][:, 0, 0, 0] > 0).sum()) for row in rows[:-4]]
        assert max(tokens) <= TOKENS and max(tiles) <= TILES
        assert np.mean(tokens) > 0.7 * TOKENS or np.mean(tiles) > 0.7 * TILES


def test_text_without_pictures():
    samples = make_samples(20, most_tiles=0)
    rows = rows_of(packed(samples))
    assert sum(len(segments_of(row)) for row in rows) == 20
    assert all((row["tiles"] == 0).all() for row in rows)


def test_a_batch_has_its_rows():
    batches = list(packed(make_samples(60), rows=3))
    assert {batch["tokens"].shape for batch in batches} == {(3, TOKENS)}


@pytest.mark.parametrize("limits", [{"longest": TOKENS + 9}, {"most_tiles": TILES + 3}], ids=str)
def test_a_sample_that_fits_no_row_is_an_error(limits):
    with pytest.raises(ValueError):
        list(packed(make_samples(60, **limits)))


def test_the_state_of_a_packed_stream_resumes_exactly():
    assert_equal_output_after_checkpoint(packed(make_samples(30), rows=2, bins=3))


# --- the whole pipeline ----------------------------------------------------------------------------------------------------------


@functools.cache
def pipeline(**changes):
    config = train_config()
    return make_batches(config.data, PROCESSOR, make_tokenizer(config.data))


@functools.cache
def first_batches(count=12):
    return list(itertools.islice(iter(pipeline()), count))


def test_rows_of_the_pipeline_are_consistent():
    """As many tiles as the visual tokens ask for, positions from 0 in each sample, targets that follow, answers that are trained."""
    for row in rows_of(first_batches()):
        visual = row["tokens"] == CONFIG.image_token_id
        used = int(visual.sum()) // CONFIG.tokens_per_tile
        assert visual.sum() % CONFIG.tokens_per_tile == 0
        assert all(tile.any() for tile in row["tiles"][:used]) and not row["tiles"][used:].any()
        for part in segments_of(row):
            steps = np.diff(part["positions"])
            assert part["positions"][0] == 0 and (steps > 0).all() and (steps < 2 * UNITS).all()
            trained = part["loss_weights"] > 0
            assert (part["targets"][:-1] == part["tokens"][1:]).all() and not trained[-1]
            np.testing.assert_allclose(part["loss_weights"][trained], trained.sum() ** -0.5, rtol=1e-6)


def test_each_picture_draws_its_delta():
    """All of 1, 1/2 and 1/4 occur; within a picture the steps are equal, whatever the tile."""
    drawn = set()
    for row in rows_of(first_batches()):
        for part in segments_of(row):
            visual = part["tokens"] == CONFIG.image_token_id
            starts = np.flatnonzero(visual & ~np.roll(visual, 1))
            for start in starts:
                end = start + int(np.argmin(visual[start:]))
                steps = set(np.diff(part["positions"][start - 1 : end]).tolist())
                assert len(steps) == 1
                drawn |= steps
    assert drawn == {UNITS, UNITS // 2, UNITS // 4}


def test_rows_are_well_filled(record_property):
    """By tokens or by tiles, whichever a row runs out of first."""
    rows = rows_of(first_batches())
    tokens = np.asarray([(row["segments"] > 0).mean() for row in rows])
    tiles = np.asarray([row["tiles"].any(axis=(1, 2, 3)).mean() for row in rows])
    record_property("fill", {"tokens": float(tokens.mean()), "tiles": float(tiles.mean())})
    assert np.maximum(tokens, tiles).mean() > 0.75
    assert np.mean([row["segments"].max() for row in rows]) > 1.5


def test_the_pipeline_resumes_from_its_json():
    """The state as a training checkpoint keeps it; the deltas drawn are the same, too."""
    iterator = iter(pipeline())
    for _ in range(5):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    again = iter(pipeline())
    again.set_state(state)
    for expected in first_batches()[5:]:
        for batch in (next(iterator), next(again)):
            for name, values in expected.items():
                np.testing.assert_array_equal(batch[name], values, err_msg=name)
