"""Draws follow the rule of temperature, top-k and top-p, row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl3_jax.inference.sampling import Sampling, sample

draw = jax.jit(sample, static_argnums=2)
LOGITS = np.random.default_rng(0).normal(size=(64, 50)).astype(np.float32) * 2


def draws(logits, sampling, seed=0):
    return np.asarray(draw(logits, jax.random.split(jax.random.key(seed), len(logits)), sampling))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=1e-4),
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=1.0, top_p=1e-6),
        Sampling(temperature=5.0, top_k=3, top_p=0.01),
    ],
    ids=str,
)
def test_limits_that_are_greedy(sampling):
    np.testing.assert_array_equal(draws(LOGITS, sampling), LOGITS.argmax(axis=-1))


def allowed(logits, sampling):
    """bool[V] of the tokens that may be drawn, and their probabilities f64[V], by the rule written
    out.
    """
    order = np.argsort(-logits, kind="stable")
    probabilities = np.exp((logits - logits.max()).astype(np.float64) / sampling.temperature)
    kept = np.zeros(len(logits), bool)
    kept[order[: sampling.top_k or len(logits)]] = True
    probabilities = np.where(kept, probabilities, 0)
    probabilities /= probabilities.sum()
    reached = 0.0
    for token in order:
        if reached >= sampling.top_p:
            kept[token] = False
        reached += probabilities[token]
    probabilities = np.where(kept, probabilities, 0)
    return kept, probabilities / probabilities.sum()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_p=0.9),
        Sampling(temperature=1.5, top_k=5),
        Sampling(temperature=1.5, top_k=20, top_p=0.6),
    ],
    ids=str,
)
def test_draws_follow_the_rule(sampling):
    """Exactly the allowed tokens are drawn, as often as their probabilities say."""
    for logits in LOGITS[:2]:
        kept, probabilities = allowed(logits, sampling)
        count = 20_000
        drawn = draws(np.broadcast_to(logits, (count, len(logits))), sampling)
        share = np.bincount(drawn, minlength=len(logits)) / count
        assert (share[~kept] == 0).all()
        assert (share[kept & (probabilities > 1e-3)] > 0).all()
        assert (
            np.abs(share - probabilities)
            < 5 * np.sqrt(probabilities * (1 - probabilities) / count) + 1e-4
        ).all()


def test_the_nucleus_holds_the_token_that_reaches_top_p():
    probabilities = np.asarray([0.1, 0.4, 0.2, 0.3])
    for top_p, expected in [(0.39, {1}), (0.41, {1, 3}), (0.69, {1, 3}), (0.71, {1, 2, 3})]:
        rows = np.broadcast_to(np.log(probabilities).astype(np.float32), (2000, 4))
        assert set(draws(rows, Sampling(temperature=1.0, top_p=top_p)).tolist()) == expected


def test_a_row_is_drawn_as_if_alone():
    sampling = Sampling(temperature=1.0, top_k=30, top_p=0.95)
    keys = jax.random.split(jax.random.key(3), len(LOGITS))
    together = np.asarray(draw(LOGITS, keys, sampling))
    alone = [int(draw(LOGITS[row : row + 1], keys[row : row + 1], sampling)[0]) for row in range(8)]
    assert together[:8].tolist() == alone
    np.testing.assert_array_equal(
        np.asarray(draw(LOGITS[::-1], keys[::-1], sampling))[::-1], together
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1; it must be 0"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)


@pytest.mark.parametrize("top_p", [1e-45, 1e-40, 1e-12])
def test_the_likeliest_token_is_always_kept(top_p):
    """Also where top_p is 0 in float32."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 50)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 3)
    drawn = sample(logits, keys, Sampling(temperature=1.0, top_p=top_p))
    np.testing.assert_array_equal(np.asarray(drawn)[..., -3:].ravel()[:3], logits.argmax(axis=-1))
