"""Training and decoding a mixture of experts: balance, adapters, fewer bits, meshes."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from internvl3_jax.checkpoints import adapters, storage
from internvl3_jax.checkpoints.hf.peft import read_peft
from internvl3_jax.checkpoints.hf.peft_writer import write_peft
from internvl3_jax.config import LoraConfig, MeshConfig
from internvl3_jax.inference.generator import Generator
from internvl3_jax.model import language, lora
from internvl3_jax.model.internvl import InternVL
from internvl3_jax.model.ops.experts import route
from internvl3_jax.model.weights import quantize_leaf
from internvl3_jax.parallel import sharding
from internvl3_jax.training import balance, checks
from internvl3_jax.training.objective import SftLoss, batch_totals
from internvl3_jax.training.optimizer import split_params
from tests.support.batches import batch
from tests.support.lora_setup import drawn, logits, start
from tests.support.meshes import MESHES, STYLES
from tests.support.parity import as_prompt, greedy, make_row
from tests.support.tiny_checkpoint import changed, random_params, train_config
from tests.support.train_step import GRADIENT, assert_close, compiled_step, first_state

CONFIG = STYLES["qwen3_moe"]
LAYERS, EXPERTS = CONFIG.language.num_layers, CONFIG.language.num_experts
CHOSEN = CONFIG.language.experts_per_token
ADAPTED = LoraConfig(
    rank=3, alpha=6.0, targets=("language/layers/(q|o)", "language/layers/experts/(gate|up|down)")
)


def adapted(settings=ADAPTED):
    params = random_params(CONFIG)
    return params | {lora.SUBTREE: drawn(params, settings)}


# --- balance -------------------------------------------------------------------------------------


def test_the_loss_and_its_gradient_are_those_of_transformers():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((LAYERS, 2, 9, EXPERTS), np.float32)
    segments = np.ones((2, 9), np.int32)
    segments[1, 6:] = 0

    def ours(values):
        probability = jax.nn.softmax(values) * (segments > 0)[None, ..., None]
        chosen = jax.nn.one_hot(route(values, CHOSEN, True)[1], EXPERTS).sum(axis=-2)
        chosen = chosen * (segments > 0)[None, ..., None]
        return balance.balance_loss(
            chosen.sum((1, 2)), probability.sum((1, 2)), jnp.asarray(segments.sum(), jnp.float32)
        )

    loss, slope = jax.value_and_grad(ours)(jnp.asarray(values))
    theirs = torch.from_numpy(values).requires_grad_()
    expected = load_balancing_loss_func(
        tuple(layer.reshape(-1, EXPERTS) for layer in theirs),
        EXPERTS,
        CHOSEN,
        torch.from_numpy(segments),
    )
    expected.backward()
    np.testing.assert_allclose(loss, expected.detach(), rtol=1e-6)
    np.testing.assert_allclose(slope, theirs.grad, rtol=1e-4, atol=1e-7)
    assert slope.any()


@functools.partial(jax.jit, static_argnums=0)
def gradients(weight, params, values, totals):
    loss_fn = SftLoss(InternVL(CONFIG), balance=weight)
    total = functools.partial(loss_fn, batch=values, key=jax.random.key(0), loss_state=())
    return jax.value_and_grad(total, has_aux=True)(params, totals=totals)


def test_a_step_balances_and_reports_loads():
    params, values = random_params(CONFIG), batch(4)
    totals = batch_totals(values)
    (plain, (metrics, _)), without = gradients(0.0, params, values, totals)
    (loss, (more, _)), found = gradients(0.25, params, values, totals)
    np.testing.assert_allclose(loss, plain + 0.25 * more["loss_balance"], rtol=1e-6)
    tokens = int((values["segments"] > 0).sum())
    assert metrics["expert_choices"].shape == (LAYERS, EXPERTS)
    np.testing.assert_array_equal(metrics["expert_choices"].sum(axis=1), [CHOSEN * tokens] * LAYERS)
    router = [
        tree["language"]["layers"]["experts"]["router"]["kernel"] for tree in (without, found)
    ]
    assert np.abs(router[0] - router[1]).max() > 1e-5
    # A half of the batch counts by its share of the tokens.
    half = jax.tree.map(lambda x: x[:2], values)
    (_, (part, _)), _ = gradients(0.0, params, half, totals)
    (_, (alone, _)), _ = gradients(0.0, params, half, batch_totals(half))
    share = (half["segments"] > 0).sum() / tokens
    np.testing.assert_allclose(part["loss_balance"], alone["loss_balance"] * share, rtol=1e-6)


def test_loads_of_the_log():
    found = balance.loads(np.asarray([[2, 2, 2, 2], [8, 0, 0, 0]], np.float32))
    assert (found["expert_load_min"], found["expert_load_max"]) == (0, 4)
    assert [found[f"expert_load/{i}"] for i in range(4)] == [2.5, 0.5, 0.5, 0.5]


def test_a_run_updates_experts_by_muon_and_logs_their_loads(tmp_path):
    config = changed(train_config(), model=CONFIG, steps=2, optimizer__freeze=("vision/.*",))
    config = changed(config, loss__balance_weight=0.01, optimizer__warmup_steps=1)
    start(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        loads = [row[f"expert_load/{index}"] for index in range(EXPERTS)]
        np.testing.assert_allclose(np.mean(loads), 1, rtol=1e-5)
        assert row["expert_load_min"] <= min(loads) < max(loads) <= row["expert_load_max"]
        assert 0.5 * CHOSEN < row["loss_balance"] < EXPERTS and row["grad_norm_language"] > 0


def test_balance_without_experts_is_refused():
    config = train_config()
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, balance_weight=1e-3))
    with pytest.raises(ValueError, match=r"loss.balance_weight is 0.001, but the decoder has no"):
        checks.validate(config)


# --- adapters and fewer bits ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "int8", "nf4"])
def test_adapted_experts_are_the_merged_ones(kind):
    """In training's layout, in generation's, and over a base in fewer bits."""
    settings = dataclasses.replace(ADAPTED, quantize=kind)
    params = adapted()
    params = lora.prepare_base(lora.base_params(params), settings) | {"lora": params["lora"]}
    found = logits(CONFIG, lora.variables(params, settings), batch(2))
    merged = lora.merged(params, settings)
    assert jax.tree.structure(merged) == jax.tree.structure(random_params(CONFIG))
    close = {"atol": 2e-5, "rtol": 1e-5}
    np.testing.assert_allclose(found, logits(CONFIG, {"params": merged}, batch(2)), **close)
    for fused in (True, False):
        unrolled = params | {
            "language": language.unroll(params["language"], CONFIG.language, fused)
        }
        scaled = lora.scaled(params["lora"], settings)
        unrolled |= {"lora": adapters.unroll(scaled, CONFIG, fused, False)}
        model = InternVL(CONFIG, unrolled=True, fused=fused)
        again = jax.jit(model.apply)(lora.variables(unrolled), batch(2))
        np.testing.assert_allclose(found, again, **close)


def test_peft_names_experts_one_by_one(tmp_path):
    params = adapted()
    own = {lora.SUBTREE: params[lora.SUBTREE]}
    tensors = write_peft(tmp_path, own, ADAPTED, CONFIG, "internvl", "base")
    name = "base_model.model.language_model.model.layers.1.mlp.experts.4.down_proj.lora_B.weight"
    down = params[lora.SUBTREE]["language"]["layers"]["experts"]["down"]["b"]
    np.testing.assert_array_equal(tensors[name], down[1, 4].T)
    read = storage.by_path(read_peft(tmp_path, CONFIG).lora)
    for path, leaf in storage.by_path(lora.scaled(params[lora.SUBTREE], ADAPTED)).items():
        np.testing.assert_allclose(read[path], leaf, rtol=1e-6)


def test_dropout_of_experts_adapters_is_refused():
    settings = dataclasses.replace(ADAPTED, dropout=0.1)
    with pytest.raises(ValueError, match="lora.dropout is 0.1 and lora.targets matches language/"):
        lora.init(random_params(CONFIG), settings, jax.random.key(0))


# --- meshes --------------------------------------------------------------------------------------


def test_adapters_of_experts_over_a_mesh():
    """The update of adapters and router, with a base in 8 bits, as on one device."""

    def descend(mesh):
        settings = dataclasses.replace(ADAPTED, quantize="int8", full=("language/.*router/kernel",))
        params = adapted()
        params = lora.prepare_base(lora.base_params(params), settings) | {"lora": params["lora"]}
        frozen = r"(?!lora/|language/layers/experts/router).*"
        optimizer = GRADIENT._replace(split=lambda tree: split_params(tree, (frozen,)))
        values = batch(8)
        options = {"adapters": settings, "balance": 0.1}
        if mesh is None:
            state = first_state(optimizer, params)
            step = compiled_step(optimizer, state, values, InternVL(CONFIG), **options)
        else:
            params = jax.device_put(params, sharding.param_shardings(params, mesh))
            values = sharding.global_batch(mesh, 8, values, list(range(8)))
            with jax.set_mesh(mesh):
                state = first_state(optimizer, params)
                step = compiled_step(optimizer, state, values, InternVL(CONFIG), **options)
        after, metrics = step(state, values, jax.random.key(0))
        return jax.device_get(split_params(after.params, (frozen,))[0]), jax.device_get(metrics)

    mesh = sharding.make_mesh(MESHES["all"])
    assert_close(descend(mesh), descend(None))


@pytest.mark.parametrize("weights", [None, "int8"])
def test_decoding_over_a_mesh(weights):
    """The tokens of one device."""
    params = random_params(CONFIG)
    if weights:
        leaves = {
            path: quantize_leaf(path, jnp.asarray(leaf), weights)
            for path, leaf in storage.by_path(params).items()
        }
        params = storage.nest(leaves)
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    sharded = jax.device_put(params, sharding.param_shardings(params, mesh))
    prompts = [as_prompt(CONFIG, make_row(CONFIG, (1,), seed=i)[0], (1,)) for i in range(2)]
    answers = [
        Generator(CONFIG, tree).generate(prompts, greedy(3, 2, CONFIG))
        for tree in (params, sharded)
    ]
    assert answers[0] == answers[1]
