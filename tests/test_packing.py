"""Packing: whole samples under both budgets, each with its own segment, positions and tiles;
streams that resume exactly.
"""

import dataclasses
import functools
import itertools
import json
import re

import grain.python as grain
import numpy as np
import pytest
from grain.experimental import assert_equal_output_after_checkpoint

from internvl3_jax.config import UNITS
from internvl3_jax.data.loader import BatchLoader
from internvl3_jax.data.packing import Packer, choose
from internvl3_jax.data.pipeline import make_tokenizer
from tests.support.tiny_checkpoint import CONFIG, PROCESSOR, train_config

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
                "tiles": np.broadcast_to(
                    pixels[:, None, None, None], (tiles, SIZE, SIZE, 3)
                ).copy(),
                "source": number % 3,
                "row": 1000 + number,
                "index": number - 1,
            }
        )
    return samples


class PackedDataset(grain.IterDataset):
    """So that grain's own test of checkpoints can make the iterator anew."""

    def __init__(self, samples, buffer):
        super().__init__()
        self.samples, self.buffer = samples, buffer

    def __iter__(self):
        stream = grain.MapDataset.source(self.samples).to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        )
        return Packer(iter(stream), self.samples.__getitem__, TOKENS, TILES, self.buffer)


def packed(samples, buffer=8):
    return iter(PackedDataset(samples, buffer))


def segments_of(row):
    """The samples of a row, in order, cut out by its segment numbers; what is not theirs must be
    zero.
    """
    segments = row["segments"]
    used = int((segments > 0).sum())
    count = int(segments.max(initial=0))
    assert (np.diff(segments[:used]) >= 0).all() and set(segments[:used]) == set(
        range(1, count + 1)
    )
    assert all((row[name][used:] == 0).all() for name in (*FIELDS, "segments"))
    return [
        {name: row[name][segments == number] for name in FIELDS} for number in range(1, count + 1)
    ]


def test_the_sample_that_best_uses_both_budgets_is_chosen():
    """Worked by hand: room for 10 tokens and 4 tiles, the oldest sample first."""
    sizes = np.array([(4, 2), (7, 0), (3, 2), (5, 0), (6, 2), (1, 0)])
    assert choose(sizes, np.array([10, 4])) == [0, 4]
    assert choose(sizes[:2], np.array([10, 4])) == [0]
    assert choose(sizes[[1, 5]], np.array([10, 0])) == [0, 1], "no tiles at all"


@pytest.mark.parametrize("buffer", [1, 4, 16])
def test_every_sample_is_in_one_piece(buffer):
    samples = make_samples(60)
    found, filled = [], 0
    for row, origins in packed(samples, buffer):
        assert row["tokens"].shape == row["segments"].shape == (TOKENS,) and row["tiles"].shape == (
            TILES,
            SIZE,
            SIZE,
            3,
        )
        assert {row[name].dtype for name in ("tokens", "segments", "positions", "sources")} == {
            np.dtype(np.int32)
        }
        assert (row["loss_weights"].dtype, row["tiles"].dtype) == (np.float32, np.uint8)
        tiles = 0
        parts = segments_of(row)
        assert len(parts) == len(origins)
        for segment, (part, origin) in enumerate(zip(parts, origins, strict=True), 1):
            number = int(part["tokens"][0]) // 100
            sample = samples[number - 1]
            assert origin == (number % 3, 1000 + number)
            assert set(row["sources"][row["segments"] == segment]) == {number % 3}
            for name in FIELDS:
                np.testing.assert_array_equal(
                    part[name], sample[name], err_msg=f"{name} of sample {number}"
                )
            # Its tiles come where those of the samples before it in the row end.
            count = len(sample["tiles"])
            np.testing.assert_array_equal(row["tiles"][tiles : tiles + count], sample["tiles"])
            tiles += count
            found.append(number)
        assert (row["tiles"][tiles:] == 0).all()
        filled += 1
    assert sorted(found) == list(range(1, len(samples) + 1))
    assert filled < len(samples) or buffer == 1


def test_no_sample_waits_for_ever():
    """The oldest opens each row: after n rows, none of the first n is still waiting."""
    stream, seen = packed(make_samples(200), 16), []
    for number in range(40):
        row, _ = next(stream)
        seen += [int(part["tokens"][0]) // 100 for part in segments_of(row)]
        assert set(range(1, number + 2)) <= set(seen)


def test_either_budget_closes_a_row():
    """Many tiles and few tokens, or the reverse: no row takes more than it holds, and what runs out
    first is used up.
    """
    for limits, budget in (({"longest": 3}, "tiles"), ({"most_tiles": 1}, "tokens")):
        rows = [row for row, _ in packed(make_samples(200, **limits), buffer=32)]
        rows = rows[: len(rows) // 2]  # while the buffer is full
        tokens = [int((row["segments"] > 0).sum()) for row in rows]
        tiles = [int((row["tiles"][:, 0, 0, 0] > 0).sum()) for row in rows]
        assert max(tokens) <= TOKENS and max(tiles) <= TILES
        assert np.mean(tokens if budget == "tokens" else tiles) > 0.95 * (
            TOKENS if budget == "tokens" else TILES
        )


def test_text_without_images():
    rows = [row for row, _ in packed(make_samples(20, most_tiles=0))]
    assert sum(len(segments_of(row)) for row in rows) == 20
    assert all((row["tiles"] == 0).all() for row in rows)


@pytest.mark.parametrize(
    ("limits", "name"), [({"longest": TOKENS + 9}, "tokens"), ({"most_tiles": TILES + 3}, "tiles")]
)
def test_a_sample_that_fits_no_row_is_an_error(limits, name):
    with pytest.raises(
        ValueError,
        match=rf"source \d row 10\d\d has \d+ {name}, a row holds \d+: raise data.{name}_per_row",
    ):
        list(packed(make_samples(60, **limits)))


def test_markers_are_counted():
    """What could not be used takes no place, and its reason is handed on."""
    samples = make_samples(20)
    samples[3:3] = [
        {"error": f"why {number}", "source": 0, "row": number, "index": 0} for number in range(12)
    ]
    stream = packed(samples)
    assert sum(len(origins) for _, origins in stream) == 20
    assert (
        stream.skipped_count == 12
        and [marker["error"] for marker in stream.skipped][-1] == "why 11"
    )
    assert stream.get_state()["skipped"] == 12


def test_an_empty_buffer_is_refused():
    with pytest.raises(ValueError, match="packing_buffer"):
        packed(make_samples(2), buffer=0)


def test_the_state_of_a_packed_stream_resumes_exactly():
    assert_equal_output_after_checkpoint(PackedDataset(make_samples(30), 5))


# --- the whole pipeline --------------------------------------------------------------------------


def batches(own=None, **changes):
    config = train_config()
    data = dataclasses.replace(config.data, **changes)
    return BatchLoader(data, PROCESSOR, make_tokenizer(data), own)


@functools.cache
def first_batches(count=12):
    with batches() as stream:
        return list(itertools.islice(stream, count))


def first_rows():
    found = [prepared.batch for prepared in first_batches()]
    return [
        {name: batch[name][row] for name in batch}
        for batch in found
        for row in range(len(batch["tokens"]))
    ]


def assert_same(found, expected):
    assert found.batch.keys() == expected.batch.keys()
    for name, values in expected.batch.items():
        np.testing.assert_array_equal(found.batch[name], values, err_msg=name)


def test_rows_of_the_pipeline_are_consistent():
    """As many tiles as the visual tokens ask for, positions from 0 in each sample, targets that
    follow, answers that are trained.
    """
    for row in first_rows():
        visual = row["tokens"] == CONFIG.image_token_id
        used = int(visual.sum()) // CONFIG.tokens_per_tile
        assert visual.sum() % CONFIG.tokens_per_tile == 0
        assert all(tile.any() for tile in row["tiles"][:used]) and not row["tiles"][used:].any()
        for part in segments_of(row):
            steps = np.diff(part["positions"])
            assert part["positions"][0] == 0 and (steps > 0).all() and (steps < 2 * UNITS).all()
            trained = part["loss_weights"] > 0
            assert (part["targets"][:-1] == part["tokens"][1:]).all() and not trained[-1]
            np.testing.assert_allclose(
                part["loss_weights"][trained], trained.sum() ** -0.5, rtol=1e-6
            )


def test_each_image_draws_its_delta():
    """All of 1, 1/2 and 1/4 occur; within an image the steps are equal, whatever the tile."""
    drawn = set()
    for row in first_rows():
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
    rows = first_rows()
    tokens = np.asarray([(row["segments"] > 0).mean() for row in rows])
    tiles = np.asarray([row["tiles"].any(axis=(1, 2, 3)).mean() for row in rows])
    record_property("fill", {"tokens": float(tokens.mean()), "tiles": float(tiles.mean())})
    assert np.maximum(tokens, tiles).mean() > 0.75
    assert np.mean([row["segments"].max() for row in rows]) > 1.5


def test_batches_resume_from_their_json():
    """The states as a training checkpoint keeps them; the deltas drawn are the same, too."""
    states = json.loads(json.dumps(first_batches()[4].states))
    with batches() as again:
        again.restore(states)
        for expected in first_batches()[5:]:
            assert_same(next(again), expected)


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_sees_the_same_batches(processes):
    """Four streams, read by one process or by several; and one resumes where several stopped."""
    settings = {"shards": 4, "rows": 8}
    with batches(**settings) as alone:
        expected = list(itertools.islice(alone, 5))
    states, rows = {}, 8 // processes
    for process in range(processes):
        own = range(process * 4 // processes, (process + 1) * 4 // processes)
        with batches(own, **settings) as part:
            for number in range(3):
                prepared = next(part)
                for name, values in prepared.batch.items():
                    wanted = expected[number].batch[name][process * rows : (process + 1) * rows]
                    np.testing.assert_array_equal(values, wanted, err_msg=name)
            states |= prepared.states
    with batches(**settings) as alone:
        alone.restore(states)
        assert_same(next(alone), expected[3])


def test_an_error_comes_where_its_batch_would_have():
    """And again at the next call, so that a loop that continues does not hang."""
    with batches(tokens_per_row=16) as stream:
        for _ in range(2):
            with pytest.raises(ValueError, match="a row holds 16"):
                for _ in range(50):
                    next(stream)


@pytest.mark.parametrize("shards", [0, 3])
def test_shards_that_do_not_divide_are_named(shards):
    with pytest.raises(
        ValueError,
        match=re.escape(f"data.rows is 2; it must be a multiple of data.shards ({shards})"),
    ):
        batches(shards=shards)


def test_another_number_of_streams_is_refused():
    with batches(shards=2) as stream, pytest.raises(ValueError, match="data.shards has changed"):
        stream.restore(first_batches()[0].states)
