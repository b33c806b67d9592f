"""Tiny random transformers models of every member of the family, and the two ways they are released
on disk.

`build_reference` randomizes every parameter: transformers starts class and position embeddings at
zero, biases at zero, norms and layer scales at constants, and a mapping error in any of them would
go unseen. `save_reference(layout="internvl")` writes the original layout from its own list of
names, independent of the table in internvl3_jax/checkpoints/hf/mapping.py, so that the two check
one another.
"""

import copy
import json
import pathlib

import torch
from safetensors.torch import save_file
from transformers import InternVLConfig, InternVLForConditionalGeneration

from tests.support.expert_names import in_files

VISION = {
    "300m": {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "norm_type": "layer_norm",
        "attention_bias": True,
        "use_qk_norm": False,
    },
    # The 6B tower has 25 heads, which no power of two divides; five stand for them here.
    "6b": {
        "hidden_size": 40,
        "num_attention_heads": 5,
        "norm_type": "rms_norm",
        "attention_bias": False,
        "use_qk_norm": True,
    },
}
TEXT = {
    "qwen2": {
        "model_type": "qwen2",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
    },
    "qwen3": {
        "model_type": "qwen3",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "max_position_embeddings": 40960,
        "head_dim": 12,  # wider than hidden / heads, as in all but one released size
        "attention_bias": False,
        "use_sliding_window": False,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "max_position_embeddings": 40960,
        "head_dim": 12,
        "attention_bias": False,
        "use_sliding_window": False,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 20,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "internlm3": {
        "model_type": "internlm3",
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "dynamic", "factor": 6.0, "rope_theta": 5e7},
        "max_position_embeddings": 32768,
        "head_dim": 12,  # wider than hidden / heads, so that the two are never mixed up
        "attention_bias": False,
        "mlp_bias": False,
    },
}

# Keys of config.json about experts.
EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
EXPERTS += ("decoder_sparse_step", "mlp_only_layers", "router_aux_loss_coef")


def build_reference(
    vit: str = "300m",
    llm: str = "qwen2",
    tied: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    vision: dict | None = None,
    text: dict | None = None,
    **overrides,
):
    """A tiny InternVL of transformers in eval mode with every parameter random, and its
    configuration as a dict.

    Args:
      vit: "300m" (LayerNorm, qkv bias) or "6b" (RMSNorm, q/k norm, no qkv bias, five heads).
      llm: "qwen2", "qwen3", "qwen3_moe" or "internlm3".
      tied: whether the output head shares the embedding.
      vision, text: fields of vision_config and text_config to replace.
      overrides: top-level fields of InternVLConfig to replace.

    The default is a 16 px tile of 4 px patches: 4 x 4 patches, 4 tokens a tile, `image_token_id`
    120 of a vocabulary of 131.
    """
    vision_config = {
        "num_hidden_layers": 3,
        "intermediate_size": 56,
        "image_size": [16, 16],
        "patch_size": [4, 4],
        "layer_norm_eps": 1e-6,
        **VISION[vit],
        **(vision or {}),
    }
    text_config = {
        "vocab_size": 131,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "tie_word_embeddings": tied,
        **copy.deepcopy(TEXT[llm]),
        **(text or {}),
    }
    grid = vision_config["image_size"][0] // vision_config["patch_size"][0]
    fields = {
        "image_token_id": 120,
        "image_seq_length": (grid // 2) ** 2,
        "tie_word_embeddings": tied,
        **overrides,
    }
    config = InternVLConfig(vision_config=vision_config, text_config=text_config, **fields)
    # Eager attention everywhere, which is the plain formula.
    config._attn_implementation = "eager"
    model = InternVLForConditionalGeneration(config).eval()
    randomise(model, seed)
    return model.to(dtype), json.loads(config.to_json_string(use_diff=False))


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Samples every parameter: norm weights around 1, layer scales around 0.5, the rest so that
    activations stay near 1.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "lambda_" in name:
            value = 0.5 + 0.1 * noise
        elif (
            parameter.dim() == 1
            and name.endswith("norm.weight")
            or "layernorm" in name
            and name.endswith("weight")
        ):
            value = 1.0 + 0.2 * noise
        elif parameter.dim() == 1:
            value = 0.2 * noise
        elif "embed" in name or "cls_token" in name:
            value = noise if "patch_embeddings" not in name else noise / parameter[0].numel() ** 0.5
        else:
            value = noise / parameter.shape[-1] ** 0.5
        parameter.copy_(value)


def save_reference(
    model: torch.nn.Module, directory, layout: str = "hf", max_shard_size: str = "5GB"
) -> pathlib.Path:
    """Writes weights and config.json: layout "hf" as transformers saves, "internvl" as the original
    repositories are.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if layout == "hf":
        model.save_pretrained(directory, max_shard_size=max_shard_size)
        return directory
    if layout != "internvl":
        raise ValueError(f"layout is 'hf' or 'internvl', not {layout!r}")
    save_file(
        original_state_dict(model), directory / "model.safetensors", metadata={"format": "pt"}
    )
    (directory / "config.json").write_text(json.dumps(original_config(model), indent=2))
    return directory


def original_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors under the names of the original repositories; a tied head is written out,
    as that code never ties.
    """
    source = in_files(model.state_dict())
    tensors = {}
    head = source.get("lm_head.weight", source["model.language_model.embed_tokens.weight"])
    tensors["language_model.lm_head.weight"] = head.clone()
    for name, tensor in source.items():
        if name.startswith("model.language_model."):
            tensors[name.replace("model.language_model.", "language_model.model.", 1)] = (
                tensor.clone()
            )
    vision = "model.vision_tower.embeddings."
    tensors["vision_model.embeddings.class_embedding"] = source[vision + "cls_token"].clone()
    tensors["vision_model.embeddings.position_embedding"] = source[
        vision + "position_embeddings"
    ].clone()
    for part in ("weight", "bias"):
        tensors[f"vision_model.embeddings.patch_embedding.{part}"] = source[
            f"{vision}patch_embeddings.projection.{part}"
        ].clone()
        for index, name in ((0, "layer_norm"), (1, "linear_1"), (3, "linear_2")):
            tensors[f"mlp1.{index}.{part}"] = source[
                f"model.multi_modal_projector.{name}.{part}"
            ].clone()
    for layer in range(len(model.model.vision_tower.encoder.layer)):
        block = model.model.vision_tower.encoder.layer[layer]
        tensors.update(
            {
                f"vision_model.encoder.layers.{layer}.{name}": value
                for name, value in _original_block(block).items()
            }
        )
    return tensors


def _original_block(block: torch.nn.Module) -> dict[str, torch.Tensor]:
    attention = block.attention
    thirds = (attention.q_proj, attention.k_proj, attention.v_proj)
    tensors = {
        "ls1": block.lambda_1,
        "ls2": block.lambda_2,
        "attn.qkv.weight": torch.cat([part.weight for part in thirds]),
        "attn.proj.weight": attention.projection_layer.weight,
        "attn.proj.bias": attention.projection_layer.bias,
        "norm1.weight": block.layernorm_before.weight,
        "norm2.weight": block.layernorm_after.weight,
    }
    for name in ("fc1", "fc2"):
        tensors[f"mlp.{name}.weight"] = getattr(block.mlp, name).weight
        tensors[f"mlp.{name}.bias"] = getattr(block.mlp, name).bias
    if attention.q_proj.bias is not None:
        tensors["attn.qkv.bias"] = torch.cat([part.bias for part in thirds])
    if hasattr(block.layernorm_before, "bias"):
        tensors["norm1.bias"] = block.layernorm_before.bias
        tensors["norm2.bias"] = block.layernorm_after.bias
    if hasattr(attention.q_norm, "weight"):
        tensors["attn.q_norm.weight"] = attention.q_norm.weight
        tensors["attn.k_norm.weight"] = attention.k_norm.weight
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def original_config(model: torch.nn.Module) -> dict:
    """config.json as the original repositories write it: llm_config and vision_config, rope in the
    style of transformers 4.
    """
    vision, text = model.config.vision_config, model.config.text_config
    rope = dict(text.rope_parameters)
    theta = rope.pop("rope_theta")
    kind = rope["rope_type"]
    llm_config = {
        "architectures": [
            {
                "qwen2": "Qwen2",
                "qwen3": "Qwen3",
                "qwen3_moe": "Qwen3Moe",
                "internlm3": "InternLM3",
            }[text.model_type]
            + "ForCausalLM"
        ],
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"type": kind, **rope},
        "tie_word_embeddings": False,
        "torch_dtype": str(model.dtype).removeprefix("torch."),
    }
    names = [
        "model_type",
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ]
    names += [
        "intermediate_size",
        "rms_norm_eps",
        "max_position_embeddings",
        "hidden_act",
        "attention_dropout",
        "use_cache",
    ]
    llm_config |= {name: getattr(text, name) for name in names}
    if text.model_type == "qwen3_moe":
        llm_config |= {name: getattr(text, name) for name in EXPERTS}
    if text.model_type.startswith("qwen3"):
        llm_config |= {"head_dim": text.head_dim, "attention_bias": text.attention_bias}
    if text.model_type == "internlm3":
        llm_config |= {
            "head_dim": text.head_dim,
            "qkv_bias": text.attention_bias,
            "bias": text.mlp_bias,
        }
    vision_config = {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "image_size": vision.image_size[0],
        "patch_size": vision.patch_size[0],
        "qk_normalization": vision.use_qk_norm,
        "qkv_bias": vision.attention_bias,
        "drop_path_rate": 0.1,
        "initializer_factor": 0.1,
        "initializer_range": 1e-10,
        "use_flash_attn": True,
    }
    names = [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "norm_type",
        "layer_norm_eps",
    ]
    vision_config |= {name: getattr(vision, name) for name in names} | {
        "hidden_act": "gelu",
        "num_channels": 3,
    }
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": vision.image_size[0],
        "llm_config": llm_config,
        "vision_config": vision_config,
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "system_message": None,
        "template": "internvl2_5",
        "tie_word_embeddings": False,
        "torch_dtype": llm_config["torch_dtype"],
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
    }
