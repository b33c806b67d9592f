"""The TPU's cache write, emulated on a CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl3_jax.config import MeshConfig
from internvl3_jax.model import kv_cache
from internvl3_jax.model.ops import tpu_cache_write
from internvl3_jax.parallel.sharding import BATCH_AXES, make_mesh

RNG = np.random.default_rng(0)
EMULATED = functools.partial(tpu_cache_write.write_token, interpret=True)
# The first and the last slot, both sides of a tile's edge, and one in the middle.
SLOTS = [0, 63, 7, 8, 15, 16, 31, 40]


def random(shape, dtype) -> jax.Array:
    return jnp.asarray(RNG.integers(-100, 100, shape), dtype)


def layer_and_token(dtype, rows: int = len(SLOTS)):
    layer = {name: random((rows, 4, 64, 16), dtype) for name in "kv"}
    return layer, random((rows, 1, 4, 16), dtype), random((rows, 1, 4, 16), dtype)


@pytest.fixture
def on_tpu(monkeypatch):
    monkeypatch.setattr(kv_cache, "platform", lambda: "tpu")
    monkeypatch.setattr(tpu_cache_write, "write_token", EMULATED)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_kernel_writes_what_xla_writes(monkeypatch, dtype):
    layer, k, v = layer_and_token(dtype)
    slots = jnp.asarray(SLOTS)[:, None]
    expected = kv_cache.write(layer, k, v, slots)
    written = EMULATED((layer["k"], layer["v"]), (k, v), slots[:, 0])
    for name, actual in zip("kv", written, strict=True):
        assert actual.dtype == layer[name].dtype
        np.testing.assert_array_equal(actual, expected[name])
        assert (np.asarray(actual) != np.asarray(layer[name])).any()


def test_an_int8_cache_gets_its_scales_too(monkeypatch):
    layer = {name: random((len(SLOTS), 4, 64, 16), "int8") for name in "kv"}
    layer |= {f"{name}_scale": random((len(SLOTS), 4, 64), "float32") for name in "kv"}
    k, v = (jnp.asarray(RNG.normal(size=(len(SLOTS), 1, 4, 16)), jnp.float32) for _ in "kv")
    slots = jnp.asarray(SLOTS)[:, None]
    expected = kv_cache.write(layer, k, v, slots)
    monkeypatch.setattr(kv_cache, "platform", lambda: "tpu")
    monkeypatch.setattr(tpu_cache_write, "write_token", EMULATED)
    written = kv_cache.write(layer, k, v, slots)
    assert written.keys() == expected.keys() == layer.keys()
    jax.tree.map(np.testing.assert_array_equal, written, expected)


def test_decoding_takes_it_on_tpus_and_a_prompt_does_not(on_tpu, monkeypatch):
    layer, k, v = layer_and_token("float32")
    program = jax.make_jaxpr(kv_cache.write)
    assert "pallas_call" in str(program(layer, k, v, jnp.asarray(SLOTS)[:, None]))
    prompt = jnp.tile(jnp.arange(2), (len(SLOTS), 1))
    k, v = (jnp.repeat(x, 2, axis=1) for x in (k, v))
    assert "pallas_call" not in str(program(layer, k, v, prompt))

    # Slots that are no whole tiles.
    short = {name: x[:, :, :60] for name, x in layer.items()}
    assert "pallas_call" not in str(program(short, k[:, :1], v[:, :1], prompt[:, :1]))


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_over_a_mesh_each_device_writes_its_rows_and_heads(on_tpu, axes):
    mesh = make_mesh(MeshConfig(**axes))
    layer, k, v = layer_and_token("float32")
    slots = jnp.asarray(SLOTS)[:, None]
    expected = {name: np.array(x) for name, x in layer.items()}
    for row, slot in enumerate(SLOTS):
        expected["k"][row, :, slot], expected["v"][row, :, slot] = k[row, 0], v[row, 0]
    place = jax.NamedSharding(mesh, jax.P(BATCH_AXES, "tensor"))
    layer = jax.device_put(layer, place)
    with jax.set_mesh(mesh):
        written = jax.jit(kv_cache.write)(layer, k, v, slots)
    for name in "kv":
        np.testing.assert_array_equal(written[name], expected[name])
        assert written[name].sharding.is_equivalent_to(place, 4)
