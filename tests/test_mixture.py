"""Sources are mixed with the shares asked for, and rows are repeated, cut off or left out as said."""

import dataclasses

import numpy as np
import pytest

from internvl3_jax.data.pipeline import mix
from internvl3_jax.data.sources.catalog import open_sources
from internvl3_jax.data.sources.meta import MetaError
from internvl3_jax.data.sources.mixture import Selection, mixture_weights, read_drop_list
from tests.support.official_data import data_config, turns, write_meta
from tests.support.sample_stream import make, take

TEXT = {"conversations": turns("hi", "ho")}


@pytest.mark.parametrize(("repeat", "expected"), [(0.5, 5), (0.7, 7), (1, 10), (2, 20), (2.35, 23)])
def test_repeats_and_head_slices(repeat, expected):
    rows = [Selection(3, 10, repeat)[index] for index in range(expected)]
    assert len(Selection(3, 10, repeat)) == expected
    assert rows == [(3, place % 10) for place in range(expected)]


def test_rows_left_out():
    selection = Selection(0, 10, 2.5, excluded=[0, 4, 9, 4])
    rows = [selection[index][1] for index in range(len(selection))]
    assert rows == [place % 10 for place in range(25) if place % 10 not in (0, 4, 9)]


def shares(config):
    sources = open_sources(config)
    return mixture_weights(
        config, sources, [len(Selection(0, len(source), source.repeat)) for source in sources]
    )


def test_the_mixture_has_the_shares_asked_for(tmp_path):
    image = {"image": "a.png", **TEXT}
    meta = write_meta(
        tmp_path,
        big={"rows": [image] * 90, "weight": 1},
        text={"rows": [TEXT] * 10, "weight": 1, "repeat_time": 4},
        mixed={"rows": [TEXT] * 9 + [image], "weight": 6},
        more={"rows": [TEXT] * 40, "weight": 0},
    )
    config = data_config(meta)
    total = 90 + 40 + 10 + 40
    np.testing.assert_allclose(shares(config), np.array([90, 40, 10, 40]) / total)
    roots = np.sqrt([90, 40, 10, 40])
    np.testing.assert_allclose(
        shares(dataclasses.replace(config, source_weights="sqrt")), roots / roots.sum()
    )
    np.testing.assert_allclose(
        shares(dataclasses.replace(config, source_weights="given")), [0.125, 0.125, 0.75, 0]
    )
    # Text to the rest as 1 to 3; a source with some of each belongs to the rest.
    np.testing.assert_allclose(
        shares(dataclasses.replace(config, text_fraction=0.25)), [0.675, 0.125, 0.075, 0.125]
    )
    np.testing.assert_allclose(
        shares(dataclasses.replace(config, text_fraction=0.0)), [0.9, 0, 0.1, 0]
    )
    np.testing.assert_allclose(
        shares(dataclasses.replace(config, text_fraction=1.0)), [0, 0.5, 0, 0.5]
    )


def test_the_stream_has_the_shares_of_the_mixture_in_every_shard():
    weights = [0.675, 0.125, 0.2, 0.0]
    mixed = mix([Selection(number, 30, 1.0) for number in range(4)], weights, seed=0)
    drawn = np.array([mixed[index][0] for index in range(1024)])
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 1024, weights, atol=0.005)
    even = mix([Selection(number, 30, 1.0) for number in range(2)], [0.5, 0.5], seed=0)
    assert 0.4 < np.mean([even[index][0] for index in range(0, 1024, 2)]) < 0.6


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"source_weights": "log"}, "data.source_weights is 'log'"),
        ({"source_weights": "given"}, "no weight for text"),
        ({"text_fraction": 2.0}, "at most 1"),
        ({"text_fraction": 0.5}, "no source with images"),
        ({"on_bad_sample": "ignore"}, "data.on_bad_sample is 'ignore'"),
        ({"min_frames": 9}, "data.min_frames is 9"),
        ({"deltas": ("2",)}, "delta '2'"),
        ({"overlong": "cut"}, "data.overlong is 'cut'"),
        ({"loss_reduction": "mean"}, "data.loss_reduction is 'mean'"),
    ],
    ids=str,
)
def test_wrong_settings_are_named_at_once(tmp_path, changes, reason):
    meta = write_meta(tmp_path, text={"rows": [TEXT]})
    with pytest.raises(ValueError, match=reason):
        make(meta, **changes)


def test_the_drop_list(tmp_path):
    meta = write_meta(tmp_path, a={"rows": [TEXT] * 4}, b={"rows": [TEXT] * 2})
    (tmp_path / "drop.tsv").write_text("# source\trow\treason\na\t1\tbad\na\t3\tworse\n\n")
    samples = take(make(meta, exclude_file=str(tmp_path / "drop.tsv")), 40)
    assert {(s["source"], s["row"]) for s in samples} == {(0, 0), (0, 2), (1, 0), (1, 1)}
    for line, reason in [
        ("c\t1\tx", "no source 'c'"),
        ("a\t9\tx", "a has no row '9'"),
        ("a", "a has no row ''"),
    ]:
        (tmp_path / "drop.tsv").write_text(f"\n{line}\n")
        with pytest.raises(ValueError, match=f"drop.tsv line 2: .*{reason}"):
            read_drop_list(str(tmp_path / "drop.tsv"), ["a", "b"], [4, 2])
    (tmp_path / "drop.tsv").write_text("b\t0\tx\nb\t1\tx\n")
    with pytest.raises(MetaError, match="source 'b': .* leave none of its rows"):
        make(meta, exclude_file=str(tmp_path / "drop.tsv"))
