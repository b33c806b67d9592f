"""config.json of the two released layouts, written from our configuration.

The keys that are read back by name alone are in checkpoints/hf/keys.py; here are the rest, and the
constants that other readers expect.
"""

from internvl3_jax.checkpoints.hf.keys import (
    EXPERTS,
    LANGUAGE,
    NUMBER_OF_EXPERTS,
    VISION,
    write_keys,
)
from internvl3_jax.checkpoints.hf.mapping import check_layout
from internvl3_jax.config import UNITS, LanguageConfig, ModelConfig, ProcessorConfig

ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "internlm2": "InternLM2ForCausalLM",
    "internlm3": "InternLM3ForCausalLM",
}


def to_hf(
    model: ModelConfig,
    processor: ProcessorConfig,
    layout: str,
    dtype: str,
    token_ids: dict | None = None,
    auto_map: dict | None = None,
) -> dict:
    """Returns config.json of a layout, which `checkpoints.hf.config.from_hf` reads back.

    Args:
      model: the model.
      processor: image and prompt settings; only the original layout has them in this file.
      layout: "internvl" or "hf".
      dtype: name of the weights' dtype.
      token_ids: bos_token_id, eos_token_id and pad_token_id of the language model.
      auto_map: the original layout's pointers to its Python files, if those are exported too.

    Raises:
      ValueError: the layout cannot express the model; the message names the field.
    """
    if layout == "hf":
        return _transformers(model, dtype, token_ids or {})
    return _original(model, processor, dtype, token_ids or {}, auto_map)


def _language(language: LanguageConfig, dtype: str, token_ids: dict) -> dict:
    """Returns the decoder's part, as far as it is the same in both layouts."""
    values = {
        "architectures": [ARCHITECTURES[language.family]],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": language.family,
        "rms_norm_eps": language.norm_eps,
        "rope_scaling": None,
        "rope_theta": language.rope_theta,
        "tie_word_embeddings": language.tie_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        **write_keys(language, LANGUAGE),
        **token_ids,
    }
    if language.rope_scaling == "dynamic":
        # "type" is what transformers before 4.43 reads.
        values["rope_scaling"] = {
            "factor": language.rope_factor,
            "rope_type": "dynamic",
            "type": "dynamic",
        }
    is_qwen3 = language.family in ("qwen3", "qwen3_moe")
    if language.qk_norm != is_qwen3:
        raise ValueError(
            f"language.qk_norm is {language.qk_norm} and language.family {language.family!r}: "
            "Qwen3 has norms of q and k, and no other family has; set them so"
        )
    if is_qwen3:
        values["attention_bias"] = _one_attention_bias(language, "Qwen3")
    if language.num_experts:
        values |= dict.fromkeys(NUMBER_OF_EXPERTS, language.num_experts)
        values |= write_keys(language, EXPERTS)
        values |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
        values |= {"output_router_logits": False, "router_aux_loss_coef": 0.001}
    if language.family == "qwen2":
        if (language.qkv_bias, language.o_bias, language.mlp_bias) != (True, False, False):
            raise ValueError(
                "language.qkv_bias, o_bias and mlp_bias: Qwen2 has biases in q, k and v and "
                "nowhere else; set them so, or choose another language.family"
            )
    if is_qwen3 or language.family == "qwen2":
        values |= {
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": language.num_layers,
        }
    heads_differ = language.head_dim * language.num_heads != language.hidden_size
    if heads_differ or is_qwen3 or language.family == "internlm3":
        values["head_dim"] = language.head_dim
    return values


def _internlm2_bias(language: LanguageConfig) -> bool:
    """Returns InternLM2's one bias flag, of wqkv and wo."""
    if language.head_dim * language.num_heads != language.hidden_size:
        raise ValueError(
            f"language.head_dim is {language.head_dim}: InternLM2's heads together are as wide as "
            f"the model ({language.hidden_size})"
        )
    return _one_attention_bias(language, "InternLM2")


def _one_attention_bias(language: LanguageConfig, family: str) -> bool:
    """Returns whether q, k, v and o have biases."""
    if language.qkv_bias != language.o_bias or language.mlp_bias:
        raise ValueError(
            f"language.qkv_bias, o_bias and mlp_bias: {family} has one flag for q, k, v and o, "
            "and no bias in the MLP; set them so"
        )
    return language.qkv_bias


def _transformers(model: ModelConfig, dtype: str, token_ids: dict) -> dict:
    vision, language = model.vision, model.language
    if model.ps_version != "v2":
        raise ValueError(
            f"ps_version is {model.ps_version}: transformers computes pixel shuffle v2 only; "
            "export with --to internvl"
        )
    check_layout(model, "hf")
    text = _language(language, dtype, token_ids)
    if language.family == "internlm2":  # not in transformers, which has the same network as Llama
        text |= {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": _internlm2_bias(language),
            "mlp_bias": False,
        }
    if language.family == "internlm3":
        if len({language.qkv_bias, language.o_bias, language.mlp_bias}) > 1:
            raise ValueError(
                "language.qkv_bias, o_bias and mlp_bias differ: transformers' InternLM3 has "
                "biases everywhere or nowhere; export with --to internvl"
            )
        text |= {"attention_bias": language.qkv_bias, "mlp_bias": language.mlp_bias}
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": 1 / model.downsample,
        "image_seq_length": model.tokens_per_tile,
        "image_token_id": model.image_token_id,
        "model_type": "internvl",
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": language.tie_embeddings,
        "torch_dtype": dtype,
        "vision_config": {
            "architectures": ["InternVLVisionModel"],
            "attention_dropout": 0.0,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.0,
            "image_size": [vision.image_size] * 2,
            "initializer_range": 0.02,
            "model_type": "internvl_vision",
            "num_channels": 3,
            "patch_size": [vision.patch_size] * 2,
            "projection_dropout": 0.0,
            "torch_dtype": dtype,
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": True,
            **write_keys(vision, VISION["hf"]),
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }


def _original(
    model: ModelConfig,
    processor: ProcessorConfig,
    dtype: str,
    token_ids: dict,
    auto_map: dict | None,
) -> dict:
    vision = model.vision
    values = {
        "architectures": ["InternVLChatModel"],
        "downsample_ratio": 1 / model.downsample,
        "dynamic_image_size": True,
        "force_image_size": vision.image_size,
        "llm_config": _original_language(model.language, dtype, token_ids),
        "max_dynamic_patch": processor.max_tiles,
        "min_dynamic_patch": processor.min_tiles,
        "model_type": "internvl_chat",
        "pad2square": False,
        "ps_version": model.ps_version,
        "select_layer": -1,
        "template": processor.template,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": processor.use_thumbnail,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "attention_dropout": 0.0,
            "dropout": 0.0,
            "hidden_act": "gelu",
            "image_size": vision.image_size,
            "initializer_range": 0.02,
            "model_type": "intern_vit_6b",
            "num_channels": 3,
            "patch_size": vision.patch_size,
            "torch_dtype": dtype,
            "use_flash_attn": True,
            **write_keys(vision, VISION["internvl"]),
        },
    }
    if processor.system_message != "default":
        # The original class takes this wherever it exists; null would become the text "None".
        values["system_message"] = processor.system_message or ""
    if model.flash:
        values |= {
            "flash_mode": True,
            "flash_relative_threshold": model.flash_relative,
            "flash_absolute_threshold": model.flash_absolute,
        }
    if processor.delta != UNITS:
        values |= {"rope_pos_id_version": "v2pe_fix", "rope_pos_id_stride": processor.delta}
    return values | ({"auto_map": auto_map} if auto_map else {})


def _original_language(language: LanguageConfig, dtype: str, token_ids: dict) -> dict:
    if language.tie_embeddings:
        raise ValueError(
            "language.tie_embeddings is true: the original code never ties the output head; "
            "export it untied"
        )
    text = _language(language, dtype, token_ids)
    if language.family == "internlm2":
        text["bias"] = _internlm2_bias(language)
        if text["rope_scaling"]:  # its class wants these two keys and no others
            text["rope_scaling"] = {"type": "dynamic", "factor": language.rope_factor}
    if language.family == "internlm3":
        if language.o_bias != language.mlp_bias:
            raise ValueError(
                "language.o_bias and mlp_bias differ: InternLM3 has one flag for the biases of "
                "o_proj and of the MLP; set them alike"
            )
        text |= {"qkv_bias": language.qkv_bias, "bias": language.mlp_bias}
    return text
