"""One update: micro-batches, devices, packing, remat, what is frozen, and what happens to a step
that is not finite.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from internvl3_jax.config import UNITS
from internvl3_jax.model.internvl import InternVL
from internvl3_jax.model.ops.remat import POLICIES
from internvl3_jax.training.losses import chunked_cross_entropy
from internvl3_jax.training.objective import SftLoss
from internvl3_jax.training.optimizer import make_optimizer
from internvl3_jax.training.param_table import frozen_hash
from internvl3_jax.training.step import (
    TrainState,
    init_state,
    train_step,
    trained_paths,
)
from tests.support.batches import (
    SHAPES,
    batch,
    pack,
    padded,
    sample,
    stack,
)
from tests.support.tiny_checkpoint import CONFIG, random_params
from tests.support.train_step import (
    GRADIENT,
    MODEL,
    PARAMS,
    SETTINGS,
    assert_close,
    by_path,
    compiled_step,
    first_state,
)


def update(values, config=SETTINGS, model=MODEL, steps=1, **settings):
    """(state, metrics) after some updates."""
    optimizer = make_optimizer(config, 100)
    state = first_state(optimizer)
    step = compiled_step(optimizer, state, values, model, **settings)
    for _ in range(steps):
        state, metrics = step(state, values, jax.random.key(0))
    return state, metrics


def descent(values, model=MODEL, **settings):
    """(updated parameters, metrics) with the optimizer above."""
    state = first_state(GRADIENT)
    state, metrics = compiled_step(GRADIENT, state, values, model, **settings)(
        state, values, jax.random.key(0)
    )
    return state.params, metrics


@functools.cache
def expected(count=4):
    """Of the batch as a whole, on one device."""
    return descent(batch(count), num_sources=3)


# --- the same update in other ways ---------------------------------------------------------------


def test_micro_batches_are_the_batch():
    """One row each; several rows each are in test_several_devices_are_one."""
    assert_close(descent(batch(), micro_batches=4, num_sources=3, chunk=10), expected())


def test_micro_batches_must_divide_the_rows():
    with pytest.raises(ValueError, match="micro_batches is 3; it must divide the batch's 4 rows"):
        descent(batch(), micro_batches=3)


def test_several_devices_are_one():
    """Two rows a device in two micro-batches; with parameters on each of them, no collective but
    sums.
    """
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, jax.P("data")), NamedSharding(mesh, jax.P())
    state = jax.device_put(first_state(GRADIENT), everywhere)
    values = jax.device_put(batch(8), rows)
    with jax.set_mesh(mesh):
        step = compiled_step(GRADIENT, state, values, micro_batches=2, num_sources=3)
        done, metrics = step(state, values, jax.random.key(0))
    assert_close((done.params, metrics), expected(8))
    text = step.as_text()
    assert "all-reduce(" in text
    assert not any(
        f"{kind}(" in text for kind in ("all-gather", "all-to-all", "collective-permute")
    )


def test_packed_rows_are_separate_rows():
    """Loss and gradients: several images, mixed deltas, text without images."""
    samples = [sample(shape, seed, source=seed % 3) for seed, shape in enumerate(SHAPES[:4])]
    assert_close(descent(pack(samples), num_sources=3), expected())


@pytest.mark.parametrize(
    ("policy", "unroll"), [*((policy, 1) for policy in POLICIES[1:]), ("full", 2)]
)
def test_recomputing_changes_no_gradient(policy, unroll):
    model = InternVL(CONFIG, scan_unroll=unroll, remat_vision=policy, remat_language=policy)
    assert_close(descent(batch(), model, num_sources=3), expected())


def test_recomputing_saves_memory():
    """As the compiler counts it: the less is kept, the less is held, in the tower and in the
    decoder alike.
    """
    deep = {"num_layers": 12, "intermediate_size": 128}
    config = dataclasses.replace(
        CONFIG,
        vision=dataclasses.replace(CONFIG.vision, **deep),
        language=dataclasses.replace(CONFIG.language, **deep),
    )
    params = jax.eval_shape(lambda: random_params(config))

    def held(**policies):
        state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, ())
        return (
            compiled_step(GRADIENT, state, batch(), InternVL(config, **policies))
            .memory_analysis()
            .temp_size_in_bytes
        )

    none, language, both = (
        held(),
        held(remat_language="full"),
        held(remat_vision="full", remat_language="full"),
    )
    assert language < 0.95 * none and both < 0.8 * language and both < 0.6 * none


def test_an_unknown_policy_is_named():
    with pytest.raises(
        ValueError, match="'all' is not one of none, dots, attention, full, offload"
    ):
        jax.eval_shape(InternVL(CONFIG, remat_vision="all").init, jax.random.key(0), batch())


# --- which tokens are learned from ---------------------------------------------------------------


def test_a_sample_learns_nothing_from_its_neighbors():
    """The gradient of one sample's loss by the tiles and by the words of the others in its row is
    exactly zero.
    """
    samples = [sample([(1, 64)], 1), sample([(1, UNITS)], 2), sample([(1, 128)], 3)]
    row, ours = pack(samples), 2
    words = row["tokens"][0] != CONFIG.image_token_id
    # each sample has its own
    row["tokens"][0, words] = row["segments"][0, words] * 100 + np.arange(words.sum()) % 100
    row["loss_weights"] = np.where(row["segments"] == ours, row["loss_weights"], 0).astype(
        np.float32
    )

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(embedding, tiles):
        params = PARAMS | {"language": PARAMS["language"] | {"embedding": embedding}}
        hidden = MODEL.apply({"params": params}, row | {"tiles": tiles}, method=InternVL.hidden)
        kernel = params["language"]["head"]["kernel"]
        return chunked_cross_entropy(
            hidden, kernel, row["targets"], row["loss_weights"], CONFIG.language.vocab_size
        )[0]

    by_word, by_tile = gradients(
        PARAMS["language"]["embedding"], row["tiles"].astype(np.float32) / 255
    )
    assert (
        np.abs(by_tile[0, ours - 1]).max() > 0 and not np.delete(by_tile[0], ours - 1, axis=0).any()
    )
    touched = np.flatnonzero(np.abs(by_word).max(axis=1))
    assert len(touched) and set(touched) <= set(range(100 * ours, 100 * ours + 100))


def test_the_losses_of_sources():
    """Their sums over tokens, and together the loss."""
    _, metrics = expected()
    values = batch()
    for source in range(3):
        only = values | {
            "loss_weights": np.where(values["sources"] == source, values["loss_weights"], 0).astype(
                np.float32
            )
        }
        _, alone = descent(only)
        np.testing.assert_allclose(
            metrics["source_loss"][source], alone["loss"] * alone["weight"], rtol=1e-5
        )
        np.testing.assert_allclose(metrics["source_weight"][source], alone["weight"], rtol=1e-5)
    np.testing.assert_allclose(
        metrics["source_loss"].sum() / metrics["weight"], metrics["loss"], rtol=1e-5
    )
    norms = [metrics[f"grad_norm_{name}"] for name in ("vision", "projector", "language")]
    np.testing.assert_allclose(np.linalg.norm(norms), metrics["grad_norm"], rtol=1e-5)


# --- what is frozen ------------------------------------------------------------------------------

# the compiler counts the operations of a loop's body once
UNROLLED = InternVL(CONFIG, scan_unroll=2)


def test_frozen_parts_stay_as_they_are():
    freeze = ("vision/.*", "language/layers/.*", "language/head/.*")
    state, metrics = update(batch(), dataclasses.replace(SETTINGS, freeze=freeze), steps=3)
    assert frozen_hash(state.params, freeze) == frozen_hash(PARAMS, freeze)
    before, after = by_path(PARAMS), by_path(state.params)
    assert {path for path in before if np.array_equal(before[path], after[path])} == {
        path
        for path in before
        if path.startswith(("vision/", "language/layers/", "language/head/"))
    }
    assert "grad_norm_vision" not in metrics and metrics["grad_norm_projector"] > 0
    assert frozen_hash(update(batch())[0].params, freeze) != frozen_hash(PARAMS, freeze)


def test_a_frozen_tower_has_no_backward_pass():
    """Two thirds of its operations are gone from the program."""

    def operations(*freeze):
        optimizer = make_optimizer(dataclasses.replace(SETTINGS, freeze=freeze), 100)
        state = jax.eval_shape(lambda: first_state(optimizer))
        return compiled_step(optimizer, state, batch(), UNROLLED).cost_analysis()["flops"]

    tiles = batch()["tiles"].reshape(-1, *batch()["tiles"].shape[2:])
    tower = jax.jit(
        lambda params: UNROLLED.apply(
            {"params": params}, tiles, method=lambda model, x: model.vision(x)
        )
    )
    forward = tower.lower(PARAMS).compile().cost_analysis()["flops"]
    assert operations() - operations("vision/.*") > 1.7 * forward


@pytest.mark.parametrize("frozen", [False, True])
def test_drop_path_is_for_a_tower_that_learns(frozen):
    model = InternVL(
        dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, drop_path=0.8))
    )
    config = dataclasses.replace(SETTINGS, freeze=("vision/.*",) if frozen else ())
    loss = float(update(batch(), config, model)[1]["loss"])
    assert (abs(loss - float(expected()[1]["loss"])) < 1e-5) is frozen


# --- precision, and what is wrong ----------------------------------------------------------------


def test_bfloat16_compute_with_float32_parameters():
    exact, metrics = expected()
    params, rounded = descent(
        batch(), InternVL(CONFIG, jnp.bfloat16, remat_vision="dots"), num_sources=3
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    np.testing.assert_allclose(rounded["loss"], metrics["loss"], rtol=2e-2)
    moves = [
        np.concatenate(
            [(a - b).ravel() for a, b in zip(*map(jax.tree.leaves, (x, PARAMS)), strict=True)]
        )
        for x in (exact, params)
    ]
    assert np.dot(*moves) > 0.99 * np.prod([np.linalg.norm(move) for move in moves])


def test_bfloat16_parameters_keep_their_type():
    """And so does the whole state, so that the next step is the same program."""
    optimizer = make_optimizer(SETTINGS, 100)
    state = jax.eval_shape(lambda: init_state(MODEL, optimizer, batch(), 0, jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("bfloat16")}
    after, _ = jax.eval_shape(
        functools.partial(train_step, SftLoss(MODEL), optimizer), state, batch(), jax.random.key(0)
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )


def test_a_step_that_is_not_finite_changes_nothing():
    """An infinity among the parameters, and a batch without a trained token; the same program goes
    on with the next batch.
    """
    optimizer, key = make_optimizer(SETTINGS, 100), jax.random.key(0)
    state, _ = update(batch())
    step = compiled_step(optimizer, state, batch())
    bad = jax.tree.map(np.array, state.params)
    bad["projector"]["fc1"]["kernel"][0, 0] = np.inf
    silent = batch() | {"loss_weights": np.zeros_like(batch()["loss_weights"])}
    for before, values in ((state._replace(params=bad), batch()), (state, silent)):
        after, metrics = step(before, values, key)
        assert not metrics["finite"]
        jax.tree.map(np.testing.assert_array_equal, after, before)
    after, metrics = step(state, batch(), key)
    assert metrics["finite"] and after.step == 2


def test_a_leaf_without_gradient_is_named():
    text = stack([padded(sample([], seed)) for seed in range(4)])
    _, metrics = descent(text)
    paths = trained_paths(PARAMS, GRADIENT)
    assert metrics["finite"] and paths[int(metrics["zero_gradient"])] == "projector/fc1/bias"
    assert metrics["grad_norm_projector"] == 0 < metrics["grad_norm_language"]
    assert expected()[1]["zero_gradient"] == -1 and len(paths) == len(by_path(PARAMS))
