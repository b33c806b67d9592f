"""Adapters in PEFT's format: peft and transformers compute with ours what we do, and we with
theirs; both released layouts.
"""

import dataclasses
import json
import re

import jax
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

from convert.__main__ import main as convert
from internvl3_jax.checkpoints.hf.assemble import (
    ConversionError,
    params_from_tensors,
    tensors_from_params,
)
from internvl3_jax.checkpoints.hf.config import from_hf
from internvl3_jax.checkpoints.hf.peft import read_peft
from internvl3_jax.checkpoints.hf.peft_settings import WEIGHTS
from internvl3_jax.checkpoints.hf.peft_writer import write_peft
from internvl3_jax.checkpoints.storage import by_path
from internvl3_jax.config import LoraConfig
from internvl3_jax.io.checkpoint_paths import PEFT
from internvl3_jax.model import lora
from internvl3_jax.model.internvl import InternVL
from tests.support import tiny_checkpoint, torch_reference

EVERYWHERE = (
    "vision/layers/(qkv|proj|fc1|fc2)",
    "projector/fc[12]",
    "language/layers/(q|k|v|o|gate|up|down)",
)
SETTINGS = LoraConfig(rank=3, alpha=5.0, targets=EVERYWHERE)
# transformers' own: peft asks a model for what it deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.fixture(params=[("300m", "qwen2"), ("6b", "internlm3")], ids=str)
def reference(request):
    """(torch model, our configuration, our parameters)"""
    return build(*request.param)


def build(vit="300m", llm="qwen2"):
    model, values = torch_reference.build_reference(vit, llm)
    config = from_hf(values, image_token_id=120, has_head=True)
    return (
        model,
        config,
        params_from_tensors(
            config, {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        ),
    )


def drawn(params, settings):
    rng = np.random.default_rng(0)
    new = lora.init(params, settings, jax.random.key(0))
    return jax.tree.map(
        lambda leaf: np.asarray(leaf) + 0.1 * rng.standard_normal(leaf.shape, np.float32), new
    )


TOKENS = np.array([[1, 2, 120, 120, 120, 120, 5, 6, 7, 99]], np.int32)
TILE = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)


def ours(config, variables):
    positions = 256 * np.arange(TOKENS.shape[1], dtype=np.int32)[None]
    batch = {
        "tokens": TOKENS,
        "positions": positions,
        "segments": np.ones_like(TOKENS),
        "tiles": TILE[None],
    }
    return np.asarray(jax.jit(InternVL(config).apply)(variables, batch))


@torch.no_grad()
def theirs(model):
    mean, std = (np.array(x, np.float32) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = torch.from_numpy(((TILE / np.float32(255) - mean) / std).transpose(0, 3, 1, 2))
    return model(input_ids=torch.from_numpy(TOKENS).long(), pixel_values=pixels).logits.numpy()


# --- ours in peft --------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_transformers_computes_with_our_adapter(reference, rslora, tmp_path):
    """On every linear layer of all three parts, and with the projector's norm trained whole."""
    model, config, params = reference
    settings = dataclasses.replace(SETTINGS, rslora=rslora, full=("projector/norm/.*",))
    norm = jax.tree.map(lambda leaf: leaf + 0.3, params["projector"]["norm"])
    own = {lora.SUBTREE: drawn(params, settings), "projector": {"norm": norm}}
    write_peft(tmp_path, own, settings, config, "hf", "base")
    before = theirs(model)
    found = theirs(peft.PeftModel.from_pretrained(model, tmp_path))
    tree = params | {
        "projector": params["projector"] | {"norm": norm},
        lora.SUBTREE: own[lora.SUBTREE],
    }
    expected = ours(config, lora.variables(tree, settings))
    assert np.abs(found - before).max() > 1
    np.testing.assert_allclose(expected, found, atol=1e-4)


def skeleton(tensors):
    """A model of nothing but linear layers and norms, with the names of the original repositories."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        *parents, leaf, part = name.split(".")
        node = root
        for parent in parents:
            if not hasattr(node, parent):
                node.add_module(parent, torch.nn.Module())
            node = getattr(node, parent)
        if part == "weight" and tensor.dim() == 2 and "embed" not in name:
            node.add_module(
                leaf,
                torch.nn.Linear(
                    tensor.shape[1], tensor.shape[0], bias=f"{name[:-6]}bias" in tensors
                ),
            )
    root.load_state_dict(
        {name: tensor for name, tensor in tensors.items() if name in root.state_dict()}
    )
    return root


def test_peft_merges_our_adapter_into_the_original_layout(reference, tmp_path):
    """As we merge it: every tensor, by names that the reference in the tests writes without our
    table.
    """
    model, config, params = reference
    adapters = drawn(params, SETTINGS)
    write_peft(tmp_path, {lora.SUBTREE: adapters}, SETTINGS, config, "internvl", "base")
    original = skeleton(torch_reference.original_state_dict(model))
    found = peft.PeftModel.from_pretrained(original, tmp_path).merge_and_unload().state_dict()
    merged = lora.merged(params | {lora.SUBTREE: adapters}, SETTINGS)
    expected = tensors_from_params(config, jax.tree.map(np.asarray, merged), "internvl")
    changed = [name for name in found if name.endswith("weight") and "lm_head" not in name]
    assert len(changed) == 3 * (4 + 7) + 2
    for name in changed:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5, err_msg=name)
        assert (
            np.abs(
                found[name].numpy() - torch_reference.original_state_dict(model)[name].numpy()
            ).max()
            > 0.01
        ), name


# --- peft's here ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj", "fc2", "linear_1"], "use_rslora": True},
        {
            "target_modules": r".*language_model.*\.1\..*\.(q|down)_proj",
            "modules_to_save": ["linear_2"],
        },
        {
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"up_proj": 5},
            "alpha_pattern": {"vision_tower.*q_proj": 11},
        },
    ],
    ids=["all", "some", "one layer", "patterns"],
)
def test_an_adapter_of_peft_computes_the_same_here(options, tmp_path):
    model, config, params = build()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, **options)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(tmp_path)
    adapter = read_peft(tmp_path, config)
    tree = params | adapter.parts(params)
    found, expected = ours(config, lora.variables(tree)), theirs(adapted)
    assert np.abs(expected - ours(config, {"params": params})).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("layout", ["hf", "internvl"])
def test_what_is_written_is_read_again(layout, tmp_path):
    _, config, params = build()
    settings = dataclasses.replace(SETTINGS, full=("projector/norm/.*", "language/head/kernel"))
    own = {
        lora.SUBTREE: drawn(params, settings),
        "projector": {"norm": params["projector"]["norm"]},
    }
    own |= {"language": {"head": params["language"]["head"]}}
    write_peft(tmp_path, own, settings, config, layout, "base")
    adapter = read_peft(tmp_path, config)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        adapter.lora,
        lora.scaled(own[lora.SUBTREE], settings),
    )
    jax.tree.map(np.testing.assert_array_equal, adapter.whole, lora.base_params(own))


def test_three_adapters_of_the_towers_qkv_become_one_of_three_times_the_rank(tmp_path):
    """And go out again to either layout, with the ranks that PEFT must be told."""
    model, config, params = build()
    options = {"target_modules": r".*vision_tower.*\.(q|k|v)_proj", "init_lora_weights": False}
    peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=8, **options)).save_pretrained(
        tmp_path / "theirs"
    )
    adapter = read_peft(tmp_path / "theirs", config)
    assert {path: leaf.shape for path, leaf in by_path(adapter.lora).items()} == {
        "vision/layers/qkv/a": (3, 32, 6),
        "vision/layers/qkv/b": (3, 6, 96),
    }
    expected = ours(config, lora.variables(params | adapter.parts(params)))
    for layout in ("hf", "internvl"):
        settings = LoraConfig(rank=3, alpha=3.0)
        (tmp_path / layout).mkdir()
        write_peft(
            tmp_path / layout, {lora.SUBTREE: adapter.lora}, settings, config, layout, "base"
        )
        values = json.loads((tmp_path / layout / PEFT).read_text())
        assert set(values["rank_pattern"].values()) == {6} and set(
            values["alpha_pattern"].values()
        ) == {6.0}
        again = read_peft(tmp_path / layout, config)
        np.testing.assert_allclose(
            ours(config, lora.variables(params | again.parts(params))), expected, atol=1e-4
        )
    found = theirs(peft.PeftModel.from_pretrained(build()[0], tmp_path / "hf"))
    np.testing.assert_allclose(found, expected, atol=1e-4)


# --- what is refused -----------------------------------------------------------------------------


def written(directory, config, params, change=lambda tensors, values: None):
    """A directory of `write_peft`, changed."""
    write_peft(directory, {lora.SUBTREE: drawn(params, SETTINGS)}, SETTINGS, config, "hf", "base")
    tensors, values = load_file(directory / WEIGHTS), json.loads((directory / PEFT).read_text())
    change(tensors, values)
    save_file(tensors, directory / WEIGHTS)
    (directory / PEFT).write_text(json.dumps(values))
    return directory


UP = "base_model.model.model.language_model.layers.1.mlp.up_proj.lora_"


def renamed(tensors, values):
    tensors["base_model.model.model.language_model.layers.7.mlp.up_proj.lora_A.weight"] = (
        tensors.pop(f"{UP}A.weight")
    )


def reshaped(tensors, values):
    tensors[f"{UP}B.weight"] = tensors[f"{UP}B.weight"][:5]


def without_a_layer(tensors, values):
    for factor in "AB":
        tensors.pop(f"{UP}{factor}.weight")


def grown(tensors, values):
    tensors["base_model.model.lm_head.weight"] = np.zeros((133, 32), np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            renamed,
            "1 tensor(s) that the model does not have, such as base_model.model.model.language_model.layers.7.mlp",
        ),
        (
            lambda tensors, values: tensors.pop(f"{UP}A.weight"),
            f"{UP}B.weight has no lora_A",
        ),
        (reshaped, f"{UP}B.weight (5, 3) do not fit: the layer has 32 inputs and 48 outputs"),
        (
            lambda tensors, values: values.update(use_dora=True),
            "use_dora is True; supported: False",
        ),
        (
            lambda tensors, values: values.update(peft_type="IA3"),
            "peft_type is 'IA3'; supported: 'LORA'",
        ),
        (
            lambda tensors, values: values.update(init_lora_weights="pissa_niter_4"),
            "it belongs to a base that PEFT changes",
        ),
        (
            lambda tensors, values: values.update(alora_invocation_tokens=[5]),
            "alora_invocation_tokens is [5]; supported: []",
        ),
        (
            lambda tensors, values: values.update(use_rsloar=True),
            "'use_rsloar' is True; this setting is not known here, and may",
        ),
        (
            lambda tensors, values: values.update(layer_replication=[[0, 1]]),
            "layer_replication is [[0, 1]]; supported: []",
        ),
        (
            lambda tensors, values: values.update(use_rslora="no"),
            "use_rslora is the text 'no'; expected true or false",
        ),
        (
            lambda tensors, values: values.update(r="3"),
            "r is the text '3'; expected a whole number",
        ),
        (lambda tensors, values: values.update(r=4), "the rank 4, but its tensors have the rank 3"),
        (lambda tensors, values: values.update(lora_alpha=0), "lora_alpha is 0; expected from"),
        (lambda tensors, values: values.update(lora_alpha=None), "lora_alpha is missing"),
        (
            lambda tensors, values: values.update(target_modules=[7]),
            "target_modules[0] is the number 7; expected a text",
        ),
        (
            lambda tensors, values: values.update(alpha_pattern={"(a+)+b": 1}),
            "is a regular expression that could take forever",
        ),
        (
            lambda tensors, values: values.update(alpha_pattern={"(.|.)" * 40: 1}),
            "is a regular expression that could take forever",
        ),
        (
            lambda tensors, values: values.update(rank_pattern={"up_proj(": 3}),
            "'up_proj(' is not a regular expression",
        ),
        (
            lambda tensors, values: values.update(rank_pattern={"up_proj": 0}),
            "rank_pattern: 'up_proj' is 0; expected from 1",
        ),
        (
            lambda tensors, values: values.update(modules_to_save=["lm_head"]),
            "lacks 1 tensor(s) of modules that adapter_config.json",
        ),
        (
            without_a_layer,
            "such as model.language_model.layers.1.mlp.up_proj.lora_A.weight; save the adapter again",
        ),
        (
            lambda tensors, values: tensors[f"{UP}A.weight"].fill(np.nan),
            f"{UP}A.weight: 96 of 96 values",
        ),
        (
            lambda tensors, values: tensors.update(
                {f"{UP}A.weight": tensors[f"{UP}A.weight"].astype(np.int32)}
            ),
            "is int32; expected",
        ),
        (
            grown,
            "lm_head.weight has shape (133, 32), the base has (131, 32); its vocabulary was resized",
        ),
    ],
    ids=["unknown", "half", "shape", "dora", "other", "pissa", "alora", *"abcdefghijklmnopq"],
)
def test_what_is_no_adapter_of_this_model_is_named(change, message, tmp_path):
    _, config, params = build()
    with pytest.raises(ValueError, match=re.escape(message)):
        read_peft(written(tmp_path, config, params, change), config)


def test_internlm2s_own_names_are_not_written(tmp_path):
    _, config, params = build()
    config = dataclasses.replace(
        config, language=dataclasses.replace(config.language, family="internlm2")
    )
    with pytest.raises(
        ConversionError, match="one interleaved weight, for which adapters are not supported"
    ):
        write_peft(
            tmp_path, {lora.SUBTREE: drawn(params, SETTINGS)}, SETTINGS, config, "internvl", "base"
        )


def test_a_module_that_was_trained_in_part_cannot_go_to_peft(tmp_path):
    _, config, params = build()
    own = {
        lora.SUBTREE: drawn(params, SETTINGS),
        "projector": {"norm": {"scale": params["projector"]["norm"]["scale"]}},
    }
    with pytest.raises(
        ConversionError,
        match="layer_norm was trained except for model.multi_modal_projector.layer_norm.bias",
    ):
        write_peft(tmp_path, own, SETTINGS, config, "hf", "base")


def test_the_program_says_what_lacks(tmp_path, capsys):
    _, config, params = build()
    written(
        tmp_path,
        config,
        params,
        lambda tensors, values: values.update(base_model_name_or_path=None),
    )
    assert convert([str(tmp_path), str(tmp_path / "out"), "--to", "peft-internvl"]) == 1
    assert (
        "names no base_model_name_or_path; say with --base which model it is for"
        in capsys.readouterr().err
    )
    base = str(tiny_checkpoint.directory())
    assert convert([base, str(tmp_path / "out"), "--base", base]) == 1
    assert "is not a LoRA run, so it has no base" in capsys.readouterr().err
    assert convert([base, str(tmp_path / "out"), "--base", base, "--adapter", base]) == 1
    assert "give one of them" in capsys.readouterr().err
    assert convert([base, str(tmp_path / "out"), "--adapter", base]) == 1
    assert "is not a PEFT directory" in capsys.readouterr().err
