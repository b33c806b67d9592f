"""Training of InternVL3.5-Flash: rows with compressed tiles, the consistency loss, the router's
targets, and a run of both stages.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from internvl3_jax import load
from internvl3_jax.checkpoints.checkpoint import save_checkpoint
from internvl3_jax.config import UNITS, ConfigError, LoraConfig, LossConfig, OptimizerConfig
from internvl3_jax.data.packing import join
from internvl3_jax.inference import flash
from internvl3_jax.model.internvl import InternVL, abstract_params
from internvl3_jax.training import vico
from internvl3_jax.training.add_router import new_parts
from internvl3_jax.training.checks import validate
from internvl3_jax.training.flash_loss import RouterLoss, VicoLoss
from internvl3_jax.training.objective import batch_totals
from tests.support import tiny_checkpoint
from tests.support.generation import make_prompt
from tests.support.lora_setup import start as fit
from tests.support.tiny_checkpoint import FLASH, PROCESSOR, changed, random_params, train_config

PARAMS = random_params(FLASH)
ROUTER = ("flash/(pooling|gating)/.*",)
ALL_BUT_ROUTER = ("vision/.*", "projector/.*", "language/.*", "flash/projector/.*")
ALL_BUT_ROUTER += ("flash/pooling/(attn|norm)[34]/.*",)


def sample(prompt, seed):
    """A sample whose last four tokens are trained."""
    rng, length = np.random.default_rng(seed), len(prompt.tokens)
    weights = np.zeros(length, np.float32)
    weights[-4:] = rng.random(4).astype(np.float32) + 0.5
    size = FLASH.vision.image_size
    return {
        "tokens": prompt.tokens,
        "targets": np.append(prompt.tokens[1:], 0).astype(np.int32),
        "loss_weights": weights,
        "positions": prompt.positions,
        "tiles": np.concatenate([np.zeros((0, size, size, 3), np.uint8), *prompt.tiles]),
    }


PROMPTS = [
    [
        make_prompt([(2, 64), (1, UNITS)], seed=1),
        make_prompt(seed=2),
        make_prompt([(3, 1)], seed=3),
    ],
    [make_prompt([(1, 128)], seed=4, text=9), make_prompt([(2, UNITS)], seed=5)],
]


def make_batch(rows=PROMPTS, length=96, tiles=8):
    packed = [
        join([sample(prompt, 10 * row + i) for i, prompt in enumerate(prompts)], length, tiles)
        for row, prompts in enumerate(rows)
    ]
    names = ("tokens", "targets", "loss_weights", "positions", "segments", "tiles")
    return {name: np.stack([row[name] for row in packed]) for name in names}


def test_compressed_rows_are_those_of_inference():
    """Ids, V2PE positions, weights and features, row by row, against prompts that were compressed
    on the host and packed again.
    """
    batch = make_batch()
    chosen = np.random.default_rng(0).random((2, 8)) < 0.5
    found, place = vico.compress_rows(batch, jnp.asarray(chosen), FLASH)
    by_hand = []
    for row, prompts in enumerate(PROMPTS):
        tile, samples = 0, []
        for i, prompt in enumerate(prompts):
            counts = [len(tiles) for tiles in prompt.tiles]
            own = np.split(chosen[row, tile : tile + sum(counts)], np.cumsum(counts)[:-1])
            tile += sum(counts)
            few = flash.compress(prompt, own[: len(counts)], FLASH) if counts else prompt
            samples.append(sample(few, 10 * row + i))
        by_hand.append(join(samples, 96, 8))
    for name in ("tokens", "positions", "loss_weights", "segments"):
        expected = np.stack([row[name] for row in by_hand])
        used = np.stack([row["segments"] for row in by_hand]) > 0
        np.testing.assert_array_equal(np.asarray(found[name])[used], expected[used], err_msg=name)
    assert (np.asarray(found["segments"]) > 0).sum() == used.sum()
    moved = np.take_along_axis(np.asarray(found["loss_weights"]), np.asarray(place), axis=1)
    np.testing.assert_array_equal(moved, batch["loss_weights"])
    features = np.asarray(found["features"])[used & (np.asarray(found["tokens"]) == 453)]
    wanted = []
    for row in range(2):
        tiles = int((batch["tokens"][row] == 453).sum()) // 4
        for tile in range(tiles):
            wanted += [8 * 4 + tile] if chosen[row, tile] else range(4 * tile, 4 * tile + 4)
    np.testing.assert_array_equal(features, wanted)


def test_without_compression_the_rows_are_as_they_were():
    batch = make_batch()
    found, place = vico.compress_rows(batch, jnp.zeros((2, 8), bool), FLASH)
    for name in batch:
        np.testing.assert_array_equal(found[name], batch[name], err_msg=name)
    np.testing.assert_array_equal(place, np.broadcast_to(np.arange(96), (2, 96)))
    model = InternVL(FLASH)
    features, _ = model.apply({"params": PARAMS}, batch["tiles"], method=InternVL.all_features)
    ours = model.apply({"params": PARAMS}, found | {"visual": features}, method=InternVL.hidden)
    plain = model.apply({"params": PARAMS}, batch, method=InternVL.hidden)
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


def test_the_divergence_is_that_of_torch():
    rng = np.random.default_rng(0)
    hidden, wanted = rng.standard_normal((2, 2, 7, 5)).astype(np.float32)
    kernels = rng.standard_normal((2, 5, 12)).astype(np.float32)
    weights = rng.random((2, 7)).astype(np.float32)

    def loss(hidden, kernel):
        found = vico.divergence((hidden, kernel), (wanted, kernels[1]), 11, 3)
        return (found * weights).sum(), found

    (_, found), slopes = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, kernels[0])
    theirs = [torch.tensor(x, requires_grad=True) for x in (hidden, kernels[0])]
    policy = (theirs[0] @ theirs[1])[..., :11].log_softmax(-1)
    reference = torch.tensor(wanted @ kernels[1])[..., :11].log_softmax(-1)
    expected = torch.nn.functional.kl_div(policy, reference, reduction="none", log_target=True)
    expected = expected.sum(-1)
    (expected * torch.tensor(weights)).sum().backward()
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-4, atol=1e-5)
    for slope, other in zip(slopes, theirs, strict=True):
        np.testing.assert_allclose(slope, other.grad.numpy(), rtol=1e-4, atol=1e-5)


def test_the_consistency_loss_is_zero_of_equal_models_and_equal_tokens():
    batch = make_batch()
    same = VicoLoss(InternVL(FLASH), config=LossConfig(kind="vico", compress_share=0.0))
    some = VicoLoss(InternVL(FLASH), config=LossConfig(kind="vico", compress_share=1.0))
    totals, key = batch_totals(batch), jax.random.key(0)
    run = jax.jit(lambda loss: loss(PARAMS, batch, key, (), totals, PARAMS)[0], static_argnums=0)
    assert abs(float(run(same))) < 1e-5 and float(run(some)) > 1e-2


@pytest.mark.parametrize(("share", "spread"), [(0.0, 0.0), (0.5, 1.0), (0.8, 0.4), (1.0, 0.0)])
def test_a_random_mix_has_the_share_and_differs_between_samples(share, spread):
    batch = make_batch()
    keys = jax.random.split(jax.random.key(0), 4000)
    mixes = jax.jit(jax.vmap(lambda key: vico.random_mix(key, batch, share, FLASH)))(keys)
    np.testing.assert_allclose(mixes.mean(axis=0), share, atol=0.025)
    # Both of two tiles: E[p^2], with p uniform between `spread` apart.
    both = np.asarray(mixes[:, 0, 0] & mixes[:, 0, 1]).mean()
    np.testing.assert_allclose(both, share**2 + spread**2 / 12, atol=0.025)
    others = np.asarray(mixes[:, 0, 0] & mixes[:, 0, 3]).mean()
    np.testing.assert_allclose(others, share**2, atol=0.025)


def test_each_tile_has_its_turn_and_costs_its_own_sample():
    batch = make_batch()
    samples, first = np.asarray(vico.samples_of_tiles(batch, FLASH)), set()
    np.testing.assert_array_equal(samples, [[1, 1, 1, 3, 3, 3, 0, 0], [1, 2, 2, 0, 0, 0, 0, 0]])
    for seed in range(20):
        turns = np.asarray(vico.turns_of_tiles(jax.random.key(seed), samples))
        for row, number in ((0, 1), (0, 3), (1, 1), (1, 2)):
            own = turns[row][samples[row] == number]
            assert sorted(own) == list(range(len(own)))
        first |= set(zip(*np.nonzero((turns == 0) & (samples > 0)), strict=True))
    assert len(first) == 9
    counts = vico.tiles_alike(jnp.asarray((turns < 2) & (samples > 0)), jnp.asarray(samples))
    np.testing.assert_array_equal(np.asarray(counts)[samples > 0], [2, 2, 2, 2, 2, 2, 1, 2, 2])
    losses = jnp.asarray(batch["segments"], jnp.float32)
    found = np.asarray(vico.tile_losses(losses, batch, samples))
    np.testing.assert_allclose(found[samples > 0], samples[samples > 0], rtol=1e-5)


def test_the_ratio_of_a_tile_is_that_of_its_compression_alone():
    batch = make_batch()
    loss = RouterLoss(InternVL(FLASH), config=LossConfig(kind="router", router_tiles=2))
    reference = loss.outputs(random_params(FLASH, seed=3), batch)
    features, _ = loss.features(PARAMS, batch)
    samples = vico.samples_of_tiles(batch, FLASH)
    turns = vico.turns_of_tiles(jax.random.key(0), samples)
    ratios, _ = loss.ratios(PARAMS, batch, features, reference, turns, samples)

    @jax.jit
    def cost(compressed):
        losses = loss.losses(PARAMS, batch, features, compressed, reference)
        return vico.tile_losses(losses, batch, samples)

    without = cost(jnp.zeros((2, 8), bool))
    for row, tile in zip(*np.nonzero(np.asarray(samples)), strict=True):
        alone = cost(jnp.zeros((2, 8), bool).at[row, tile].set(True))
        expected = (alone / without)[row, tile] if turns[row, tile] < 2 else 0.0
        np.testing.assert_allclose(ratios[row, tile], expected, rtol=1e-4)


def test_the_window_keeps_the_last_ratios_and_their_quantile():
    window = vico.init_window(4)
    ratios = jnp.asarray([[1.0, 9.0, 2.0], [3.0, 9.0, 9.0]])
    present = jnp.asarray([[True, False, True], [True, False, False]])
    window = vico.add_ratios(window, ratios, present)
    np.testing.assert_array_equal(window.values, [1, 2, 3, 0])
    assert float(window.count) == 3
    assert [float(vico.threshold(window, share)) for share in (0.0, 0.4, 0.7)] == [1, 2, 3]
    window = vico.add_ratios(window, ratios + 3, present)
    np.testing.assert_array_equal(window.values, [5, 6, 3, 4])
    assert float(vico.threshold(window, 0.5)) == 5


def test_the_window_turns_for_as_long_as_a_run_lasts():
    """Also beyond the integers that float32 has, and with more ratios at once than it holds."""
    add, window, size = jax.jit(vico.add_ratios), vico.init_window(4), 4
    for first in range(0, 60, 3):
        window = add(window, jnp.arange(first, first + 3.0)[None], jnp.ones((1, 3), bool))
        last = range(max(0, first + 3 - size), first + 3)
        assert sorted(np.asarray(window.values)[: len(last)].tolist()) == [*map(float, last)]
        assert float(window.count) < 2 * size
    window = add(window, jnp.arange(100.0, 111.0)[None], jnp.ones((1, 11), bool))
    assert sorted(np.asarray(window.values).tolist()) == [107, 108, 109, 110]


def test_the_router_alone_is_trained():
    batch = make_batch()
    loss = RouterLoss(InternVL(FLASH), config=LossConfig(kind="router", router_window=64))
    totals, other = batch_totals(batch), random_params(FLASH, seed=3)

    def value(params):
        return loss(params, batch, jax.random.key(0), loss.init(), totals, other)

    (_, (metrics, state)), slopes = jax.jit(jax.value_and_grad(value, has_aux=True))(PARAMS)
    assert float(metrics["router_tiles"]) == float(state.count) == 9
    parts = {f"flash/{name}": tree for name, tree in slopes.pop("flash").items()} | slopes
    largest = {
        name: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))
        for name, tree in parts.items()
    }
    assert {name for name, value in largest.items() if value} == {"flash/pooling", "flash/gating"}


def test_new_parts_are_those_of_the_model():
    made = new_parts(FLASH, 0, jnp.float32)
    wanted = abstract_params(FLASH)["flash"]
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, wanted)
    assert not np.array_equal(
        made["pooling"]["query"], new_parts(FLASH, 1, jnp.float32)["pooling"]["query"]
    )


# --- runs -----------------------------------------------------------------------------------------


def config_of(kind, start, reference, **changes):
    freeze = ROUTER if kind == "vico" else ALL_BUT_ROUTER
    return changed(
        train_config(),
        model=FLASH,
        loss=LossConfig(kind=kind, ref_model=str(reference), router_window=32),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=1, freeze=freeze),
        init_from=str(start),
        steps=4,
        **changes,
    )


def test_both_stages_train_resume_and_answer(tmp_path):
    start = tmp_path / "start"
    files = tiny_checkpoint.tokenizer_files()
    save_checkpoint(start, PARAMS, FLASH, PROCESSOR, files)
    fit(config_of("vico", start, start), tmp_path / "vico")
    router = config_of("router", tmp_path / "vico", start, checkpoint__every=2)
    fit(dataclasses.replace(router, steps=2), tmp_path / "router")
    fit(router, tmp_path / "router")
    fit(router, tmp_path / "whole")
    rows = {
        name: [
            json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()
        ]
        for name in ("vico", "router", "whole")
    }
    assert all(row["loss"] > 0 for row in rows["vico"] if "loss" in row)
    last = [row for row in rows["router"] if "loss" in row][-1]
    again = [row for row in rows["whole"] if "loss" in row][-1]
    assert 0 <= last["router_accuracy"] <= 1
    assert last["router_threshold"] == pytest.approx(again["router_threshold"], rel=1e-5)
    trained, before = load(tmp_path / "router"), load(tmp_path / "vico")
    assert trained.config == FLASH
    moved = {
        path: not np.array_equal(a, b)
        for (path, a), b in zip(
            jax.tree.leaves_with_path(trained.params), jax.tree.leaves(before.params), strict=True
        )
    }
    names = {jax.tree_util.keystr(path) for path, value in moved.items() if value}
    assert names and all("gating" in name or "pooling" in name for name in names)


@pytest.mark.parametrize(("kind", "changes", "message"), [
    ("sft", {}, "model.flash is True and loss.kind 'sft'"),
    ("vico", {"lora": LoraConfig(rank=2)}, "lora.rank is 2, which loss.kind 'vico'"),
    ("vico", {"data__tiles_per_row": 0}, "tiles_per_row is 0; loss.kind 'vico' is about tiles"),
    ("router", {"eval__every": 2}, "eval.every is 2, which loss.kind 'router'"),
])  # fmt: skip
def test_what_does_not_go_together(kind, changes, message):
    config = changed(config_of("vico", "a", "a"), **changes)
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, kind=kind))
    with pytest.raises(ConfigError, match=message):
        validate(config)
    plain = changed(train_config(), loss__kind="vico")
    with pytest.raises(ConfigError, match="model.flash is False and loss.kind 'vico'"):
        validate(plain)
