"""Parameters are in memory once, in the layout of generation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl3_jax import Chat, load
from internvl3_jax.config import MeshConfig
from internvl3_jax.inference import layout
from internvl3_jax.inference.generator import Generator
from internvl3_jax.parallel import sharding
from tests.support.meshes import STYLES
from tests.support.tiny_checkpoint import CONFIG, directory, random_params

pytestmark = pytest.mark.smoke


def live() -> int:
    """Returns the bytes of memory that arrays are in; those that share memory count once."""
    shards = [shard.data for array in jax.live_arrays() for shard in array.addressable_shards]
    starts = sorted((shard.unsafe_buffer_pointer(), shard.nbytes) for shard in shards)
    total = end = 0
    for start, size in starts:
        total += max(0, start + size - max(start, end))
        end = max(end, start + size)
    return total


def on_device(config, mesh):
    params = jax.tree.map(jnp.asarray, random_params(config))
    return (
        params if mesh is None else jax.device_put(params, sharding.param_shardings(params, mesh))
    )


def peak_while_unrolling(monkeypatch, config, mesh, donate) -> tuple[float, float]:
    """Returns the most bytes while a generator is made, and those of the largest stacked leaf, both
    over those of the parameters.
    """
    before, peaks, wait = live(), [], jax.block_until_ready

    def wait_and_count(arrays):
        found = wait(arrays)
        peaks.append(live() - before)
        return found

    params = on_device(config, mesh)
    leaves = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    with monkeypatch.context() as patched:
        patched.setattr(jax, "block_until_ready", wait_and_count)
        generator = Generator(config, params, donate=donate)
    assert bool(params["language"].get("layers")) is not donate
    held = [leaf.nbytes for leaf in jax.tree.leaves(generator.base)]
    assert sum(held) == sum(leaves)
    return max(peaks) / sum(leaves), max(leaves) / sum(leaves)


@pytest.mark.parametrize("style", ["qwen", "qwen3_moe"])
def test_one_leaf_is_there_twice(monkeypatch, style):
    config = CONFIG if style == "qwen" else STYLES[style]
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:2])
    peak, leaf = peak_while_unrolling(monkeypatch, config, mesh, donate=True)
    assert peak <= 1 + leaf + 0.01
    kept, _ = peak_while_unrolling(monkeypatch, config, mesh, donate=False)
    assert kept > peak + 0.1


@pytest.mark.parametrize("style", ["qwen", "qwen3_moe"])
@pytest.mark.parametrize("donate", [False, True])
def test_layers_of_a_large_model_on_a_cpu_need_no_memory(monkeypatch, style, donate):
    monkeypatch.setattr(layout, "LARGE", 0)
    config = CONFIG if style == "qwen" else STYLES[style]
    peak, _ = peak_while_unrolling(monkeypatch, config, None, donate)
    assert peak < 1.05  # small layers that are not aligned are copied


def test_donated_answers_are_the_same():
    kept = load(directory())
    expected = Chat(kept, max_new_tokens=8)("Hello?")
    donated = load(directory())
    own = donated.params
    chat = Chat(donated, max_new_tokens=8, donate=True)
    assert chat("Hello?") == expected
    # Who refers to the tree itself still has it.
    same = jax.tree.map(np.array_equal, own, kept.params)
    assert all(jax.tree.leaves(same)) and donated.params is None


def test_donated_parameters_cannot_be_taken_again():
    checkpoint = load(directory())
    Chat(checkpoint, donate=True)
    with pytest.raises(ValueError, match=r"were donated \(Chat\(\.\.\., donate=True\)\); load it"):
        Chat(checkpoint)
