"""Writes the files of an exported model other than the weights."""

import json

from convert.config_json import to_hf
from internvl3_jax.checkpoints.hf.released import read_json
from internvl3_jax.config import ModelConfig, ProcessorConfig
from internvl3_jax.data.text.chat_template import TEMPLATES
from internvl3_jax.data.text.tokenizer import Tokenizer
from internvl3_jax.data.text.tokenizer_files import named_token
from internvl3_jax.io.strict_json import Object

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
# Replaced by frames before tokenization. Qwen2.5 has the first, -hf repositories use the second.
VIDEO_TOKENS = ("<|video_pad|>", "<video>")


def export_files(
    model: ModelConfig,
    processor: ProcessorConfig,
    tokenizer: Tokenizer,
    layout: str,
    dtype: str,
    files: dict[str, bytes],
) -> dict[str, bytes]:
    """Returns name -> content of an export's files, without weights and internvl3_jax.json.

    Args:
      model: the model.
      processor: image and prompt settings.
      tokenizer: the tokenizer.
      layout: "internvl" or "hf".
      dtype: name of the weights' dtype.
      files: name -> content of the source's files.
    """
    # 1) Token ids for config.json and generation_config.json
    settings = read_json(files, "tokenizer_config.json") or {}
    stop_ids = [tokenizer.token_id(token) for token in processor.stop_tokens]
    pad = named_token(settings, "pad_token", "tokenizer_config.json")
    token_ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": stop_ids[0],
        "pad_token_id": tokenizer.token_id(pad) if pad else stop_ids[0],
    }
    # 2) Files that are copied. Model code belongs only to the original layout; a tokenizer's code
    # goes with the tokenizer.
    code = {
        name: content
        for name, content in files.items()
        if name.endswith(".py") and not name.startswith("tokenization_")
    }
    copied = {
        name: content
        for name, content in files.items()
        if name not in code and name not in PROCESSOR_FILES
    }
    # 3) Files that are made for the layout
    if layout == "internvl":
        copied |= code
        source = Object(read_json(files, "config.json") or {}, "config.json")
        auto_map = source.get("auto_map", dict, None) if code else None
        config = to_hf(model, processor, layout, dtype, token_ids, auto_map)
        made = {"preprocessor_config.json": _original_processor(model)}
    else:
        config = to_hf(model, processor, layout, dtype, token_ids)
        made = _transformers_processor(model, processor, tokenizer, settings)
        video_token = made["tokenizer_config.json"]["video_token"]
        copied["chat_template.jinja"] = chat_template(processor, video_token).encode()
    generation = _generation_config(files, stop_ids, token_ids["pad_token_id"])
    made |= {"config.json": config, "generation_config.json": generation}
    return copied | {
        name: json.dumps(values, indent=2, ensure_ascii=False).encode()
        for name, values in made.items()
    }


def _generation_config(files: dict[str, bytes], stop_ids: list[int], pad_id: int) -> dict:
    values = read_json(files, "generation_config.json") or {}
    pad_id = Object(values, "generation_config.json").get(
        "pad_token_id", int, pad_id, low=0, high=1 << 24
    )
    return values | {"eos_token_id": stop_ids, "pad_token_id": pad_id}


def has_token(tokenizer: Tokenizer, token: str) -> bool:
    """Returns whether the tokenizer has a token."""
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


def _original_processor(model: ModelConfig) -> dict:
    return {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "crop_size": model.vision.image_size,
        "do_center_crop": True,
        **_pixels(model),
        "size": model.vision.image_size,
    }


def _transformers_processor(
    model: ModelConfig, processor: ProcessorConfig, tokenizer: Tokenizer, settings: dict
) -> dict:
    """Returns the files from which AutoProcessor builds an InternVLProcessor."""
    size = {"height": model.vision.image_size, "width": model.vision.image_size}
    pixels = _pixels(model) | {
        "size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_convert_rgb": True,
    }
    image_settings = pixels | {
        "processor_class": "InternVLProcessor",
        "image_processor_type": "GotOcr2ImageProcessor",
        # Released files have false, with which the image processor alone makes one tile per image.
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
        "preprocessor_config.json": image_settings,
        "video_preprocessor_config.json": pixels
        | {"video_processor_type": "InternVLVideoProcessor"},
        "processor_config.json": {
            "processor_class": "InternVLProcessor",
            "image_seq_length": model.tokens_per_tile,
        },
        "tokenizer_config.json": settings,
    }


def chat_template(processor: ProcessorConfig, video_token: str) -> str:
    """Returns the Jinja template, with the blocks of chat_template.py."""
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
