"""Attention through the compiler of real TPUs, on a machine without one. In an environment of its
own, since libtpu is large:

    python -m venv .venv-tpu && .venv-tpu/bin/pip install "jax[tpu]" -e . pytest
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_ACCELERATOR_TYPE=v5litepod-4
    TPU_WORKER_HOSTNAMES=localhost \\
        ALLOW_MULTIPLE_LIBTPU_LOAD=1 .venv-tpu/bin/python -m pytest -m tpu_compiler
        tests/test_attention_tpu.py

Shown: that what "auto" chooses compiles, forward and backward, and what memory it takes. Not shown:
numbers (they are in test_attention.py, in the kernel's emulation) and speed.
"""

import re

import jax
import jax.numpy as jnp
import pytest

from internvl3_jax.config import (
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    ProcessorConfig,
    TrainConfig,
)
from internvl3_jax.fit.lowering import Requests, lower_generation
from internvl3_jax.model.ops.attention import attention, causal_mask
from internvl3_jax.model.ops.remat import _POLICIES
from internvl3_jax.parallel.collectives import platform
from internvl3_jax.parallel.sharding import BATCH_AXES, TILE_AXES, make_mesh
from internvl3_jax.sizes import SIZES

pytestmark = pytest.mark.tpu_compiler

MIB = 2**20


def topology(name: str):
    # The package is only there with a TPU's plugin; asking for a topology starts it.
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def compiled(
    mesh: MeshConfig, shape, implementation="auto", packed=True, name="v5e:4x4", remat="none"
):
    """The forward and backward pass in bfloat16 of [rows or tiles, tokens, heads, key heads,
    width].
    """
    count, length, heads, kv_heads, width = shape
    mesh = make_mesh(mesh, topology(name))

    def array(tail, dtype, *axes):
        place = jax.P(BATCH_AXES, "context", *axes) if packed else jax.P(TILE_AXES)
        return jax.ShapeDtypeStruct(
            (count, length, *tail), dtype, sharding=jax.NamedSharding(mesh, place)
        )

    divide = heads % mesh.shape["tensor"] == kv_heads % mesh.shape["tensor"] == 0
    q, k, v = (
        array((n, width), jnp.bfloat16, "tensor" if divide else None)
        for n in (heads, kv_heads, kv_heads)
    )
    segments = array((), jnp.int32)

    def run(q, k, v, segments):
        assert platform() == "tpu" and jax.default_backend() == "cpu"
        parts = mesh.shape["context"]
        mask = causal_mask((count, length), segments, parts) if packed else None

        def layer(q, k, v):
            return 2 * attention(q, k, v, mask, implementation)

        mixed, pull = jax.vjp(
            layer if remat == "none" else jax.checkpoint(layer, policy=_POLICIES[remat]), q, k, v
        )
        return mixed, *pull(mixed)

    with jax.set_mesh(mesh):
        return jax.jit(run).lower(q, k, v, segments).compile()


def peak(program) -> float:
    """MiB on each device"""
    return program.memory_analysis().peak_memory_in_bytes / MIB


def kernels(program) -> int:
    return program.as_text().count('custom_call_target="tpu_custom_call"')


# Rows of 16,384 tokens with segments. 14 heads on 2 key heads do not divide by 4: they are filled
# up to 16.
DECODERS = {"1b": (4, 16_384, 14, 2, 64), "8b": (4, 16_384, 28, 4, 128)}


@pytest.mark.parametrize("size", DECODERS)
def test_packed_rows(size):
    program = compiled(MeshConfig(fsdp=4, tensor=4), DECODERS[size])
    assert kernels(program) == 3
    # What XLA keeps is more than one table of float32 scores of a device's 4 or 7 heads.
    scores = {"1b": 4, "8b": 7}[size] * 16_384**2 * 4 / MIB
    assert (
        peak(program)
        < 350
        < scores
        < peak(compiled(MeshConfig(fsdp=4, tensor=4), DECODERS[size], "xla"))
    )


@pytest.mark.parametrize("name", ["v5e:4x4", "v5p:2x2x4", "v6e:4x4"])
def test_tiles(name):
    """13 tiles of the 300M tower on each device: heads stay together, whatever the tensor axis."""
    mesh, shape = MeshConfig(fsdp=4, tensor=4), (13 * 16, 1025, 16, 16, 64)
    program = compiled(mesh, shape, packed=False, name=name)
    assert kernels(program) == 3
    assert peak(program) < 700
    assert peak(compiled(mesh, shape, "xla", packed=False, name=name)) > 2000


@pytest.mark.parametrize(("implementation", "count"), [("auto", 3), ("flash", 0), ("ring", 0)])
def test_a_row_of_a_quarter_million_tokens(implementation, count):
    """Split over 4 devices, heads over 4 more."""
    program = compiled(
        MeshConfig(fsdp=1, tensor=4, context=4), (1, 262_144, 28, 4, 128), implementation
    )
    assert kernels(program) == count
    table = 65_536 * 262_144 / MIB  # of queries by keys, as booleans
    assert peak(program) < table / 8


def test_the_6b_tower():
    program = compiled(MeshConfig(fsdp=4, tensor=4), (16, 1025, 25, 25, 128), packed=False)
    assert kernels(program) == 3


def test_rows_of_other_lengths():
    """3 rows on each device, of a length that is not a multiple of a block."""
    program = compiled(MeshConfig(fsdp=4, tensor=4), (12, 3000, 14, 2, 64))
    assert kernels(program) == 3 and not re.search(r"f32\[[\d,]*3000,3000\]", program.as_text())


@pytest.mark.parametrize(("policy", "count"), [("attention", 3), ("full", 4)])
def test_a_kept_output_is_not_computed_again(policy, count):
    assert (
        kernels(
            compiled(MeshConfig(fsdp=1, tensor=4, context=4), (1, 16_384, 14, 2, 64), remat=policy)
        )
        == count
    )


@pytest.mark.parametrize("mesh", [MeshConfig(data=4, fsdp=1), MeshConfig(data=2, fsdp=1, tensor=2)])
def test_decoding_writes_the_cache_without_a_loop(mesh):
    """64 rows on each device; the only loop is that over the tokens."""
    mesh = make_mesh(mesh, topology("v5p:2x2x1"))
    config = TrainConfig(
        model=SIZES["2b"],
        processor=ProcessorConfig(),
        data=DataConfig(),
        optimizer=OptimizerConfig(),
        steps=1,
        compute_dtype="bfloat16",
    )
    rows = 64 * mesh.shape["data"]
    decode = lower_generation(config, mesh, Requests(rows, 3840, 256, 13))["decode"].compile()
    assert len(re.findall(r" while\(", decode.as_text())) == 1
    assert decode.memory_analysis().temp_size_in_bytes / MIB < 200
