"""Checkpoints that hold weights of fewer bits: written, loaded without a flag, and refused where
the original ones are needed.
"""

import json

import jax
import numpy as np
import pytest

from convert.__main__ import main as convert
from internvl3_jax import load
from internvl3_jax.checkpoints import checkpoint as checkpoint_module
from internvl3_jax.checkpoints import storage
from internvl3_jax.config import MeshConfig
from internvl3_jax.parallel.sharding import make_mesh
from tests.support.lora_setup import config_of, start
from tests.support.tiny_checkpoint import directory


@pytest.mark.parametrize(("kind", "tower"), [("int8", False), ("fp8", True)])
def test_a_converted_checkpoint_needs_no_flag(kind, tower, tmp_path, capsys):
    arguments = ["--quantize", kind, "--verify", *["--quantize_tower"] * tower]
    assert convert([str(directory()), str(tmp_path / "few"), *arguments]) == 0
    assert f"with {kind} weights" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "few" / "internvl3_jax.json").read_text())
    stored = {"int8": "int8", "fp8": "float8_e4m3fn"}[kind]
    assert manifest["weights"] == kind
    assert set(manifest["fingerprint"]["dtype"].split("+")) == {"float32", stored}
    few = load(tmp_path / "few")
    assert few.weights == kind
    expected = load(directory(), weights=kind, quantize_tower=tower).params
    jax.tree.map(np.testing.assert_array_equal, few.params, expected)
    # In another dtype kernels and scales stay; on devices they are sharded.
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    narrow = storage.by_path(load(tmp_path / "few", dtype="bfloat16", mesh=mesh).params)
    assert narrow["language/layers/q/kernel/scales"].dtype.name == "float32"
    assert narrow["language/embedding"].dtype.name == "bfloat16"


def test_saved_again_it_is_the_same(tmp_path):
    few = load(directory(), weights="int8")
    checkpoint_module.save_checkpoint(
        tmp_path / "few", few.params, few.config, few.processor, few.tokenizer.files()
    )
    again = load(tmp_path / "few")
    assert again.weights == "int8"
    jax.tree.map(np.testing.assert_array_equal, again.params, few.params)


def test_what_is_for_inference_is_for_nothing_else(tmp_path, capsys):
    few = str(tmp_path / "few")
    assert convert([str(directory()), few, "--quantize", "int8"]) == 0
    for arguments in ([], ["--to", "hf"], ["--to", "internvl"]):
        assert convert([few, str(tmp_path / "other"), *arguments]) == 1
        assert "holds int8 weights" in (error := capsys.readouterr().err)
        assert error.count("\n") == 1 and "convert from the original" in error
    with pytest.raises(ValueError, match="holds int8 weights already"):
        load(few, weights="int8")
    with pytest.raises(ValueError, match="cannot be trained; name the checkpoint that it was"):
        start(config_of(few), tmp_path / "run")
    for arguments, message in (
        (["--quantize", "int8", "--to", "hf"], "--quantize writes a checkpoint"),
        (["--quantize_tower"], "--quantize_tower is about --quantize"),
    ):
        with pytest.raises(SystemExit):
            convert([str(directory()), few, *arguments])
        assert message in capsys.readouterr().err


def test_damaged_manifests_are_refused(tmp_path):
    few = tmp_path / "few"
    assert convert([str(directory()), str(few), "--quantize", "int8"]) == 0
    path = few / "internvl3_jax.json"
    values = json.loads(path.read_text())
    for changed, message in (
        ({"weights": "int2"}, "has weights 'int2'; this version reads int8, fp8, nf4"),
        ({"weights": "fp8"}, "do not fit the model"),
        ({"weights": None}, "do not fit the model"),
    ):
        path.write_text(json.dumps(values | changed))
        with pytest.raises(ValueError, match=message):
            load(few, verify="none", accept_fingerprint=True)
