"""What the model computes in another form on GPUs gives the same numbers; here on a CPU that passes
for one.
"""

import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl3_jax.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from internvl3_jax.fit.lowering import Requests, lower_generation
from internvl3_jax.inference import programs
from internvl3_jax.inference.generator import Generator
from internvl3_jax.model import vision
from internvl3_jax.model.ops import linear, norms
from internvl3_jax.model.ops.linear import gelu
from internvl3_jax.model.vision import VisionTower
from internvl3_jax.parallel import collectives
from internvl3_jax.parallel.sharding import make_mesh
from tests.support.generation import PARAMS, RAGGED, make_run
from tests.support.tiny_checkpoint import CONFIG, PROCESSOR

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(3, 5, 12)), jnp.float32)


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(linear, "platform", lambda: "gpu")


def dense_variables(features: int) -> dict:
    """Parameters of a layer of 12 inputs, with an adapter of rank 2."""
    shapes = {"kernel": (12, features), "bias": (features,)}
    lora = {"a": (12, 2), "b": (2, features)}
    return {
        kind: {name: jnp.asarray(RNG.normal(size=shape), jnp.float32) for name, shape in x.items()}
        for kind, x in (("params", shapes), ("lora", lora))
    }


def test_separate_products_are_the_parts_of_one(on_gpu):
    variables = dense_variables(18)
    whole = linear.Dense(18).apply(variables, X)
    parts = linear.Dense(18, splits=3).apply(variables, X)
    assert [part.shape for part in parts] == [(3, 5, 6)] * 3
    np.testing.assert_allclose(jnp.concatenate(parts, axis=-1), whole, rtol=1e-5, atol=1e-5)


def test_a_scaled_kernel_is_a_scaled_output():
    """Also with the adapter and the bias, and for the gradients of all parameters."""
    variables, scale = dense_variables(18), jnp.asarray(RNG.normal(size=18), jnp.float32)
    layer = linear.Dense(18)
    weights = jnp.asarray(RNG.normal(size=(3, 5, 18)), jnp.float32)

    def loss(variables, scale, inside: bool):
        if inside:
            y = layer.apply(variables, X, scale)
        else:
            y = layer.apply(variables, X) * scale[None, None]
        return (y * weights).sum()

    (found, found_grads), (right, right_grads) = (
        jax.value_and_grad(loss, (0, 1))(variables, scale, inside) for inside in (True, False)
    )
    assert float(found) == pytest.approx(float(right), rel=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-4, atol=1e-4),
        found_grads,
        right_grads,
    )


def test_a_fixed_layout_changes_no_number(monkeypatch):
    monkeypatch.setattr(collectives, "platform", lambda: "gpu")

    def loss(x):
        return jnp.sin(collectives.row_major(x)).sum()

    found, gradient = jax.jit(jax.value_and_grad(loss))(X)
    assert float(found) == pytest.approx(float(jnp.sin(X).sum()), rel=1e-5)
    np.testing.assert_allclose(gradient, jnp.cos(X), rtol=1e-5, atol=1e-6)
    assert "LayoutConstraint" in jax.jit(loss).lower(X).as_text()
    with jax.set_mesh(make_mesh(MeshConfig(data=2), jax.devices()[:2])):
        assert "LayoutConstraint" not in jax.jit(loss).lower(X).as_text()


def test_one_row_is_multiplied_as_two(on_gpu):
    x = X[:1, :1]
    found = linear.Dense(18).apply(variables := dense_variables(18), x)
    right = linear.Dense(18).apply(variables, jnp.tile(x, (1, 2, 1)))[:, :1]
    np.testing.assert_allclose(found, right, rtol=1e-6, atol=1e-6)
    text = jax.jit(linear.Dense(18).apply).lower(variables, x).as_text()
    assert "optimization_barrier" in text and "tensor<2x1x12xf32>" in text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "reference"), [("layer_norm", nn.LayerNorm), ("rms_norm", nn.RMSNorm)]
)
def test_norms_and_their_gradients_are_those_of_flax(kind, reference, dtype):
    layer, other = norms.make_norm(kind, 1e-6, dtype), reference(epsilon=1e-6, dtype=dtype)
    x = (3.0 + 2.0 * X).astype(dtype)
    params = layer.init(jax.random.key(0), x)
    assert jax.tree.structure(params) == jax.tree.structure(other.init(jax.random.key(0), x))
    params = jax.tree.map(lambda p: jnp.asarray(RNG.normal(size=p.shape), p.dtype), params)
    weights = jnp.asarray(RNG.normal(size=X.shape), jnp.float32)

    def loss(params, x, norm):
        return (norm.apply(params, x).astype(jnp.float32) * weights).sum()

    tolerance = 1e-5 if dtype == "float32" else 0.02
    found, right = (jax.grad(loss, (0, 1))(params, x, norm) for norm in (layer, other))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * float(jnp.abs(b).max()))
    found, right = layer.apply(params, x), other.apply(params, x)
    np.testing.assert_allclose(
        found.astype(jnp.float32), right.astype(jnp.float32), rtol=tolerance, atol=tolerance
    )


def test_gelu_is_the_exact_one():
    x = np.linspace(-12, 12, 4001, dtype=np.float32)
    right = [0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in x.tolist()]
    np.testing.assert_allclose(gelu(jnp.asarray(x)), right, atol=1e-6)
    assert gelu(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("policy", ["none", "full"])
def test_padded_tiles_give_the_same_features_and_gradients(monkeypatch, policy):
    """The padding is no key of any query, and no output."""
    config = CONFIG.vision
    tiles = jnp.asarray(RNG.normal(size=(2, config.image_size, config.image_size, 3)), jnp.float32)
    tower = VisionTower(config, jnp.float32, remat=policy)
    params = PARAMS["vision"]

    def loss(params, tiles):
        out = tower.apply({"params": params}, tiles)
        return jnp.square(out).sum(), out

    plain = jax.grad(loss, (0, 1), has_aux=True)(params, tiles)
    monkeypatch.setattr(vision.VisionTower, "_padding", lambda self, tokens: -tokens % 8 + 8)
    padded = jax.grad(loss, (0, 1), has_aux=True)(params, tiles)
    assert padded[1].shape == (2, 1 + config.grid**2, config.hidden_size)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(
            x, y, rtol=1e-4, atol=1e-5 * float(jnp.abs(y).max() + 1)
        ),
        padded,
        plain,
    )


def test_prompts_in_chunks_of_rows_give_the_same_cache_and_tokens(monkeypatch):
    """As many rows at once as have the tokens: four rows of 64 in two chunks, then one by one."""
    run = make_run(4, limit=6)
    whole = Generator(CONFIG, PARAMS)
    expected, start = whole.generate(RAGGED, run), whole.start(RAGGED, run)
    for tokens in (2 * 64, 1):
        monkeypatch.setattr(programs, "TOKENS_PER_CHUNK", tokens)
        programs.prefill.clear_cache()
        generator = Generator(CONFIG, PARAMS)
        assert generator.generate(RAGGED, run) == expected
        state = generator.start(RAGGED, run)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
            state.cache,
            start.cache,
        )
    programs.prefill.clear_cache()


@pytest.mark.parametrize(("devices", "counted"), [("cpu", False), ("gpu", True), ("tpu", True)])
def test_decoding_is_lowered_with_the_loop_of_its_devices(monkeypatch, devices, counted):
    """Accelerators get a fixed number of tokens, so that the host need not wait for each; also when
    a program is only compiled for them.
    """
    monkeypatch.setattr(programs, "platform", lambda: devices)
    config = TrainConfig(CONFIG, PROCESSOR, DataConfig(), OptimizerConfig(), steps=1)
    programs.decode.clear_cache()
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    lowered = lower_generation(config, mesh, Requests(rows=2, prompt=20, new=4, tiles=1))
    programs.decode.clear_cache()
    condition = re.search(
        r"stablehlo\.while.*?cond \{(.*?)\} do", lowered["decode"].as_text(), re.S
    )
    operations = re.findall(r"stablehlo\.(\w+)", condition[1])
    # The counter alone, or the requested number of tokens and the rows that are done.
    assert ("compare" in operations and len(operations) <= 3) == counted, operations


def test_calls_ahead_give_the_same_answers(monkeypatch):
    """One call more is started at most, and none beyond the limit of tokens."""
    run = make_run(4, limit=40)
    plain = Generator(CONFIG, PARAMS)
    stop = plain.generate(RAGGED, run)[0][20]
    answers, calls = {}, {}
    for ahead in (0, 1):
        for stops in ((), (stop,)):
            generator = Generator(CONFIG, PARAMS, stop_ids=stops)
            generator.calls_ahead, count, decode = ahead, [], generator._decode
            monkeypatch.setattr(
                generator, "_decode", lambda *a, c=count, d=decode: c.append(1) or d(*a)
            )
            answers[ahead, stops] = generator.generate(RAGGED, run)
            calls[ahead, stops] = len(count)
    assert answers[0, ()] == answers[1, ()] and answers[0, (stop,)] == answers[1, (stop,)]
    assert {len(answer) for answer in answers[1, ()]} == {40} and calls[0, ()] == calls[1, ()] == 3
    assert answers[1, (stop,)][0][-1] == stop and len(answers[1, (stop,)][0]) <= 21
