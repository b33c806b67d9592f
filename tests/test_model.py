"""Properties of the model that hold whatever the weights: counts, causality, isolation of packed
samples, V2PE, merging, drop path.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl3_jax.config import UNITS
from internvl3_jax.inference.sampling import Sampling, sample
from internvl3_jax.model.internvl import InternVL, abstract_params, count_params, merge
from internvl3_jax.model.vision import VisionBlock, VisionTower
from internvl3_jax.sizes import SIZES
from tests.support.batches import IMAGE, PER_TILE, make_row, pack, pad
from tests.support.published import PUBLISHED, TOTALS
from tests.support.tiny_checkpoint import CONFIG, LANGUAGE, VISION, random_params

MODEL = InternVL(CONFIG)
PARAMS = random_params(CONFIG)


@jax.jit
def _apply(params, batch):
    return MODEL.apply({"params": params}, batch)


def apply(batch):
    return np.asarray(_apply(PARAMS, batch))


def logits(row):
    """f32[T,V] of one row, which is computed with padding so that all of them share one program."""
    length = row["tokens"].shape[1]
    return apply(pad(row, 64, 5, filler=0))[0, :length]


# --- counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts(size):
    config = SIZES[size]
    counts = count_params(config)
    if size in PUBLISHED:
        assert (counts["vision"], counts["projector"], counts["language"]) == PUBLISHED[size]
    if size in TOTALS:
        assert sum(counts.values()) == TOTALS[size]
    held = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract_params(config)))
    language = config.language
    assert (
        language.padded_vocab_size % 256 == 0
        and 0 <= language.padded_vocab_size - language.vocab_size < 256
    )
    assert (
        held - sum(counts.values())
        == 2 * (language.padded_vocab_size - language.vocab_size) * language.hidden_size
    )


def test_every_published_size_is_there():
    assert set(SIZES) == {"tiny", *PUBLISHED}


def test_tied_embeddings_save_one_matrix():
    tied = dataclasses.replace(CONFIG, language=dataclasses.replace(LANGUAGE, tie_embeddings=True))
    saved = LANGUAGE.vocab_size * LANGUAGE.hidden_size
    assert count_params(CONFIG)["language"] - count_params(tied)["language"] == saved
    assert "head" not in abstract_params(tied)["language"]


# --- which tokens see which ----------------------------------------------------------------------


LONGEST = 32  # tokens of the rows below, padding included
# a plain sum is nearly constant after the norm
WEIGHTS = np.random.default_rng(1).normal(size=LANGUAGE.hidden_size)


@jax.jit
@functools.partial(jax.jacrev, argnums=0)
def _by_embedding(x, params, positions, segments):
    decode = functools.partial(
        MODEL.apply, {"params": params}, method=lambda model, *args: model.language(*args)[0]
    )
    return decode(x, positions, segments)[0] @ WEIGHTS


@jax.jit
@functools.partial(jax.jacrev, argnums=0)
def _by_tile(tiles, params, row):
    return (
        MODEL.apply({"params": params}, row | {"tiles": tiles}, method=InternVL.hidden)[0] @ WEIGHTS
    )


def influence(row):
    """bool[T,T]: whether the hidden state of token t changes with the embedding of token s, by
    gradient.
    """
    x = np.random.default_rng(0).normal(size=(1, LONGEST, LANGUAGE.hidden_size)).astype(np.float32)
    gradient = _by_embedding(x, PARAMS, row["positions"], row["segments"])
    return np.abs(gradient[:, 0]).max(axis=-1) > 0


def tile_influence(row):
    """bool[T,N]: whether the hidden state of token t changes with tile n, by gradient."""
    gradient = _by_tile(row["tiles"].astype(np.float32) / 255, PARAMS, row)
    return np.abs(gradient[:, 0]).max(axis=(-3, -2, -1)) > 0


def test_a_token_sees_itself_and_what_comes_before():
    row = make_row([(1, UNITS), (1, 64)], text=8)
    np.testing.assert_array_equal(influence(row), np.tril(np.ones((LONGEST, LONGEST), bool)))


def test_order_decides_and_not_positions():
    """Positions that repeat or go back hide nothing and show nothing."""
    row = make_row(text=LONGEST)
    row["positions"] = np.random.default_rng(0).integers(0, 6, (1, LONGEST), dtype=np.int32) * UNITS
    np.testing.assert_array_equal(influence(row), np.tril(np.ones((LONGEST, LONGEST), bool)))


def test_packed_samples_do_not_see_each_other():
    row = pad(
        pack([make_row([(1, 64)], 1), make_row(seed=2), make_row([(1, UNITS)], 3)]),
        LONGEST,
        3,
        filler=1,
    )
    segments = row["segments"][0]
    same = segments[:, None] == segments[None]
    np.testing.assert_array_equal(influence(row), np.tril(same))
    seen = tile_influence(row)
    for tile, segment in enumerate([1, 3]):
        first = np.flatnonzero((row["tokens"][0] == IMAGE) & (segments == segment))[0]
        expected = (segments == segment) & (np.arange(len(segments)) >= first)
        np.testing.assert_array_equal(seen[:, tile], expected)
    assert not seen[:, 2].any()  # a tile that no token asks for


def test_padding_changes_nothing():
    row = make_row([(2, 64)])
    length = row["tokens"].shape[1]
    padded = logits(row)
    np.testing.assert_allclose(padded, apply(row)[0], rtol=1e-5, atol=1e-5)
    other = apply(pad(row, 64, 5, filler=7))[0]
    np.testing.assert_array_equal(other[:length], padded)
    assert np.isfinite(other).all()


def test_another_row_changes_nothing():
    rows = [
        pad(row, 20, 2, 0) for row in (make_row([(2, 64)], 1), make_row([(1, UNITS), (1, 1)], 2))
    ]
    batch = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    before = apply(batch)
    changed = {name: np.concatenate([value[:1], value[1:] // 2]) for name, value in batch.items()}
    after = apply(changed | {"positions": batch["positions"] * np.int32([[1], [2]])})
    np.testing.assert_array_equal(after[0], before[0])
    assert np.abs(after[1] - before[1]).max() > 0.1


# --- V2PE ----------------------------------------------------------------------------------------


def test_packed_rows_of_mixed_deltas_are_separate_rows():
    rows = [
        make_row([(2, 64)], 1),
        make_row(seed=2),
        make_row([(1, 1), (1, UNITS)], 3),
        make_row([(1, 128)], 4, text=1),
    ]
    packed = logits(pack(rows))
    separate = np.concatenate([logits(row) for row in rows])
    np.testing.assert_allclose(packed, separate, rtol=1e-5, atol=1e-5)


def test_delta_one_is_ordinary_positions():
    row = make_row([(2, UNITS), (1, UNITS)])
    plain = row | {"positions": np.arange(row["tokens"].shape[1], dtype=np.int32)[None] * UNITS}
    np.testing.assert_array_equal(row["positions"], plain["positions"])
    np.testing.assert_array_equal(logits(row), logits(plain))


@pytest.mark.parametrize("delta", [1, 64, 128])
def test_delta_matters_from_the_second_visual_token_on(delta):
    row, plain = make_row([(1, delta)]), make_row([(1, UNITS)])
    difference = np.abs(logits(row) - logits(plain)).max(axis=-1)
    start = int(np.flatnonzero(row["tokens"][0] == IMAGE)[0])
    # The token before the run is at a whole position, and the first visual token is delta behind
    # it.
    assert (difference[:start] == 0).all()
    assert (difference[start:] > 1e-4).all()


def test_only_differences_of_positions_matter():
    row = make_row([(2, 64)])
    moved = row | {"positions": row["positions"] + 100 * UNITS}
    np.testing.assert_allclose(logits(moved), logits(row), rtol=1e-5, atol=1e-5)


# --- merging -------------------------------------------------------------------------------------


def test_merge_is_row_local_and_in_order():
    rng = np.random.default_rng(0)
    visual = rng.random((5, 12)) < [[0.0], [0.3], [0.5], [0.5], [0.4]]
    visual[3] = np.arange(12) < 8  # as many as there are features
    visual[:, 8:] &= visual[:, :8].sum(axis=1, keepdims=True) < 4
    assert visual.sum(axis=1).max() == 8 and not visual[0].any()
    embeddings, features = rng.normal(size=(5, 12, 3)), rng.normal(size=(5, 8, 3))
    expected = embeddings.copy()
    for row in range(5):
        expected[row, visual[row]] = features[row, : visual[row].sum()]
    merged = merge(jnp.asarray(embeddings, jnp.float32), jnp.asarray(features, jnp.float32), visual)
    np.testing.assert_array_equal(merged, expected.astype(np.float32))


def test_tiles_go_to_their_tokens():
    """The merged embeddings hold every tile's features at that tile's tokens, and the text's
    embeddings elsewhere.
    """
    batch = pack([make_row([(2, 64)], 1), make_row([(1, UNITS)], 2)])
    _, state = jax.jit(
        lambda params: MODEL.apply({"params": params}, batch, mutable=["intermediates"])
    )(PARAMS)
    merged = np.asarray(state["intermediates"]["merged"][0])[0]
    features = np.asarray(state["intermediates"]["projector"]["projected"][0])
    assert features.shape == (3, PER_TILE, LANGUAGE.hidden_size)
    assert len(np.unique(features.round(3), axis=0)) == 3
    visual = batch["tokens"][0] == IMAGE
    np.testing.assert_array_equal(merged[visual], features.reshape(-1, LANGUAGE.hidden_size))
    np.testing.assert_array_equal(
        merged[~visual], PARAMS["language"]["embedding"][batch["tokens"][0][~visual]]
    )


# --- drop path -----------------------------------------------------------------------------------

DROPPING = dataclasses.replace(VISION, num_layers=3, drop_path=0.8)


@functools.cache
def tower_outputs():
    """(with drop path f32[K,L,M,P,C] under K keys, without it f32[L,M,P,C]): the output of every
    block.
    """
    params = random_params(dataclasses.replace(CONFIG, vision=DROPPING))["vision"]
    tiles = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)

    def blocks(params, config, deterministic, **rngs):
        tower = VisionTower(config, jnp.float32)
        _, state = tower.apply(
            {"params": params}, tiles, deterministic, mutable=["intermediates"], **rngs
        )
        return state["intermediates"]["layers"]["block"][0]

    @jax.jit
    def compute(params, keys):
        dropped = jax.vmap(lambda key: blocks(params, DROPPING, False, rngs={"drop_path": key}))(
            keys
        )
        whole = blocks(params, DROPPING, True)
        # With a rate of 0 no random numbers are asked for, in training neither.
        return dropped, whole, blocks(params, dataclasses.replace(DROPPING, drop_path=0.0), False)

    dropped, whole, off = compute(params, jax.random.split(jax.random.key(0), 40))
    np.testing.assert_array_equal(off, whole)
    return np.asarray(dropped), np.asarray(whole)


def test_drop_path_spares_the_first_block():
    dropped, whole = tower_outputs()
    np.testing.assert_allclose(
        dropped[:, 0], np.broadcast_to(whole[0], dropped[:, 0].shape), rtol=1e-5, atol=1e-5
    )


def test_drop_path_drops_whole_tiles_each_on_its_own():
    dropped, _ = tower_outputs()
    # both branches of the last block dropped: 0.64 of the cases
    same = dropped[:, 2] == dropped[:, 1]
    per_tile = same.all(axis=(-2, -1))
    assert 0.4 < per_tile.mean() < 0.85
    assert (per_tile[:, 0] != per_tile[:, 1]).any()
    second = (dropped[:, 1] == dropped[:, 0]).all(axis=(-2, -1))  # rate 0.4: 0.16 of the cases
    assert 0.02 < second.mean() < 0.35


def test_drop_path_keeps_the_expectation():
    block = VisionBlock(DROPPING, jnp.float32)
    layers = random_params(dataclasses.replace(CONFIG, vision=DROPPING))["vision"]["layers"]
    params = jax.tree.map(lambda leaf: leaf[0], layers)
    branch = np.arange(1.0, 7.0, dtype=np.float32).reshape(1, 2, 3)

    def draw(key):
        rngs = {"drop_path": key}
        return block.apply(
            {"params": params},
            branch,
            0.8,
            False,
            rngs=rngs,
            method=lambda block, *args: block.drop_path(*args),
        )

    draws = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 4000)))
    kept = draws.reshape(4000, -1).any(axis=1)
    np.testing.assert_allclose(
        draws[kept], np.broadcast_to(branch / 0.2, draws[kept].shape), rtol=1e-5
    )
    assert abs(kept.mean() - 0.2) < 0.025  # four standard deviations
    assert not draws[~kept].any()


# --- head and attention --------------------------------------------------------------------------


def test_padding_of_the_vocabulary_is_never_drawn():
    assert LANGUAGE.padded_vocab_size > LANGUAGE.vocab_size
    hidden = np.random.default_rng(0).normal(size=(1, 1, LANGUAGE.hidden_size)).astype(np.float32)
    masked = jax.jit(
        lambda hidden: MODEL.apply({"params": PARAMS}, hidden, method=InternVL.logits)
    )(hidden)[0, 0]
    assert masked.shape == (LANGUAGE.padded_vocab_size,) and masked.dtype == jnp.float32
    assert (np.asarray(masked[LANGUAGE.vocab_size :]) < -1e29).all()
    keys = jax.random.split(jax.random.key(1), 4000)
    rows = jnp.broadcast_to(masked, (len(keys), len(masked)))
    for sampling in (
        Sampling(temperature=100.0),
        Sampling(temperature=1e-3),
        Sampling(temperature=100.0, top_k=500, top_p=0.9999),
    ):
        drawn = np.asarray(jax.jit(sample, static_argnums=2)(rows, keys, sampling))
        assert drawn.max() < LANGUAGE.vocab_size
    assert logits(make_row()).shape[-1] == LANGUAGE.vocab_size
