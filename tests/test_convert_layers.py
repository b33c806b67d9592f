"""Leaves that are converted layer by layer: the same files, in little memory."""

import json
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

from internvl3_jax.checkpoints import orbax_slices, storage
from internvl3_jax.checkpoints.checkpoint import save_checkpoint
from internvl3_jax.checkpoints.hf.assemble import ConversionError, by_layer
from internvl3_jax.checkpoints.hf.mapping import active_rows
from internvl3_jax.config import MeshConfig
from internvl3_jax.parallel import sharding
from tests.support.released import (
    convert,
    params_of,
    random_params,
    reduce,
    reduce_processor,
    same_tensors,
    stored_tensors,
    tiny_tokenizer,
    write_released,
)

SIZE = "3.5-30b-a3b"
KERNEL = "language/layers/experts/down/kernel"


@pytest.fixture(autouse=True)
def large(monkeypatch):
    """Kernels of experts and most others are large."""
    monkeypatch.setattr(storage, "BY_LAYER", 9_000)


def test_what_is_converted_layer_by_layer():
    model, dtype = reduce(SIZE), np.dtype(ml_dtypes.bfloat16)
    large = {row.target for row in active_rows(model) if by_layer(row, model, dtype)}
    assert KERNEL in large
    assert not large & {"language/embedding", "language/layers/input_norm/scale"}


@pytest.mark.parametrize(
    ("size", "layout"), [(SIZE, "internvl"), (SIZE, "hf"), ("2.5-8b", "internvl"), ("38b", "hf")]
)
def test_round_trip_is_bit_exact(size, layout, tmp_path):
    params = storage.by_path(random_params(reduce(size)))
    released = write_released(tmp_path / "released", reduce(size), "hf")
    hashes = convert(released, tmp_path / "ours", verify=True)
    same_tensors(params_of(tmp_path / "ours"), params)
    assert hashes == convert(tmp_path / "ours", tmp_path / "back", to=layout, shard_size=9_000)
    if layout == "hf":
        same_tensors(stored_tensors(released), stored_tensors(tmp_path / "back"))
    convert(tmp_path / "back", tmp_path / "float32", dtype="float32")
    for path, leaf in params_of(tmp_path / "float32").items():
        np.testing.assert_array_equal(leaf, params[path].astype(np.float32))


def test_a_sharded_checkpoint_is_exported(tmp_path):
    """As a run on several devices stores it: each array in the shards of the devices."""
    model = reduce(SIZE)
    params = random_params(model)
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
    sharded = jax.device_put(params, sharding.param_shardings(params, mesh))
    save_checkpoint(
        tmp_path / "ours", sharded, model, reduce_processor(model), tiny_tokenizer.build()
    )
    parts = {
        path: len({str(shard.index) for shard in leaf.addressable_shards})
        for path, leaf in storage.by_path(sharded).items()
    }
    assert parts[KERNEL] > 1
    # Each layer is in chunks of its own, so that it is read by itself.
    stored = orbax_slices.open_array(tmp_path / "ours" / "params", KERNEL)
    assert stored.chunk_layout.read_chunk.shape[0] == 1
    released = write_released(tmp_path / "released", model, "hf")
    convert(tmp_path / "ours", tmp_path / "exported", to="hf", verify=True)
    same_tensors(stored_tensors(released), stored_tensors(tmp_path / "exported"))


def test_nan_in_a_layer_is_named(tmp_path):
    model = reduce(SIZE)
    params = random_params(model)
    params["language"]["layers"]["experts"]["up"]["kernel"][1, 2, 3, 4] = np.nan
    files = tiny_tokenizer.build()
    save_checkpoint(tmp_path / "ours", params, model, reduce_processor(model), files)
    with pytest.raises(ConversionError, match=r"experts/up/kernel, layer 1: 1 of [\d,]+ values"):
        convert(tmp_path / "ours", tmp_path / "exported", to="hf")
    assert not (tmp_path / "exported").exists()


def test_an_unreadable_tensor_leaves_nothing_behind(tmp_path):
    """An error while a layer is made inside of Orbax."""
    released = write_released(tmp_path / "released", reduce(SIZE), "hf")
    file = released / "model.safetensors"
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    name = "model.language_model.layers.2.mlp.experts.3.up_proj.weight"
    entry = json.loads(content[8:start])[name]
    at = start + entry["data_offsets"][0]
    content[at : at + 2] = b"\xc0\x7f"  # NaN in bfloat16
    file.write_bytes(content)
    with pytest.raises(ConversionError, match=rf"{name}: 1 of [\d,]+ values"):
        convert(released, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_memory_is_that_of_some_layers(tmp_path):
    """Not of a leaf, which has 16 layers here, or 94 in the largest released model."""
    command = [sys.executable, "-m", "tests.support.convert_memory", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["leaf"] == 16 * found["layer"]
    assert found["import"] < found["leaf"] / 2
    assert found["export"] < found["leaf"] / 2
