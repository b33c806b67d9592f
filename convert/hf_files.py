"""The files around the weights of an exported model, as the original code, transformers and servers
read them.
"""

import json

from internvl3_jax.checkpoints.hf.released import read_json
from internvl3_jax.config import UNITS, LanguageConfig, ModelConfig, ProcessorConfig
from internvl3_jax.data.text.chat_template import TEMPLATES
from internvl3_jax.data.text.tokenizer import Tokenizer
from internvl3_jax.data.text.tokenizer_files import named_token
from internvl3_jax.io.strict_json import Object

ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "internlm2": "InternLM2ForCausalLM",
    "internlm3": "InternLM3ForCausalLM",
}
# The names that transformers' InternVLProcessor asks its tokenizer for.
NAMED_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
}
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
)
# Replaced by its frames before anything is tokenised. Qwen2.5 has the first; the second is what -hf
# repositories use.
VIDEO_TOKENS = ("<|video_pad|>", "<video>")


def to_hf(
    model: ModelConfig,
    processor: ProcessorConfig,
    layout: str,
    dtype: str,
    token_ids: dict | None = None,
    auto_map: dict | None = None,
) -> dict:
    """config.json of a layout ("internvl" or "hf"); `hf_config.from_hf` reads it back.

    Args:
      dtype: of the weights, by name.
      token_ids: bos_token_id, eos_token_id and pad_token_id for the language model's part.
      auto_map: of the original layout, where the python files it points to travel along.

    Raises:
      ValueError: naming what the layout cannot express.
    """
    if layout == "hf":
        return _transformers(model, dtype, token_ids or {})
    return _original(model, processor, dtype, token_ids or {}, auto_map)


def _language(language: LanguageConfig, dtype: str, token_ids: dict) -> dict:
    values = {
        "architectures": [ARCHITECTURES[language.family]],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": language.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": language.intermediate_size,
        "max_position_embeddings": language.max_position,
        "model_type": language.family,
        "num_attention_heads": language.num_heads,
        "num_hidden_layers": language.num_layers,
        "num_key_value_heads": language.num_kv_heads,
        "rms_norm_eps": language.norm_eps,
        "rope_scaling": None,
        "rope_theta": language.rope_theta,
        "tie_word_embeddings": language.tie_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": language.vocab_size,
        **token_ids,
    }
    if language.rope_scaling == "dynamic":
        # "type" is what transformers before 4.43 reads.
        values["rope_scaling"] = {
            "factor": language.rope_factor,
            "rope_type": "dynamic",
            "type": "dynamic",
        }
    if language.family == "qwen2":
        if (language.qkv_bias, language.o_bias, language.mlp_bias) != (True, False, False):
            raise ValueError(
                "Qwen2 has biases in q, k and v and nowhere else; set language.qkv_bias, o_bias and mlp_bias so, or family"
            )
        values |= {
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": language.num_layers,
        }
    if (
        language.head_dim * language.num_heads != language.hidden_size
        or language.family == "internlm3"
    ):
        values["head_dim"] = language.head_dim
    return values


def _internlm2_bias(language: LanguageConfig) -> bool:
    """InternLM2's one flag, of wqkv and wo."""
    if language.head_dim * language.num_heads != language.hidden_size:
        raise ValueError(
            "InternLM2's heads are as wide together as the model; language.head_dim differs"
        )
    if language.qkv_bias != language.o_bias or language.mlp_bias:
        raise ValueError(
            "InternLM2 has one flag for the biases of q, k, v and o, and none in the MLP; set language.*_bias so"
        )
    return language.qkv_bias


def _transformers(model: ModelConfig, dtype: str, token_ids: dict) -> dict:
    vision, language = model.vision, model.language
    if model.ps_version != "v2":
        raise ValueError(
            f"transformers computes pixel shuffle v2 only; ps_version is {model.ps_version}. Export with --to internvl"
        )
    text = _language(language, dtype, token_ids)
    if language.family == "internlm2":  # not in transformers, which has the same network as Llama
        bias = _internlm2_bias(language)
        text |= {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": bias,
            "mlp_bias": False,
        }
    if language.family == "internlm3":
        if len({language.qkv_bias, language.o_bias, language.mlp_bias}) > 1:
            raise ValueError(
                "transformers' InternLM3 has biases everywhere or nowhere; export with --to internvl"
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
            "attention_bias": vision.qkv_bias,
            "attention_dropout": 0.0,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.0,
            "hidden_size": vision.hidden_size,
            "image_size": [vision.image_size, vision.image_size],
            "initializer_range": 0.02,
            "intermediate_size": vision.intermediate_size,
            "layer_norm_eps": vision.norm_eps,
            "layer_scale_init_value": vision.layer_scale_init,
            "model_type": "internvl_vision",
            "norm_type": vision.norm,
            "num_attention_heads": vision.num_heads,
            "num_channels": 3,
            "num_hidden_layers": vision.num_layers,
            "patch_size": [vision.patch_size, vision.patch_size],
            "projection_dropout": 0.0,
            "torch_dtype": dtype,
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": True,
            "use_qk_norm": vision.qk_norm,
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
    vision, language = model.vision, model.language
    if language.tie_embeddings:
        raise ValueError("the original code never ties the output head; it is exported untied")
    text = _language(language, dtype, token_ids)
    if language.family == "internlm2":
        text["bias"] = _internlm2_bias(language)
        if text["rope_scaling"]:  # its class wants these two fields and no others
            text["rope_scaling"] = {"type": "dynamic", "factor": language.rope_factor}
    if language.family == "internlm3":
        if language.o_bias != language.mlp_bias:
            raise ValueError(
                "InternLM3 has one flag for the biases of o_proj and of the MLP; language.o_bias and mlp_bias differ"
            )
        text |= {"qkv_bias": language.qkv_bias, "bias": language.mlp_bias}
    values = {
        "architectures": ["InternVLChatModel"],
        "downsample_ratio": 1 / model.downsample,
        "dynamic_image_size": True,
        "force_image_size": vision.image_size,
        "llm_config": text,
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
            "drop_path_rate": vision.drop_path,
            "dropout": 0.0,
            "hidden_act": "gelu",
            "hidden_size": vision.hidden_size,
            "image_size": vision.image_size,
            "initializer_factor": vision.layer_scale_init,
            "initializer_range": 0.02,
            "intermediate_size": vision.intermediate_size,
            "layer_norm_eps": vision.norm_eps,
            "model_type": "intern_vit_6b",
            "norm_type": vision.norm,
            "num_attention_heads": vision.num_heads,
            "num_channels": 3,
            "num_hidden_layers": vision.num_layers,
            "patch_size": vision.patch_size,
            "qk_normalization": vision.qk_norm,
            "qkv_bias": vision.qkv_bias,
            "torch_dtype": dtype,
            "use_flash_attn": True,
        },
    }
    if processor.system_message != "default":
        # The original class takes this wherever it exists; null would become the text "None".
        values["system_message"] = processor.system_message or ""
    if processor.delta != UNITS:
        values |= {"rope_pos_id_version": "v2pe_fix", "rope_pos_id_stride": processor.delta}
    return values | ({"auto_map": auto_map} if auto_map else {})


def export_files(
    model: ModelConfig,
    processor: ProcessorConfig,
    tokenizer: Tokenizer,
    layout: str,
    dtype: str,
    files: dict[str, bytes],
) -> dict[str, bytes]:
    """Everything beside weights and internvl3_jax.json, made from the `files` that travelled and
    from the configuration.
    """
    source = Object(read_json(files, "config.json") or {}, "config.json")
    settings = read_json(files, "tokenizer_config.json") or {}
    stop_ids = [tokenizer.token_id(token) for token in processor.stop_tokens]
    pad = named_token(settings, "pad_token", "tokenizer_config.json")
    pad_id = tokenizer.token_id(pad) if pad else stop_ids[0]
    token_ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": stop_ids[0],
        "pad_token_id": pad_id,
    }
    generation = read_json(files, "generation_config.json") or {}
    kept_pad = Object(generation, "generation_config.json").get(
        "pad_token_id", int, pad_id, low=0, high=1 << 24
    )
    generation |= {"eos_token_id": stop_ids, "pad_token_id": kept_pad}
    # Model code belongs to the original layout alone; a tokenizer's own code is needed wherever the
    # tokenizer goes.
    code = {
        name: content
        for name, content in files.items()
        if name.endswith(".py") and not name.startswith("tokenization_")
    }
    kept = {
        name: content
        for name, content in files.items()
        if name not in code and name not in PROCESSOR_FILES
    }
    if layout == "internvl":
        kept |= code
        config = to_hf(
            model,
            processor,
            layout,
            dtype,
            token_ids,
            source.get("auto_map", dict, None) if code else None,
        )
        pictures = {
            "feature_extractor_type": "CLIPFeatureExtractor",
            "crop_size": model.vision.image_size,
            "do_center_crop": True,
        }
        made = {
            "preprocessor_config.json": pictures
            | _pixels(model)
            | {"size": model.vision.image_size}
        }
    else:
        config = to_hf(model, processor, layout, dtype, token_ids)
        made = _transformers_processor(model, processor, tokenizer, settings)
        kept["chat_template.jinja"] = chat_template(
            processor, made["tokenizer_config.json"]["video_token"]
        ).encode()
    made |= {"config.json": config, "generation_config.json": generation}
    return kept | {
        name: json.dumps(values, indent=2, ensure_ascii=False).encode()
        for name, values in made.items()
    }


def has_token(tokenizer: Tokenizer, token: str) -> bool:
    try:
        tokenizer.require(token)
    except ValueError:
        return False
    return True


def _pixels(model: ModelConfig) -> dict:
    return {
        "do_normalize": True,
        "do_resize": True,
        "image_mean": list(model.vision.mean),
        "image_std": list(model.vision.std),
        "resample": 3,
    }


def _transformers_processor(
    model: ModelConfig, processor: ProcessorConfig, tokenizer: Tokenizer, settings: dict
) -> dict:
    """The files from which AutoProcessor builds an InternVLProcessor."""
    size = {"height": model.vision.image_size, "width": model.vision.image_size}
    pixels = _pixels(model) | {
        "size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_convert_rgb": True,
    }
    pictures = pixels | {
        "processor_class": "InternVLProcessor",
        "image_processor_type": "GotOcr2ImageProcessor",
        # Stored as false in released files: the image processor alone then makes one tile of any
        # picture.
        "crop_to_patches": True,
        "min_patches": processor.min_tiles,
        "max_patches": processor.max_tiles,
    }
    settings = {name: value for name, value in settings.items() if name != "chat_template"}
    video = next((token for token in VIDEO_TOKENS if has_token(tokenizer, token)), VIDEO_TOKENS[-1])
    settings |= NAMED_TOKENS | {
        "video_token": video,
        "processor_class": "InternVLProcessor",
        "padding_side": "left",
    }
    return {
        "preprocessor_config.json": pictures,
        "video_preprocessor_config.json": pixels
        | {"video_processor_type": "InternVLVideoProcessor"},
        "processor_config.json": {
            "processor_class": "InternVLProcessor",
            "image_seq_length": model.tokens_per_tile,
        },
        "tokenizer_config.json": settings,
    }


def chat_template(processor: ProcessorConfig, video_token: str) -> str:
    """The Jinja template: blocks as chat.py builds them, a picture or video in front of the text
    that follows it.
    """
    text = (
        TEMPLATES[processor.template]
        if processor.system_message == "default"
        else processor.system_message
    )
    system = ""
    if text is not None:
        block = json.dumps(f"<|im_start|>system\n{text}<|im_end|>\n", ensure_ascii=False)
        system = "{%- if messages[0]['role'] != 'system' %}{{ " + block + " }}{% endif %}\n"
    return (
        system
        + "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}\n"
        + "{%- if message['content'] is string %}{{ message['content'] }}\n"
        + "{%- else %}{% for part in message['content'] %}\n"
        + "{%- if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}\n"
        + "{%- elif part['type'] == 'video' %}{{ '"
        + video_token
        + "\\n' }}\n"
        + "{%- elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}\n"
        + "{%- endfor %}{% endif %}{{ '<|im_end|>\\n' }}\n"
        + "{%- endfor %}\n"
        + "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
