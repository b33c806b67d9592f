"""Adapters in PEFT's format: peft and transformers compute with ours what we do, and we with
theirs; both released layouts.
"""

import dataclasses
import json

import jax
import numpy as np
import peft
import pytest
import torch

from internvl3_jax.checkpoints.hf.assemble import tensors_from_params
from internvl3_jax.checkpoints.hf.peft import read_peft
from internvl3_jax.checkpoints.hf.peft_writer import write_peft
from internvl3_jax.checkpoints.storage import by_path
from internvl3_jax.config import LoraConfig
from internvl3_jax.io.checkpoint_paths import PEFT
from internvl3_jax.model import lora
from internvl3_jax.model.internvl import InternVL
from tests.support import torch_reference
from tests.support.peft_setup import SETTINGS, build, drawn

# transformers' own: peft asks a model for what it deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.fixture(params=[("300m", "qwen2"), ("6b", "internlm3"), ("300m", "qwen3")], ids=str)
def reference(request):
    """(torch model, our configuration, our parameters)"""
    return build(*request.param)


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
