"""Reads config.json of the two released layouts; convert/config_json.py writes it.

"internvl" is the original layout (`internvl_chat`, with `llm_config` and a `vision_config` of type
`intern_vit_6b` for both towers); "hf" is that of transformers (`internvl`, with `text_config` and
`internvl_vision`). Reading is strict: every key is used, known to change nothing, or an error. A
key that changes the computation gets no class default where those differ between releases (layers
of the tower, rope base, tying).
"""

import difflib

from internvl3_jax.checkpoints.hf.fields import TOP_IGNORED, VISION_IGNORED, Fields
from internvl3_jax.checkpoints.hf.keys import VISION, VOCABULARY, bounds, read_keys
from internvl3_jax.checkpoints.hf.language import read_language
from internvl3_jax.config import UNITS, ModelConfig, ProcessorConfig, VisionConfig
from internvl3_jax.io import limits
from internvl3_jax.io.strict_json import JsonError, Object, check
from internvl3_jax.io.terminal import excerpt

_SIDE = {"low": 1, "high": 1 << 14}  # pixels
_TILES = {"low": 1, "high": 1024}
_MERGE = "; merge the adapter first (tools/merge_lora.py in the InternVL repository)"

LAYOUTS = ("internvl", "hf")

# Keys of the original layout about images, prompts and V2PE positions; see `processor_from_hf`.
PROCESSOR_FIELDS = frozenset(
    (
        "template",
        "system_message",
        "dynamic_image_size",
        "use_thumbnail",
        "min_dynamic_patch",
        "max_dynamic_patch",
        "rope_pos_id_version",
        "rope_pos_id_stride",
    )
)


def layout_of(config: dict, place: str = "") -> str:
    """Returns "internvl" or "hf" by `model_type`.

    Args:
      config: the parsed file.
      place: the directory that errors name before the file, with its slash.
    """
    kinds = {"internvl_chat": "internvl", "internvl": "hf"}
    model_type = Object(config, f"{place}config.json").get("model_type", str, None)
    if model_type not in kinds:
        raise JsonError(
            f"{place}config.json: model_type is {excerpt(model_type)}; expected 'internvl_chat' "
            "(original layout) or 'internvl' (transformers)"
        )
    return kinds[model_type]


def from_hf(
    config: dict,
    *,
    image_token_id: int | None = None,
    has_head: bool | None = None,
    preprocessor_config: dict | None = None,
    place: str = "",
) -> ModelConfig:
    """Reads config.json of either released layout.

    Args:
      config: the parsed file.
      image_token_id: id of <IMG_CONTEXT> in the checkpoint's tokenizer. The original layout does
        not store it; if the file has it, the two must agree.
      has_head: whether the weights have an output head, None if unknown. It decides tying if the
        file does not.
      preprocessor_config: the parsed preprocessor_config.json, for the mean and standard deviation
        of pixels; ImageNet's by default.
      place: the directory that errors name before the file, with its slash.

    Raises:
      ValueError: a key is unknown, missing, of a wrong type or size, contradictory or not
        supported; the message names it.
    """
    layout = layout_of(config, place)
    where = f"{place}config.json: config"
    top = Fields(config, where)
    top.get("model_type", str)
    stated = (
        top.get("image_token_id", int, None, low=0, high=VOCABULARY["high"])
        if layout == "hf"
        else None
    )
    if None not in (stated, image_token_id) and stated != image_token_id:
        top.refuse("image_token_id", f"the tokenizer has <IMG_CONTEXT> at {image_token_id}")
    image_token_id = stated if image_token_id is None else image_token_id
    if image_token_id is None:
        raise ValueError(
            "config.json does not hold the id of <IMG_CONTEXT>; pass image_token_id (from the "
            "checkpoint's tokenizer)"
        )

    vision = read_vision(top.get("vision_config", dict), layout, f"{where}.vision_config")
    vision.mean, vision.std = _pixels(preprocessor_config, vision, place)
    name = "llm_config" if layout == "internvl" else "text_config"
    text = top.get(name, dict)
    language = read_language(
        text, f"{where}.{name}", tied=_tied(top, Fields(text, f"{where}.{name}"), layout, has_head)
    )
    downsample = _downsample(top)
    flash = {}
    if layout == "internvl":
        flash = _flash(top)
        _original_fields(top, vision)
    else:
        top.expect("projector_hidden_act", "gelu")
        top.expect("vision_feature_layer", -1)
        top.expect("vision_feature_select_strategy", "default")
    model = ModelConfig(
        vision=vision,
        language=language,
        image_token_id=image_token_id,
        downsample=downsample,
        ps_version=top.get("ps_version", str, "v1", choices=("v1", "v2"))
        if layout == "internvl"
        else "v2",
        **flash,
    )
    if layout == "hf":
        top.expect("image_seq_length", model.tokens_per_tile)
    top.finish(TOP_IGNORED)
    return model


def _flash(top: Fields) -> dict:
    """Returns our fields of a Flash model; without `flash_mode` nothing may speak of one."""
    thresholds = {
        name: top.get(f"{name}_threshold", float, None, low=0, high=1)
        for name in ("flash_relative", "flash_absolute")
    }
    if not top.get("flash_mode", bool, False):
        for name, value in thresholds.items():
            if value is not None:
                top.refuse(f"{name}_threshold", "it is of Flash models, and flash_mode is not true")
        return {}
    for name, value in thresholds.items():
        if value is None:
            top.refuse(f"{name}_threshold", "a Flash model (flash_mode) needs a number from 0 to 1")
    return {"flash": True} | {name: float(value) for name, value in thresholds.items()}


def _downsample(top: Fields) -> int:
    ratio = top.get("downsample_ratio", float, 0.5, low=1 / 64, high=1)
    downsample = round(1 / ratio)
    if downsample * ratio != 1:
        top.refuse("downsample_ratio", "it must be 1 over a whole number")
    return downsample


def _pixels(
    values: dict | None, vision: VisionConfig, place: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns (mean, standard deviation) of pixels; refuses unsupported preprocessing."""
    image_config = Fields({} if values is None else values, f"{place}preprocessor_config.json")
    mean = image_config.list_of(
        "image_mean", float, list(vision.mean), length=3, **bounds(limits.MEAN)
    )
    std = image_config.list_of("image_std", float, list(vision.std), length=3, **bounds(limits.STD))
    image_config.expect("do_normalize", True)
    image_config.expect("do_rescale", True)
    image_config.expect("resample", 3, "bicubic")
    scale = image_config.get("rescale_factor", float, 1 / 255)
    if abs(255 * scale - 1) > 1e-3:
        image_config.refuse("rescale_factor", "this implementation divides by 255")
    _refuse_misspelled(image_config)
    return tuple(map(float, mean)), tuple(map(float, std))


def _refuse_misspelled(image_config: Fields) -> None:
    """Refuses a misspelled setting of the image processor; other unknown ones are ignored."""
    used = (
        "image_mean",
        "image_std",
        "do_normalize",
        "do_rescale",
        "resample",
        "rescale_factor",
        "size",
        "min_patches",
        "max_patches",
    )
    for name in image_config.values:
        near = difflib.get_close_matches(name, used, n=1, cutoff=0.85)
        if near and name not in used and near[0] not in image_config.values:
            image_config.refuse(name, f"there is no such setting; did you mean {near[0]!r}?")


def _original_fields(top: Fields, vision: VisionConfig) -> None:
    """Checks the keys that only the original layout has; the processor's are read elsewhere."""
    top.expect("select_layer", -1)
    top.expect("pad2square", False)
    top.expect("use_backbone_lora", 0, remedy=_MERGE)
    top.expect("use_llm_lora", 0, remedy=_MERGE)
    # If the two sizes differ, the original code resizes the position table; the released
    # checkpoints were saved after that.
    top.expect("force_image_size", vision.image_size)
    top.asked |= PROCESSOR_FIELDS


def _tied(top: Fields, text: Fields, layout: str, has_head: bool | None) -> bool:
    """Returns whether the output head is the embedding.

    The original code always has an untied head, so only weights without a head can be tied there.
    transformers 5 ties if the key is absent, but released files without the key have a head: then
    the weights decide.
    """
    stated, inner = (fields.get("tie_word_embeddings", bool, None) for fields in (top, text))
    if layout == "internvl":
        return has_head is False and bool(stated or inner)
    if stated is not None:
        return stated
    if has_head is not None:
        return not has_head
    if inner is not None:
        return inner
    raise ValueError(
        "config.json: config.tie_word_embeddings is absent, and readers differ about what that "
        "means; pass has_head"
    )


def read_vision(
    values: dict, layout: str, where: str = "config.json: config.vision_config"
) -> VisionConfig:
    """Reads InternViT's configuration; the original layout calls both towers intern_vit_6b."""
    fields = Fields(values, where)
    fields.expect("model_type", "intern_vit_6b" if layout == "internvl" else "internvl_vision")
    fields.expect("hidden_act", "gelu")
    fields.expect("num_channels", 3)
    fields.expect("use_moe", False)
    if layout == "hf":
        fields.expect("use_mask_token", False)
        fields.expect("use_absolute_position_embeddings", True)
        fields.expect("use_mean_pooling", True)  # otherwise a last LayerNorm follows the tower
    vision = VisionConfig(
        image_size=_square(fields, "image_size"),
        patch_size=_square(fields, "patch_size"),
        **read_keys(fields, VISION[layout]),
    )
    if vision.qk_norm and vision.norm_eps != 1e-6:
        fields.refuse("layer_norm_eps", "with q/k norm only 1e-6 means the same in both layouts")
    if vision.hidden_size % vision.num_heads:
        fields.refuse("num_attention_heads", f"it does not divide hidden_size {vision.hidden_size}")
    if vision.image_size % vision.patch_size:
        fields.refuse("image_size", f"it is not a multiple of patch_size {vision.patch_size}")
    fields.finish(VISION_IGNORED)
    return vision


def _square(fields: Fields, name: str) -> int:
    value = fields.get(name, (int, list))
    if isinstance(value, list):
        if fields.list_of(name, int, length=2, **_SIDE)[0] != value[1]:
            fields.refuse(name, "it is not square")
        return value[0]
    return fields.get(name, int, **_SIDE)


def processor_from_hf(
    config: dict, preprocessor_config: dict | None = None, place: str = ""
) -> ProcessorConfig:
    """Reads how the released model prepares images and prompts.

    The original layout has it in config.json, transformers in preprocessor_config.json.
    `system_message: null` means the template's text, with which the models were trained. The
    transformers layout has neither template nor system text; both are the defaults, as in the
    original files of the same weights.
    """
    layout = layout_of(config, place)
    fields = Fields(config, f"{place}config.json: config")
    vision = read_vision(fields.get("vision_config", dict), layout, f"{fields.where}.vision_config")
    processor = ProcessorConfig(
        image_size=vision.image_size, tokens_per_tile=(vision.grid // _downsample(fields)) ** 2
    )
    if layout == "hf":
        image_config = Fields(
            {} if preprocessor_config is None else preprocessor_config,
            f"{place}preprocessor_config.json",
        )
        processor.min_tiles, processor.max_tiles = _tiles(
            image_config, "min_patches", "max_patches"
        )
        _check_size(image_config, vision.image_size)
        return processor
    processor.template = fields.get("template", str, low=1, high=100)
    processor.system_message = fields.get("system_message", str, "default", high=1 << 20)
    processor.use_thumbnail = fields.get("use_thumbnail", bool, False)
    processor.min_tiles, processor.max_tiles = _tiles(
        fields, "min_dynamic_patch", "max_dynamic_patch"
    )
    if not fields.get("dynamic_image_size", bool, True):
        processor.min_tiles = processor.max_tiles = 1
    # Written by V2PE training code: a fixed step in units of 1/256, or "v2pe_rnd" for random ones.
    fields.expect("rope_pos_id_version", "default", "v2pe_fix", "v2pe_rnd")
    if fields.get("rope_pos_id_version", str, "default") == "v2pe_fix":
        processor.delta = fields.get("rope_pos_id_stride", int, low=1, high=UNITS)
    return processor


def _tiles(fields: Fields, least: str, most: str) -> tuple[int, int]:
    low, high = fields.get(least, int, 1, **_TILES), fields.get(most, int, 12, **_TILES)
    if low > high:
        fields.refuse(least, f"{most} is only {high}")
    return low, high


def _check_size(image_config: Fields, image_size: int) -> None:
    """Checks `size`: a number in the original layout, an object of sides in transformers."""
    size = image_config.get("size", (int, dict), {})
    for side, value in (size if isinstance(size, dict) else {"": size}).items():
        check(value, int, f"{image_config.where}: size: {excerpt(side)}")
        if value != image_size:
            image_config.refuse("size", f"vision_config.image_size is {image_size}")
