"""config.json of tiny models of each family, in the two released layouts.

Written out here, not with the table that reads them, so that a pack is a check of that table, too.
"""

_VISION = {
    "hidden_act": "gelu",
    "image_size": 16,
    "intermediate_size": 40,
    "layer_norm_eps": 1e-6,
    "num_channels": 3,
    "num_hidden_layers": 2,
    "patch_size": 4,
}
# The two towers: 300M and 6B.
_TOWERS = {
    "300m": {"hidden_size": 24, "num_attention_heads": 3, "norm_type": "layer_norm"},
    "6b": {"hidden_size": 20, "num_attention_heads": 5, "norm_type": "rms_norm"},
}
_LANGUAGE = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "use_cache": True,
}
_DYNAMIC = {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}
_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_scaling": _DYNAMIC,
    "rope_theta": 1e6,
    "use_sliding_window": False,
}
_QWEN3 = _QWEN2 | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 12,  # wider than hidden_size / heads, as in all but one released size
    "max_position_embeddings": 40960,
    "rope_scaling": None,
}
_INTERNLM2 = {
    "architectures": ["InternLM2ForCausalLM"],
    "model_type": "internlm2",
    "bias": False,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "rope_theta": 1e6,
}
# transformers has no InternLM2; Llama is the same network.
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "head_dim": 8,
    "mlp_bias": False,
    "rope_scaling": _DYNAMIC,
}
# name -> (tower, llm_config of the original layout, changes of transformers', top-level keys)
FAMILIES = {
    "internvl3": ("300m", _QWEN2, {}, {}),
    "internvl2_5_internlm2": ("6b", _INTERNLM2, _LLAMA, {}),
    "internvl3_5": ("300m", _QWEN3, {}, {}),
    "v2pe": ("300m", _QWEN2, {}, {"rope_pos_id_version": "v2pe_fix", "rope_pos_id_stride": 64}),
}


def original(name: str, vocabulary: int) -> dict:
    """Returns config.json of a family in the original layout."""
    tower, language, _, more = FAMILIES[name]
    vision = _VISION | _TOWERS[tower]
    return {
        "architectures": ["InternVLChatModel"],
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 16,
        "llm_config": _LANGUAGE | language | {"vocab_size": vocabulary, "torch_dtype": "float32"},
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": vision
        | {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "qk_normalization": tower == "6b",
            "qkv_bias": tower != "6b",
        },
        **more,
    }


def transformers(name: str, vocabulary: int, image_token_id: int) -> dict:
    """Returns config.json of a family in the layout of transformers, which has no V2PE."""
    tower, language, changes, _ = FAMILIES[name]
    text = _LANGUAGE | language | changes
    if text["model_type"] == "llama":
        del text["bias"]
    vision = _VISION | _TOWERS[tower] | {"image_size": [16, 16], "patch_size": [4, 4]}
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": 0.5,
        "image_seq_length": 4,
        "image_token_id": image_token_id,
        "model_type": "internvl",
        "projector_hidden_act": "gelu",
        "text_config": text | {"vocab_size": vocabulary, "torch_dtype": "float32"},
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vision_config": vision
        | {
            "architectures": ["InternVLVisionModel"],
            "attention_bias": tower != "6b",
            "attention_dropout": 0.0,
            "model_type": "internvl_vision",
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": True,
            "use_qk_norm": tower == "6b",
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }


def preprocessor(layout: str) -> dict:
    """Returns preprocessor_config.json of a layout."""
    values = {
        "do_normalize": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
    }
    if layout == "internvl":
        return values | {"crop_size": 16, "do_center_crop": True, "size": 16}
    return values | {
        "crop_to_patches": True,
        "do_rescale": True,
        "image_processor_type": "GotOcr2ImageProcessor",
        "max_patches": 12,
        "min_patches": 1,
        "rescale_factor": 1 / 255,
        "size": {"height": 16, "width": 16},
    }
