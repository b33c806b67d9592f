"""Routing and the experts' products: every form against a plain loop over tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import expert_reads
from internvl3_jax.fit.topology import parse
from internvl3_jax.model.experts import STATISTICS, Experts
from internvl3_jax.model.ops import experts, grouped_product
from internvl3_jax.model.ops.quantize import dequantize, quantize
from tests.support.meshes import STYLES
from tests.support.tiny_checkpoint import changed, train_config

TOKENS, CHOSEN, WIDTH, INNER, COUNT = 37, 3, 16, 12, 8


@functools.cache
def case(tokens=TOKENS, seed=0):
    """(x, weights, chosen, kernel); expert 5 is chosen by no token."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, WIDTH), np.float32)
    chosen = np.stack([rng.permutation([0, 1, 2, 3, 4, 6, 7])[:CHOSEN] for _ in range(tokens)])
    weights = rng.random((tokens, CHOSEN), np.float32)
    kernel = rng.standard_normal((COUNT, WIDTH, INNER), np.float32)
    return x, weights, chosen.astype(np.int32), kernel


def looped(x, weights, chosen, kernel):
    """The definition: each token times each of its experts."""
    y = np.einsum("td,tadf->taf", x, np.asarray(kernel)[chosen])
    return np.einsum("taf,ta->tf", np.tanh(y), weights)


def computed(x, weights, chosen, kernel):
    groups = experts.group(chosen, COUNT)
    rows = experts.product(experts.dispatch(x, groups, CHOSEN), kernel, groups)
    return experts.combine(jnp.tanh(rows), weights, groups)


def on_platform(monkeypatch, form):
    """Takes the form of a platform; a ragged product of a TPU runs on this machine."""
    if form == "ragged":
        monkeypatch.setattr(grouped_product, "rows_per_block", lambda *_: 0)
        monkeypatch.setattr(experts, "rows_per_block", lambda *_: 0)
    else:
        monkeypatch.setattr(grouped_product, "platform", lambda: form)


FORMS = [("cpu", 37), ("gpu", 37), ("ragged", 40), ("cpu", 2), ("gpu", 2), ("tpu", 2)]


@pytest.mark.parametrize(("form", "tokens"), FORMS)
def test_every_form_is_the_loop_over_tokens(monkeypatch, form, tokens):
    on_platform(monkeypatch, form)
    x, weights, chosen, kernel = case(tokens)
    np.testing.assert_allclose(
        computed(x, weights, chosen, kernel), looped(x, weights, chosen, kernel), **CLOSE
    )

    def total(x, weights, kernel, function):
        return (function(x, weights, chosen, kernel) * jnp.cos(jnp.arange(INNER))[None]).sum()

    def plain(x, weights, chosen, kernel):
        y = jnp.tanh(jnp.einsum("td,tadf->taf", x, kernel[chosen]))
        return jnp.einsum("taf,ta->tf", y, weights)

    found, expected = (
        jax.grad(total, (0, 1, 2))(jnp.asarray(x), weights, kernel, function)
        for function in (computed, plain)
    )
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, **CLOSE)
    assert not found[2][5].any()


CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
@pytest.mark.parametrize(("form", "tokens"), FORMS)
def test_quantized_kernels(monkeypatch, form, tokens, kind):
    on_platform(monkeypatch, form)
    x, weights, chosen, kernel = case(tokens)
    packed = quantize(kernel, kind)
    assert packed["scales"].shape[0] == COUNT
    plain = dequantize(packed, jnp.float32)

    def total(x, kernel):
        y = computed(x, weights, chosen, kernel)
        return jnp.sin(y).sum(), y

    (_, found), slope = jax.value_and_grad(total, has_aux=True)(jnp.asarray(x), packed)
    (_, expected), wanted = jax.value_and_grad(total, has_aux=True)(jnp.asarray(x), plain)
    np.testing.assert_allclose(found, expected, **CLOSE)
    np.testing.assert_allclose(slope, wanted, **CLOSE)


def test_routing():
    logits = np.random.default_rng(0).standard_normal((5, 7, COUNT), np.float32)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    order = np.argsort(-probabilities, axis=-1)[..., :CHOSEN]
    taken = np.take_along_axis(probabilities, order, -1)
    for normalize, expected in ((False, taken), (True, taken / taken.sum(-1, keepdims=True))):
        weights, chosen = experts.route(logits, CHOSEN, normalize)
        np.testing.assert_array_equal(chosen, order)
        np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_all_tokens_may_choose_one_expert():
    """Nothing is dropped, and no token changes another's output."""
    x, weights, _, kernel = case()
    chosen = np.tile(np.asarray([[2, 0, 7]], np.int32), (TOKENS, 1))
    found = computed(x, weights, chosen, kernel)
    np.testing.assert_allclose(found, looped(x, weights, chosen, kernel), **CLOSE)
    alone = [computed(x[i : i + 1], weights[i : i + 1], chosen[i : i + 1], kernel) for i in (0, 9)]
    np.testing.assert_allclose(np.concatenate(alone), found[np.asarray([0, 9])], **CLOSE)


def layer(**changes):
    """(Experts, its parameters) of 32 experts."""
    sizes = {"hidden_size": 64, "num_experts": 32, "experts_per_token": 2, "expert_size": 48}
    config = dataclasses.replace(STYLES["qwen3_moe"].language, **sizes | changes)
    module = Experts(config, jnp.float32, fused=True)
    x = jax.random.normal(jax.random.key(1), (2, 5, config.hidden_size))
    return module, {"params": module.init(jax.random.key(0), x)["params"]}, x


def test_a_decoded_token_reads_its_experts_only():
    """The layer alone, two of 32 experts; the compiler counts a slice three times."""
    module, variables, x = layer()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    step = jax.jit(module.apply).lower(variables, x[:1, :1]).compile()
    assert step.cost_analysis()["bytes accessed"] < 3.5 * 2 / 32 * weights


def test_the_compiled_decoder_reads_the_chosen_experts():
    """The program that decodes, read as benchmarks/expert_reads.py reads a TPU's and a GPU's."""
    language = dataclasses.replace(
        STYLES["qwen3_moe"].language, num_experts=32, experts_per_token=2
    )
    model = dataclasses.replace(STYLES["qwen3_moe"], language=language)
    found = expert_reads.measure(changed(train_config(), model=model), parse("cpu:1"))
    kernels = language.num_experts * 3 * language.hidden_size * language.expert_size
    assert found["stored"] == kernels * np.dtype(train_config().compute_dtype).itemsize
    assert found["share"] == 2 / 32


def test_statistics_leave_padding_out():
    module, variables, x = layer()
    segments = jnp.asarray([[1, 1, 1, 0, 0], [1, 2, 2, 2, 2]])
    _, state = module.apply(variables, x, segments, mutable=[STATISTICS, "intermediates"])
    found = {name: value[0] for name, value in state[STATISTICS].items()}
    logits = np.asarray(state["intermediates"]["router_logits"][0])[np.asarray(segments) > 0]
    weights, chosen = experts.route(logits, 32, False)
    assert found["chosen"].sum() == 2 * 8 and found["chosen"].max() <= 8
    probability = np.zeros(32)
    np.add.at(probability, np.asarray(chosen), np.asarray(weights))
    np.testing.assert_allclose(found["probability"], probability, rtol=1e-5)
    np.testing.assert_array_equal(
        found["chosen"], np.bincount(np.asarray(chosen)[:, :2].ravel(), minlength=32)
    )
