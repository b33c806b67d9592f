"""config.json of the two released layouts, read into our dataclasses and written back.

"internvl" is the original layout (`internvl_chat`, with `llm_config` and a `vision_config` of type `intern_vit_6b` for both towers);
"hf" is the one built into transformers (`internvl`, with `text_config` and `internvl_vision`). Reading is strict: every field is either
used, known to change nothing, or an error that names it, and a field the computation depends on is never filled from a class
default where those defaults differ between releases (layers of the tower, rope base, tying).
"""

from internvl3_jax.config import UNITS, LanguageConfig, ModelConfig, ProcessorConfig, VisionConfig
from internvl3_jax.hf_fields import LANGUAGE_IGNORED, TOP_IGNORED, VISION_IGNORED, Fields

LAYOUTS = ("internvl", "hf")

# Of the original layout, about pictures, prompts and V2PE positions: read by `processor_from_hf`.
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


def layout_of(config: dict) -> str:
    """ "internvl" or "hf", by `model_type`."""
    kinds = {"internvl_chat": "internvl", "internvl": "hf"}
    model_type = config.get("model_type")
    if model_type not in kinds:
        raise ValueError(
            f"config.json: model_type is {model_type!r}; expected 'internvl_chat' (original layout) or 'internvl' (transformers)"
        )
    return kinds[model_type]


def from_hf(
    config: dict, *, image_token_id: int | None = None, has_head: bool | None = None, preprocessor_config: dict | None = None
) -> ModelConfig:
    """Reads config.json of either released layout.

    Args:
      config: the parsed file.
      image_token_id: id of <IMG_CONTEXT> in the checkpoint's tokenizer. The original layout does not store it; where the file
        has it too, the two must agree.
      has_head: whether the weights hold an output head, None if unknown. Decides tying where the file says nothing.
      preprocessor_config: the parsed preprocessor_config.json, for the mean and deviation of pixels; ImageNet's without it.

    Raises:
      ValueError: naming the field that is unknown, missing, contradictory or not supported.
    """
    layout = layout_of(config)
    top = Fields(config, "config")
    top.get("model_type")
    stated = top.get("image_token_id", None) if layout == "hf" else None
    if None not in (stated, image_token_id) and stated != image_token_id:
        raise ValueError(
            f"config.json: config.image_token_id is {stated}, but the tokenizer has <IMG_CONTEXT> at {image_token_id}"
        )
    image_token_id = stated if image_token_id is None else image_token_id
    if image_token_id is None:
        raise ValueError(
            "config.json does not hold the id of <IMG_CONTEXT>; pass image_token_id (from the checkpoint's tokenizer)"
        )

    vision = read_vision(top.get("vision_config"), layout)
    for name in ("mean", "std"):
        setattr(vision, name, tuple((preprocessor_config or {}).get(f"image_{name}") or getattr(vision, name)))
    text = top.get("llm_config" if layout == "internvl" else "text_config")
    tied = _tied(top, text, layout, has_head)
    language = read_language(text, "config.llm_config" if layout == "internvl" else "config.text_config", tied=tied)
    ratio = top.get("downsample_ratio", 0.5)
    downsample = round(1 / ratio)
    if downsample * ratio != 1:
        raise ValueError(f"config.json: config.downsample_ratio = {ratio!r} is not 1 over a whole number")
    if layout == "internvl":
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
        ps_version=top.get("ps_version", "v1") if layout == "internvl" else "v2",
    )
    if layout == "hf":
        top.expect("image_seq_length", model.tokens_per_tile)
    top.finish(TOP_IGNORED)
    return model


def _original_fields(top: Fields, vision: VisionConfig) -> None:
    """The original layout's own fields: those that pick another computation are refused, the processor's are read elsewhere."""
    top.expect("select_layer", -1)
    top.expect("pad2square", False)
    top.expect("use_backbone_lora", 0)
    top.expect("use_llm_lora", 0)
    # Where the two sizes differ the original code resizes the position table; the released checkpoints are saved after that.
    top.expect("force_image_size", vision.image_size)
    top.asked |= PROCESSOR_FIELDS


def _tied(top: Fields, text, layout: str, has_head: bool | None) -> bool:
    """Whether the output head is the embedding.

    The original code forces an untied head whatever its fields say, so there only a file without a head can be tied.
    transformers 5 ties when the key is absent, while released files without the key hold a head of their own: then the weights
    decide.
    """
    stated = top.get("tie_word_embeddings", None)
    inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    if layout == "internvl":
        return has_head is False and bool(stated or inner)
    if stated is not None:
        return stated
    if has_head is not None:
        return not has_head
    if inner is not None:
        return inner
    raise ValueError(
        "config.json: config.tie_word_embeddings is absent, and readers differ about what that means; pass has_head"
    )


def read_vision(values: dict, layout: str, where: str = "config.vision_config") -> VisionConfig:
    """InternViT's configuration in either layout; both towers call themselves intern_vit_6b in the original one."""
    fields = Fields(values, where)
    fields.expect("model_type", "intern_vit_6b" if layout == "internvl" else "internvl_vision")
    fields.expect("hidden_act", "gelu")
    fields.expect("num_channels", 3)
    fields.expect("norm_type", "layer_norm", "rms_norm")
    fields.expect("use_moe", False)
    if layout == "internvl":
        qkv_bias, qk_norm = fields.get("qkv_bias"), fields.get("qk_normalization")
    else:
        qkv_bias, qk_norm = (fields.get("attention_bias"), fields.get("use_qk_norm", False))
        fields.expect("use_mask_token", False)
        fields.expect("use_absolute_position_embeddings", True)
        fields.expect("use_mean_pooling", True)  # otherwise a last LayerNorm follows the tower
    vision = VisionConfig(
        image_size=_square(fields, "image_size"),
        patch_size=_square(fields, "patch_size"),
        hidden_size=fields.get("hidden_size"),
        num_layers=fields.get("num_hidden_layers"),
        num_heads=fields.get("num_attention_heads"),
        intermediate_size=fields.get("intermediate_size"),
        norm=fields.get("norm_type"),
        norm_eps=fields.get("layer_norm_eps", 1e-6),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        layer_scale_init=fields.get("initializer_factor" if layout == "internvl" else "layer_scale_init_value", 0.1),
        drop_path=fields.get("drop_path_rate", 0.0),
    )
    if qk_norm and vision.norm_eps != 1e-6:
        raise ValueError(
            f"config.json: {where}.layer_norm_eps = {vision.norm_eps}; with q/k norm only 1e-6 means the same in both layouts"
        )
    fields.finish(VISION_IGNORED)
    return vision


def _square(fields: Fields, name: str) -> int:
    value = fields.get(name)
    if isinstance(value, (list, tuple)):
        if len(set(value)) != 1:
            raise ValueError(f"config.json: {fields.where}.{name} = {value} is not square")
        value = value[0]
    return value


def read_language(values: dict, where: str, *, tied: bool) -> LanguageConfig:
    """A Qwen2, InternLM2 or InternLM3 configuration (transformers reads InternLM3 as Llama, and converted 9B checkpoints say so)."""
    fields = Fields(values, where)
    fields.expect("model_type", "qwen2", "internlm2", "internlm3", "llama", default="absent")
    family = "internlm3" if values["model_type"] == "llama" else values["model_type"]
    fields.expect("hidden_act", "silu")
    fields.expect("use_sliding_window", False)
    fields.expect("pretraining_tp", 1)
    fields.expect("use_mrope", False)
    if any(kind != "full_attention" for kind in fields.get("layer_types", [])):
        raise ValueError(f"config.json: {where}.layer_types names other than full_attention")
    if fields.get("moe_config", None):
        raise ValueError(f"config.json: {where}.moe_config is set; mixture of experts is not supported")
    if family == "qwen2":
        qkv_bias, o_bias, mlp_bias = True, False, False
    elif family == "internlm2":
        # Its class takes true for a missing "bias", its released models say false.
        qkv_bias = o_bias = fields.get("bias")
        mlp_bias = False
    else:
        qkv_bias = fields.same(("attention_bias", "qkv_bias"), default=False)
        mlp_bias = fields.same(("mlp_bias", "bias"), default=False)
        # The original InternLM3 gives o_proj the bias of the MLP, Llama the bias of q, k and v.
        o_bias = mlp_bias if "bias" in values else qkv_bias
    heads, hidden = fields.get("num_attention_heads"), fields.get("hidden_size")
    max_position = fields.get("max_position_embeddings")
    theta, scaling, factor = _rope(fields, max_position)
    fields.get("tie_word_embeddings", None)
    language = LanguageConfig(
        vocab_size=fields.get("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.get("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.get("num_key_value_heads"),
        head_dim=fields.get("head_dim", hidden // heads),
        intermediate_size=fields.get("intermediate_size"),
        norm_eps=fields.get("rms_norm_eps", 1e-6) if family == "qwen2" else fields.get("rms_norm_eps"),
        rope_theta=float(theta),
        rope_scaling=scaling,
        rope_factor=float(factor),
        max_position=max_position,
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        tie_embeddings=tied,
        family=family,
    )
    fields.finish(LANGUAGE_IGNORED)
    return language


def _rope(fields: Fields, max_position: int) -> tuple[float, str, float]:
    """(theta, scaling, factor) from rope_theta and rope_scaling (transformers 4) or rope_parameters (transformers 5)."""
    blocks = [Fields(fields.get(name, {}), f"{fields.where}.{name}") for name in ("rope_parameters", "rope_scaling")]
    thetas, kinds = {fields.get("rope_theta", None)}, set()
    for block in blocks:
        thetas.add(block.get("rope_theta", None))
        kind = block.same(("rope_type", "type"), default="default")
        if kind not in ("default", "dynamic"):
            raise ValueError(f"config.json: {block.where} asks for {kind!r} rope; default and dynamic are supported")
        if kind == "dynamic":
            kinds.add((kind, block.get("factor")))
            block.expect("original_max_position_embeddings", max_position)
        elif block.values:
            kinds.add(("none", block.get("factor", 1.0)))
        block.expect("partial_rotary_factor", 1.0)
        block.finish(frozenset())
    thetas.discard(None)
    if len(thetas) != 1 or len(kinds) > 1:
        what = f"give {sorted(thetas)} with {sorted(kinds)}" if thetas else "give no base"
        raise ValueError(
            f"config.json: {fields.where}: rope_theta, rope_scaling and rope_parameters together {what}; one is needed"
        )
    scaling, factor = kinds.pop() if kinds else ("none", 1.0)
    return thetas.pop(), scaling, factor


def processor_from_hf(config: dict, preprocessor_config: dict | None = None) -> ProcessorConfig:
    """How the released system prepares pictures and prompts, from config.json (original layout) or preprocessor_config.json
    (hf).

    `system_message: null` means the template's text: that is what the models were trained with. The transformers layout knows
    neither template nor system text; both are the defaults there, as in the original files of the same weights.
    """
    layout = layout_of(config)
    pictures = preprocessor_config or {}
    fields = Fields(config, "config")
    vision = read_vision(config.get("vision_config"), layout)
    processor = ProcessorConfig(
        image_size=vision.image_size, tokens_per_tile=round(vision.grid * fields.get("downsample_ratio", 0.5)) ** 2
    )
    if layout == "hf":
        processor.min_tiles, processor.max_tiles = (pictures.get("min_patches", 1), pictures.get("max_patches", 12))
        size = pictures.get("size", {})
        if any(side != vision.image_size for side in size.values()):
            raise ValueError(f"preprocessor_config.json: size is {size}, but vision_config.image_size is {vision.image_size}")
        return processor
    processor.template = fields.get("template")
    processor.system_message = fields.get("system_message", "default")
    processor.use_thumbnail = fields.get("use_thumbnail", False)
    if fields.get("dynamic_image_size", True):
        processor.min_tiles, processor.max_tiles = (fields.get("min_dynamic_patch", 1), fields.get("max_dynamic_patch", 12))
    else:
        processor.min_tiles = processor.max_tiles = 1
    # Written by V2PE training code: a fixed step in units of 1/256, or "v2pe_rnd" for training with drawn ones.
    fields.expect("rope_pos_id_version", "default", "v2pe_fix", "v2pe_rnd")
    if fields.get("rope_pos_id_version", "default") == "v2pe_fix":
        processor.delta = fields.get("rope_pos_id_stride")
        if processor.delta not in range(1, UNITS + 1):
            raise ValueError(
                f"config.json: config.rope_pos_id_stride = {processor.delta!r} is not a whole number in 1..{UNITS}"
            )
    return processor
