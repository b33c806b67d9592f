"""Products of linear layers on a CPU: matrices with matrices, forward and backward."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl3_jax.config import MeshConfig
from internvl3_jax.model.ops.linear import Dense, product_of_rows
from internvl3_jax.model.ops.remat import remat
from internvl3_jax.parallel.sharding import make_mesh

pytestmark = pytest.mark.smoke
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(3, 5, 12)), jnp.float32)
KERNEL = jnp.asarray(RNG.normal(size=(12, 8)), jnp.float32)
WEIGHTS = jnp.asarray(RNG.normal(size=(3, 5, 8)), jnp.float32)


def gradients(product):
    return jax.grad(lambda x, kernel: (product(x, kernel) * WEIGHTS).sum(), (0, 1))


def test_the_gradient_of_a_kernel_sums_over_one_axis():
    summed = re.compile(r"contracting_dims = \[([\d, ]*)\] x \[[\d, ]*\]")
    text = jax.jit(gradients(product_of_rows)).lower(X, KERNEL).as_text()
    assert summed.findall(text) and all(len(axes.split(",")) == 1 for axes in summed.findall(text))
    assert "0, 1" in summed.findall(jax.jit(gradients(jnp.dot)).lower(X, KERNEL).as_text())


def test_values_and_gradients_are_those_of_the_plain_product():
    np.testing.assert_allclose(product_of_rows(X, KERNEL), X @ KERNEL, rtol=1e-6, atol=1e-6)
    found, right = gradients(product_of_rows)(X, KERNEL), gradients(jnp.dot)(X, KERNEL)
    for a, b in zip(found, right, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert product_of_rows(X[0, 0], KERNEL).shape == (8,)


def test_on_a_mesh_rows_and_tokens_stay_apart():
    mesh = make_mesh(MeshConfig(data=len(jax.devices())))
    layer, x = Dense(8), jnp.ones((len(jax.devices()), 5, 12))
    variables = layer.init(jax.random.key(0), x)

    def text(layer):
        return jax.jit(layer.apply).lower(variables, x).as_text()

    alone = text(layer)
    with jax.set_mesh(mesh):
        sharded = text(layer)
    assert f"tensor<{5 * len(x)}x12xf32>" in alone
    if len(x) > 1:
        assert f"tensor<{5 * len(x)}x12xf32>" not in sharded


def test_dots_keep_products_with_their_biases(capsys):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.sin(Dense(8, name="dense")(x))

    variables = {"params": {"dense": {"kernel": KERNEL, "bias": WEIGHTS[0, 0]}}}
    layer = remat(Layer, "dots", 1)()
    jax.ad_checkpoint.print_saved_residuals(lambda x: layer.apply(variables, x).sum(), X)
    kept = capsys.readouterr().out
    assert "named 'product'" in kept and "dot_general" not in kept
