"""InternVL2.5-8B and VisualPRM: the InternLM2 decoder against torch, and its fused wqkv through
every conversion.
"""

import json

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from convert.config_json import to_hf
from convert.open import open_model
from examples.tiny_digits.recipe import tokenizer as tiny_tokenizer
from internvl3_jax.checkpoints import storage
from internvl3_jax.checkpoints.checkpoint import load, save_checkpoint
from internvl3_jax.checkpoints.hf.assemble import ArraySource, ConversionError, params_from_tensors
from internvl3_jax.checkpoints.hf.config import from_hf
from internvl3_jax.checkpoints.hf.internlm2 import table_source
from internvl3_jax.checkpoints.manifest import Manifest
from internvl3_jax.config import ProcessorConfig
from internvl3_jax.inference.generator import Generator
from internvl3_jax.model.internvl import InternVL, count_params
from tests.support.internlm2_reference import Reference, converted
from tests.support.parity import (
    TOLERANCE,
    as_prompt,
    assert_gradients,
    greedy,
    loss_gradients,
    make_row,
)
from tests.support.released import (
    convert,
    params_of,
    random_params,
    reduce_processor,
    same_tensors,
    stored_tensors,
)
from tests.support.released_configs import INTERNLM2, ORIGINAL, changed

pytestmark = pytest.mark.optimized


@pytest.mark.parametrize(("vit", "bias"), [("300m", False), ("300m", True), ("6b", False)])
@pytest.mark.parametrize("tiles", [(), (2, 1)], ids=["text", "images"])
def test_logits(vit, bias, tiles):
    reference = Reference(vit=vit, bias=bias)
    config, params = converted(reference)
    assert (
        config.language.family == "internlm2"
        and config.language.o_bias is config.language.qkv_bias is bias
    )
    batch, pixels = make_row(config, tiles, seed=3)
    theirs = reference(torch.from_numpy(batch["tokens"].astype(np.int64)), pixels).numpy()
    logits = jax.jit(lambda: InternVL(config).apply({"params": params}, batch))()
    np.testing.assert_allclose(logits, theirs, **TOLERANCE)


@pytest.mark.parametrize("vit", ["300m", "6b"])
def test_gradients(vit):
    reference = Reference(vit=vit)
    config, params = converted(reference)
    batch, pixels = make_row(config, (2, 1), seed=13)
    shape = (*batch["tokens"].shape, config.language.vocab_size)
    weights = np.random.default_rng(0).standard_normal(shape, np.float32)
    ids = torch.from_numpy(batch["tokens"].astype(np.int64))
    loss_gradients(lambda: reference.logits(ids, pixels), batch, weights)
    tensors = reference.tensors(gradients=True)
    source = ArraySource({name: tensor.numpy() for name, tensor in tensors.items()})
    expected = params_from_tensors(config, table_source(source, config.language))
    assert_gradients(config, params, batch, weights, expected)


@pytest.mark.parametrize("length", [24, 60])
def test_dynamic_scaling_beyond_the_trained_length(length):
    reference = Reference(max_position_embeddings=32, rope_theta=10000)
    config, params = converted(reference)
    batch, pixels = make_row(config, (), seed=1, lead=length)
    theirs = reference(torch.from_numpy(batch["tokens"].astype(np.int64)), pixels).numpy()
    logits = InternVL(config).apply({"params": params}, batch)
    np.testing.assert_allclose(logits, theirs, **TOLERANCE)
    off = InternVL(config).apply({"params": params}, batch, scaling="none")
    assert (length > 32) == (np.abs(np.asarray(off) - theirs).max() > 1e-2)


def test_greedy_tokens():
    """Prefill and decoding in the merged layout against the whole sequence run anew in torch for
    every token.
    """
    reference = Reference()
    config, params = converted(reference)
    batch, pixels = make_row(config, (2,), seed=5)
    ids = torch.from_numpy(batch["tokens"].astype(np.int64))
    for _ in range(12):
        ids = torch.cat([ids, reference(ids, pixels)[:, -1:].argmax(dim=-1)], dim=1)
    (answer,) = Generator(config, params).generate(
        [as_prompt(config, batch, (2,))], greedy(12, 1, config)
    )
    assert answer == ids[0, batch["tokens"].shape[1] :].tolist()


def test_each_head_of_wqkv_goes_to_its_place():
    """Every row of wqkv holds its own number: by groups, the query heads, the key head, the value
    head.
    """
    config, _ = converted(reference := Reference())
    width, rows = 8, (6 + 2 * 2) * 8
    tensors = {name: tensor.numpy() for name, tensor in reference.tensors().items()}
    tensors["language_model.model.layers.1.attention.wqkv.weight"] = np.tile(
        np.arange(rows, dtype=np.float32)[:, None], (1, 48)
    )
    params = params_from_tensors(config, table_source(ArraySource(tensors), config.language))
    layer = {name: params["language"]["layers"][name]["kernel"][1][0] for name in "qkv"}
    heads = {
        name: (value.reshape(-1, width)[:, 0] / width).tolist() for name, value in layer.items()
    }
    assert heads == {"q": [0, 1, 2, 5, 6, 7], "k": [3, 8], "v": [4, 9]}


# --- conversion ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A released directory in bfloat16 with the tiny tokenizer."""
    directory = tmp_path_factory.mktemp("internlm2") / "released"
    model = Reference(vocab_size=463, bias=True)
    model.body.config.image_token_id = 453
    model.save(directory, torch.bfloat16)
    for name, content in tiny_tokenizer.build().items():
        (directory / name).write_bytes(content)
    return directory


def test_round_trip_is_bit_exact(released, tmp_path):
    convert(released, tmp_path / "ours", verify=True)
    convert(tmp_path / "ours", tmp_path / "back", to="internvl", verify=True, shard_size=60_000)
    same_tensors(stored_tensors(released), stored_tensors(tmp_path / "back"))
    convert(tmp_path / "back", tmp_path / "again", verify=True)
    same_tensors(params_of(tmp_path / "ours"), params_of(tmp_path / "again"))
    assert Manifest.read(tmp_path / "again").model.language.family == "internlm2"
    llm = json.loads((tmp_path / "back" / "config.json").read_text())["llm_config"]
    assert (llm["architectures"], llm["bias"]) == (["InternLM2ForCausalLM"], True)
    assert llm["rope_scaling"] == {"type": "dynamic", "factor": 2.0} and "head_dim" not in llm
    same_tensors(params_of(released), params_of(tmp_path / "ours"))  # opened without converting


def test_transformers_has_it_as_llama(released, tmp_path):
    """The same logits from transformers after --to hf; and back from there with the family that it
    was.
    """
    convert(released, tmp_path / "hf", to="hf", dtype="float32", verify=True)
    model, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.text_config.model_type == "llama"
    checkpoint = load(tmp_path / "hf")
    assert checkpoint.config.language.family == "internlm2"
    batch, pixels = make_row(checkpoint.config, (1,), seed=2)
    with torch.no_grad():
        theirs = model(
            input_ids=torch.from_numpy(batch["tokens"].astype(np.int64)), pixel_values=pixels
        ).logits.numpy()
    ours = checkpoint.model.apply({"params": checkpoint.params}, batch)
    np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4)
    convert(tmp_path / "hf", tmp_path / "original", to="internvl", dtype="bfloat16")
    same_tensors(stored_tensors(released), stored_tensors(tmp_path / "original"))


def test_errors_name_the_tensors_of_the_file(released):
    source = open_model(released).tensors.source
    tensors = {name: source.read(name) for name in source.infos()}
    language = open_model(released).config.language
    wqkv = "language_model.model.layers.2.attention.wqkv.weight"

    def read(changed):
        config = open_model(released).config
        return params_from_tensors(config, table_source(ArraySource(changed), language))

    with pytest.raises(ConversionError, match=r"missing:\n  .*layers.2.attention.wqkv.weight"):
        read({name: tensor for name, tensor in tensors.items() if name != wqkv})
    with pytest.raises(
        ConversionError,
        match=r"layers.2.attention.wqkv.weight has 72 rows; the heads in config.json need 80",
    ):
        read(tensors | {wqkv: tensors[wqkv][8:]})
    with pytest.raises(
        ConversionError, match=r"missing:\n  language_model.model.layers.0.feed_forward.w3.weight"
    ):
        read(
            {
                name: tensor
                for name, tensor in tensors.items()
                if "layers.0.feed_forward.w3" not in name
            }
        )
    with pytest.raises(
        ConversionError, match=r"unknown .*\n  language_model.model.layers.0.attention.wz.weight"
    ):
        read(tensors | {"language_model.model.layers.0.attention.wz.weight": tensors[wqkv]})


# --- configuration -------------------------------------------------------------------------------


def test_released_config():
    config = changed(ORIGINAL, "llm_config", INTERNLM2)
    model = from_hf(config, image_token_id=92546, has_head=True)
    language = model.language
    assert (language.family, language.norm_eps, language.rope_theta, language.rope_factor) == (
        "internlm2",
        1e-5,
        1e6,
        2.0,
    )
    assert not (
        language.qkv_bias or language.o_bias or language.mlp_bias or language.tie_embeddings
    )
    # as the card of InternVL2.5-8B has it: 8.08B
    assert sum(count_params(model).values()) == 8_075_365_376
    written = to_hf(model, ProcessorConfig(), "internvl", "bfloat16")
    assert from_hf(written, image_token_id=92546, has_head=True) == model
    with pytest.raises(ValueError, match="llm_config: bias is missing"):
        from_hf(changed(config, "llm_config.bias", changed), image_token_id=92546, has_head=True)


@pytest.mark.parametrize(
    ("field", "value"), [("o_bias", True), ("mlp_bias", True), ("head_dim", 64)]
)
def test_what_the_layout_cannot_say_is_refused(field, value, tmp_path):
    config = from_hf(Reference().config(), image_token_id=120, has_head=True)
    setattr(config.language, field, value)
    with pytest.raises(ValueError, match="InternLM2"):
        to_hf(config, reduce_processor(config), "internvl", "bfloat16")


def test_export_of_a_checkpoint_that_never_was_released(tmp_path):
    config = from_hf(Reference(vocab_size=463).config(), image_token_id=453, has_head=True)
    params = random_params(config)
    save_checkpoint(
        tmp_path / "ours", params, config, reduce_processor(config), tiny_tokenizer.build()
    )
    convert(tmp_path / "ours", tmp_path / "internvl", to="internvl", verify=True)
    assert not [
        name
        for name in stored_tensors(tmp_path / "internvl")
        if "q_proj" in name or "lm_head" in name
    ]
    same_tensors(params_of(tmp_path / "internvl"), storage.by_path(params))
