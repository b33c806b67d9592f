"""The parts of InternVL3.5-Flash: the numbers of a restatement in torch, and the published counts."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch

from internvl3_jax.checkpoints.hf.assemble import (
    ConversionError,
    params_from_tensors,
    tensors_from_params,
)
from internvl3_jax.checkpoints.manifest import Manifest
from internvl3_jax.checkpoints.storage import by_path
from internvl3_jax.config import ConfigError, MeshConfig
from internvl3_jax.model.internvl import InternVL, abstract_params, count_params
from internvl3_jax.parallel.sharding import make_mesh, param_shardings
from internvl3_jax.sizes import SIZES
from tests.support.flash_reference import flash_pair
from tests.support.parity import TOLERANCE, pixels
from tests.support.released import (
    convert,
    params_of,
    reduce,
    same_tensors,
    stored_tensors,
    write_released,
)


def noise_tiles(config, count, seed=0):
    size = config.vision.image_size
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize(("size", "projector"), [("3.5-1b", 39_883_776), ("3.5-8b", 234_934_272)])
def test_the_published_numbers_of_parameters(size, projector):
    plain = count_params(SIZES[size])
    counts = count_params(dataclasses.replace(SIZES[size], flash=True))
    assert counts == plain | {"flash": projector + 50_390_018}


def test_features_and_probabilities_are_those_of_torch():
    model, _, config, params = flash_pair()
    assert (config.tokens_per_tile, config.tokens_per_compressed_tile) == (16, 4)
    tiles = noise_tiles(config, 5)
    ours = jax.jit(
        lambda: InternVL(config).apply({"params": params}, tiles, method=InternVL.encode_both)
    )()
    with torch.no_grad():
        theirs = model.encode(pixels(tiles, config))
    for found, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(found, expected.numpy(), **TOLERANCE)
    assert ours[2].max() - ours[2].min() > 0.05
    alone = InternVL(config).apply({"params": params}, tiles[3:4], method=InternVL.encode_both)
    np.testing.assert_allclose(alone[2][0], ours[2][3], rtol=1e-5)


def test_the_third_and_fourth_attention_are_not_used():
    _, _, config, params = flash_pair()
    tiles = noise_tiles(config, 2)
    encode = jax.jit(
        lambda params: InternVL(config).apply(
            {"params": params}, tiles, method=InternVL.encode_both
        )
    )
    expected = encode(params)
    for name, is_used in (("attn2", True), ("norm2", True), ("attn3", False), ("norm4", False)):
        pooling = params["flash"]["pooling"]
        changed = pooling | {name: jax.tree.map(lambda leaf: leaf + 0.3, pooling[name])}
        found = encode(params | {"flash": params["flash"] | {"pooling": changed}})
        assert (np.abs(found[2] - expected[2]).max() > 1e-4) == is_used, name


def test_a_flash_model_without_compression_is_the_plain_model():
    _, _, config, params = flash_pair()
    plain = dataclasses.replace(config, flash=False, flash_relative=0.0, flash_absolute=0.0)
    tiles = noise_tiles(config, 2)
    without = {name: params[name] for name in ("vision", "projector")}
    np.testing.assert_array_equal(
        InternVL(config).apply({"params": params}, tiles, method=InternVL.encode),
        InternVL(plain).apply({"params": without}, tiles, method=InternVL.encode),
    )


def test_every_parameter_has_one_rule_of_sharding():
    config = dataclasses.replace(SIZES["3.5-1b"], flash=True)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    shardings = by_path(param_shardings(abstract_params(config), mesh))
    whole = {
        path.removeprefix("flash/")
        for path, sharding in shardings.items()
        if path.startswith("flash/") and path.endswith("kernel") and sharding.is_fully_replicated
    }
    assert not whole


def test_round_trip_is_bit_exact(tmp_path):
    model = dataclasses.replace(reduce("3.5-1b"), flash=True, flash_relative=0.1)
    model = dataclasses.replace(model, flash_absolute=0.6)
    released = write_released(tmp_path / "released", model, "internvl")
    stored = json.loads((released / "config.json").read_text())
    assert stored["flash_mode"] is True
    assert (stored["flash_relative_threshold"], stored["flash_absolute_threshold"]) == (0.1, 0.6)
    convert(released, tmp_path / "ours", verify=True)
    assert Manifest.read(tmp_path / "ours").model == model
    convert(tmp_path / "ours", tmp_path / "back", to="internvl", verify=True)
    same_tensors(stored_tensors(released), stored_tensors(tmp_path / "back"))
    convert(tmp_path / "back", tmp_path / "again", verify=True)
    same_tensors(params_of(tmp_path / "ours"), params_of(tmp_path / "again"))
    with pytest.raises(ValueError, match="transformers has no Flash model; use the original layou"):
        convert(tmp_path / "ours", tmp_path / "hf", to="hf")


def test_the_released_names_are_those_of_the_restatement():
    model, tensors, config, params = flash_pair()
    written = tensors_from_params(config, params, "internvl")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)


def test_weights_and_config_that_contradict_each_other():
    model, tensors, config, _ = flash_pair()
    lacking = {name: tensor for name, tensor in tensors.items() if "attn4.in_proj" not in name}
    with pytest.raises(ConversionError, match="(?s)missing.*attn4.in_proj_bias"):
        params_from_tensors(config, lacking, "internvl")
    plain = dataclasses.replace(config, flash=False)
    with pytest.raises(ConversionError, match="(?s)unknown.*mlp2.0.weight"):
        params_from_tensors(plain, {**tensors}, "internvl")
    with pytest.raises(ValueError, match="transformers has no Flash model"):
        tensors_from_params(config, {}, "hf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 24}, "flash: 6 patches a side do not fold by 4"),
        ({"hidden_size": 24, "num_heads": 3}, "16 heads, which do not divide the tower's width 24"),
    ],
)
def test_shapes_that_the_router_cannot_have(changes, message):
    _, _, config, _ = flash_pair()
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(config, vision=dataclasses.replace(config.vision, **changes))
