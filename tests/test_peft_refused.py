"""What is no adapter of a model is named, and what PEFT cannot hold is not written."""

import dataclasses
import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.__main__ import main as convert
from internvl3_jax.checkpoints.hf.assemble import ConversionError
from internvl3_jax.checkpoints.hf.peft import read_peft
from internvl3_jax.checkpoints.hf.peft_settings import WEIGHTS
from internvl3_jax.checkpoints.hf.peft_writer import write_peft
from internvl3_jax.io.checkpoint_paths import PEFT
from internvl3_jax.model import lora
from tests.support import tiny_checkpoint
from tests.support.peft_setup import SETTINGS, build, drawn

# transformers' own: peft asks a model for what it deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


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
