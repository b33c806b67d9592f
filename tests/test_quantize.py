"""Frozen matrices in 8 and 4 bits: how far they are from the matrix, what they take, and training
beside them.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl3_jax.config import MeshConfig
from internvl3_jax.model import lora
from internvl3_jax.model.internvl import abstract_params
from internvl3_jax.model.ops.quantize import KINDS, dequantize, quantize
from internvl3_jax.parallel import sharding
from internvl3_jax.sizes import SIZES
from tests.support.batches import batch
from tests.support.lora_setup import SETTINGS, drawn, logits, step_of
from tests.support.meshes import MESHES
from tests.support.tiny_checkpoint import CONFIG, random_params, train_config
from tests.support.train_step import assert_close, by_path


def prepared(kind, params=None):
    settings = dataclasses.replace(SETTINGS, quantize=kind)
    params = random_params(CONFIG) if params is None else params
    return settings, lora.prepare_base(params, settings) | {lora.SUBTREE: drawn(params)}


@pytest.mark.parametrize(("kind", "error", "bits"), [("int8", 0.01, 8.2), ("nf4", 0.1, 4.6)])
def test_normal_weights_keep_their_direction(kind, error, bits):
    """The relative error is that of the papers, layer by layer whatever the layers' scales."""
    rng = np.random.default_rng(0)
    scales = np.array([1e-3, 1.0, 30.0], np.float32)
    kernel = rng.standard_normal((3, 256, 192), np.float32) * scales[:, None, None]
    few = jax.jit(quantize, static_argnums=1)(kernel, kind)
    back = np.asarray(dequantize(few, jnp.float32))
    assert (np.sqrt(((back - kernel) ** 2).mean((1, 2))) / scales).max() < error
    assert 8 * sum(leaf.nbytes for leaf in few.values()) / kernel.size < bits
    for layer in range(3):
        one = dequantize(jax.tree.map(lambda leaf, i=layer: leaf[i], few), jnp.float32)
        np.testing.assert_array_equal(one, back[layer])


def test_nf4_is_the_papers():
    """Of a block that holds the sixteen values themselves nothing is lost; each is nearest to
    itself.
    """
    values = [-1, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0]
    values += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1]
    kernel = np.tile(np.asarray(values, np.float32), 4).reshape(1, 64, 1) * 3
    few = quantize(jnp.asarray(kernel), "nf4")
    assert (
        few["nf4"].shape == (1, 32, 1)
        and few["nf4"].dtype == jnp.uint8
        and few["scales"].shape == (1, 1, 1)
    )
    np.testing.assert_allclose(dequantize(few, jnp.float32), kernel, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_computes_with_the_matrices_that_are_kept(kind):
    """As one whose matrices are those, unpacked; and merging unpacks and adds."""
    settings, params = prepared(kind)
    found = logits(CONFIG, lora.variables(params, settings), batch(2))
    unpacked = lora.merged(lora.base_params(params))
    expected = logits(
        CONFIG, lora.variables(unpacked | {lora.SUBTREE: params[lora.SUBTREE]}, settings), batch(2)
    )
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-5)
    merged = lora.merged(params, settings)
    assert jax.tree.structure(merged) == jax.tree.structure(random_params(CONFIG))
    np.testing.assert_allclose(
        logits(CONFIG, {"params": merged}, batch(2)), found, atol=2e-5, rtol=1e-5
    )


def test_training_on_a_four_bit_base():
    """The same update as on the unpacked kernels, which do not change; on devices that split
    them, too.
    """
    settings, params = prepared("nf4")
    before, after, metrics, _ = step_of(
        settings, params=params, mesh=sharding.make_mesh(MESHES["all"])
    )
    unpacked = lora.merged(lora.base_params(params)) | {lora.SUBTREE: params[lora.SUBTREE]}
    _, _, expected, _ = step_of(
        SETTINGS, params=unpacked, mesh=sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    )
    assert_close(jax.device_get(metrics), jax.device_get(expected))
    changed = [
        path
        for path, leaf in by_path(after.params).items()
        if (leaf != by_path(before.params)[path]).any()
    ]
    assert changed and all(path.startswith("lora/") for path in changed)


def test_what_8b_takes():
    """Half a byte a parameter and a little, but for embedding, head and the small ones, which stay
    in bfloat16.
    """
    base = abstract_params(SIZES["8b"], jnp.bfloat16)
    few = jax.eval_shape(
        lambda base: lora.prepare_base(base, dataclasses.replace(SETTINGS, quantize="nf4")), base
    )
    sizes = [
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) / 1e9
        for tree in (base, few)
    ]
    assert sizes == pytest.approx([15.9, 6.1], rel=0.02)


def test_without_qwix(monkeypatch):
    """NF4 alone needs it."""
    monkeypatch.setitem(sys.modules, "qwix", None)
    few = {
        kind: dataclasses.replace(train_config(), lora=dataclasses.replace(SETTINGS, quantize=kind))
        for kind in KINDS
    }
    with pytest.raises(ImportError, match=r"nf4 needs qwix: pip install -e '\.\[quant\]'"):
        lora.freeze_base(few["nf4"])
    lora.freeze_base(few["int8"])
    prepared("int8")
