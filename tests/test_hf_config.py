"""Both released config.json layouts, and every trap in them."""

import dataclasses

import pytest

from convert.config_json import to_hf
from internvl3_jax.checkpoints.hf.config import from_hf, processor_from_hf
from internvl3_jax.config import ModelConfig, ProcessorConfig
from internvl3_jax.sizes import SIZES
from tests.support.released_configs import EXPERTS, HF, INTERNLM3, ORIGINAL, QWEN3, changed

pytestmark = pytest.mark.smoke


def with_drop_path(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, vision=dataclasses.replace(model.vision, drop_path=0.1))


def test_released_original_config_is_the_1b_model():
    assert from_hf(ORIGINAL, image_token_id=151667) == with_drop_path(SIZES["1b"])


def test_released_hf_config_is_the_1b_model():
    assert from_hf(HF, has_head=True) == SIZES["1b"]


def test_internlm3_config_is_the_9b_model():
    config = changed(ORIGINAL, "llm_config", INTERNLM3)
    assert from_hf(config, image_token_id=128133) == with_drop_path(SIZES["9b"])


@pytest.mark.parametrize("theta", [1_000_000, 5_000_000])
def test_qwen3_config_is_the_3_5_8b_model(theta):
    """The original layout, and transformers' with the id of the image token in the file.

    Both say that the base's head is tied, where the weights of the released model have one.
    """
    text = changed(QWEN3, "rope_theta", theta)
    expected = dataclasses.replace(
        SIZES["3.5-8b"],
        language=dataclasses.replace(SIZES["3.5-8b"].language, rope_theta=float(theta)),
    )
    original = changed(ORIGINAL, "llm_config", text)
    assert from_hf(original, image_token_id=151671, has_head=True) == with_drop_path(expected)
    transformers = changed(changed(HF, "text_config", text), "image_token_id", 151671)
    assert from_hf(transformers, has_head=True) == expected


@pytest.mark.parametrize("normalize", [True, False])
def test_qwen3_moe_config_is_the_3_5_30b_model(normalize):
    """The number of experts has another name since transformers 5."""
    text = changed(EXPERTS, "norm_topk_prob", normalize)
    language = dataclasses.replace(SIZES["3.5-30b-a3b"].language, normalize_experts=normalize)
    expected = dataclasses.replace(SIZES["3.5-30b-a3b"], language=language)
    original = changed(ORIGINAL, "llm_config", text)
    assert from_hf(original, image_token_id=151671, has_head=True) == with_drop_path(expected)
    text = changed(changed(text, "num_experts", changed), "num_local_experts", 128)
    transformers = changed(changed(HF, "text_config", text), "image_token_id", 151671)
    assert from_hf(transformers, has_head=True) == expected


def test_the_image_token_of_qwen3_is_the_tokenizers():
    """151667, transformers' default, is <think> there."""
    config = changed(HF, "text_config", QWEN3)
    with pytest.raises(
        ValueError, match="image_token_id is 151667; the tokenizer has <IMG_CONTEXT> at 151671"
    ):
        from_hf(config, image_token_id=151671, has_head=True)
    absent = changed(config, "image_token_id", changed)
    assert from_hf(absent, image_token_id=151671, has_head=True).image_token_id == 151671
    with pytest.raises(ValueError, match="does not hold the id of <IMG_CONTEXT>"):
        from_hf(absent, has_head=True)


@pytest.mark.parametrize("layout", ["internvl", "hf"])
@pytest.mark.parametrize("size", list(SIZES))
def test_what_is_written_reads_the_same(size, layout):
    model = SIZES[size]
    processor = ProcessorConfig(model.vision.image_size, model.tokens_per_tile)
    written = to_hf(model, processor, layout, "bfloat16")
    preprocessor = {"image_mean": list(model.vision.mean), "image_std": list(model.vision.std)}
    found = from_hf(written, image_token_id=model.image_token_id, preprocessor_config=preprocessor)
    if layout == "hf" and model.language.family == "internlm2":
        assert found.language.family == "internlm3"  # transformers has both as "llama"
        found.language.family = "internlm2"
    assert found == model
    assert processor_from_hf(written) == processor


def test_rope_parameters_of_transformers_5():
    text = changed(changed(HF["text_config"], "rope_theta", changed), "rope_scaling", changed)
    text["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000000.0}
    assert from_hf(changed(HF, "text_config", text), has_head=True) == SIZES["1b"]
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    language = from_hf(changed(HF, "text_config", text), has_head=True).language
    assert (language.rope_theta, language.rope_scaling, language.rope_factor) == (5e5, "none", 1.0)


@pytest.mark.parametrize(("stated", "inner", "has_head", "tied"), [
    (True, None, None, True), (False, True, None, False), (None, None, True, False), (None, None, False, True),
    (None, True, None, True), (None, False, None, False), (None, True, True, False),
])  # fmt: skip
def test_tying_in_the_hf_layout(stated, inner, has_head, tied):
    config = changed(
        changed(HF, "tie_word_embeddings", stated), "text_config.tie_word_embeddings", inner
    )
    assert from_hf(config, has_head=has_head).language.tie_embeddings is tied


def test_absent_tying_is_not_guessed():
    with pytest.raises(ValueError, match="tie_word_embeddings is absent"):
        from_hf(HF)


def test_the_original_layout_never_ties_a_model_with_a_head():
    config = changed(ORIGINAL, "llm_config.tie_word_embeddings", True)
    assert not from_hf(config, image_token_id=1, has_head=True).language.tie_embeddings
    assert not from_hf(config, image_token_id=1).language.tie_embeddings
    assert from_hf(config, image_token_id=1, has_head=False).language.tie_embeddings


ORIGINAL_QWEN3 = changed(ORIGINAL, "llm_config", QWEN3)
ORIGINAL_FLASH = ORIGINAL_QWEN3 | {
    "flash_mode": True,
    "flash_relative_threshold": 0.1,
    "flash_absolute_threshold": 0.5,
}
ORIGINAL_EXPERTS = changed(ORIGINAL, "llm_config", EXPERTS)
REFUSED = [
    (ORIGINAL_QWEN3, "llm_config.head_dim", changed),
    (ORIGINAL_QWEN3, "llm_config.head_dim", "128"),
    (ORIGINAL_QWEN3, "llm_config.attention_bias", "no"),
    (ORIGINAL_QWEN3, "llm_config.bias", True),
    (ORIGINAL_QWEN3, "llm_config.rope_theta", changed),
    (ORIGINAL_QWEN3, "llm_config.model_type", "gpt_oss"),
    (ORIGINAL_QWEN3, "llm_config.decoder_sparse_step", 1),
    (ORIGINAL_EXPERTS, "llm_config.num_experts", changed),
    (ORIGINAL_EXPERTS, "llm_config.mlp_only_layers", [0]),
    (ORIGINAL_EXPERTS, "llm_config.decoder_sparse_step", 2),
    (ORIGINAL_EXPERTS, "llm_config.num_local_experts", 64),
    (ORIGINAL_EXPERTS, "llm_config.num_experts_per_tok", 129),
    (ORIGINAL_EXPERTS, "llm_config.norm_topk_prob", changed),
    (ORIGINAL_EXPERTS, "llm_config.moe_intermediate_size", 0),
    (ORIGINAL_EXPERTS, "llm_config.head_dim", changed),
    (ORIGINAL_QWEN3, "llm_config.mlp_only_layers", []),
    (ORIGINAL_QWEN3, "flash_relative_threshold", 0.5),
    (ORIGINAL_FLASH, "flash_relative_threshold", changed),
    (ORIGINAL_FLASH, "flash_absolute_threshold", changed),
    (ORIGINAL_FLASH, "flash_absolute_threshold", 1.5),
    (ORIGINAL_FLASH, "flash_absolute_threshold", "0.5"),
    (ORIGINAL_FLASH, "flash_mode", "yes"),
    (ORIGINAL_FLASH, "flash_mode", False),
    (ORIGINAL_FLASH, "flash_threshold", 0.5),
    (HF, "flash_mode", True),
    (ORIGINAL, "model_type", "llava"),
    (ORIGINAL, "select_layer", -4),
    (ORIGINAL, "pad2square", True),
    (ORIGINAL, "force_image_size", 224),
    (ORIGINAL, "use_backbone_lora", 16),
    (ORIGINAL, "use_llm_lora", 16),
    (ORIGINAL, "downsample_ratio", 0.3),
    (ORIGINAL, "template", changed),
    (ORIGINAL, "quantization_config", {"bits": 4}),
    (ORIGINAL, "vision_config", changed),
    (ORIGINAL, "vision_config.num_hidden_layers", changed),
    (ORIGINAL, "vision_config.use_moe", True),
    (ORIGINAL, "vision_config.hidden_act", "quick_gelu"),
    (ORIGINAL, "vision_config.norm_type", "batch_norm"),
    (ORIGINAL, "vision_config.qkv_bais", True),
    (ORIGINAL, "llm_config.num_hidden_layers", changed),
    (ORIGINAL, "llm_config.rope_theta", changed),
    (ORIGINAL, "llm_config.rope_scaling", {"type": "yarn", "factor": 4.0}),
    (
        ORIGINAL,
        "llm_config.rope_scaling",
        {"type": "dynamic", "rope_type": "linear", "factor": 4.0},
    ),
    (ORIGINAL, "llm_config.rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}),
    (ORIGINAL, "llm_config.use_sliding_window", True),
    (ORIGINAL, "llm_config.model_type", "phi3"),
    (ORIGINAL, "llm_config.layer_types", ["sliding_attention"]),
    (ORIGINAL, "llm_config.num_experts", 8),
    (HF, "image_seq_length", 64),
    (HF, "vision_feature_layer", -2),
    (HF, "vision_feature_select_strategy", "full"),
    (HF, "image_token_id", 151671),
    (HF, "vision_config.image_size", [448, 224]),
    (HF, "vision_config.use_mean_pooling", False),
    (HF, "vision_config.attention_bias", changed),
    (HF, "text_config.mrope_section", [1, 2]),
]


@pytest.mark.parametrize(("config", "path", "value"), REFUSED)
def test_unsupported_unknown_and_contradictory_fields_are_named(config, path, value):
    config = changed(config, path, value)
    with pytest.raises(ValueError, match=path.split(".")[-1]):
        from_hf(config, image_token_id=151667, has_head=True)
        processor_from_hf(config)


def test_the_thresholds_of_a_flash_model_come_from_its_file():
    config = from_hf(ORIGINAL_FLASH, image_token_id=151667, has_head=True)
    assert (config.flash, config.flash_relative, config.flash_absolute) == (True, 0.1, 0.5)
    for plain in (ORIGINAL_QWEN3, changed(ORIGINAL_QWEN3, "flash_mode", False)):
        assert not from_hf(plain, image_token_id=151667, has_head=True).flash


def test_a_typo_gets_a_suggestion():
    with pytest.raises(ValueError, match="did you mean 'qkv_bias'"):
        from_hf(changed(ORIGINAL, "vision_config.qkv_bais", True), image_token_id=1)


def test_processor_of_the_original_layout():
    processor = processor_from_hf(ORIGINAL)
    assert processor == ProcessorConfig()
    assert (
        processor_from_hf(changed(ORIGINAL, "system_message", "Be brief.")).system_message
        == "Be brief."
    )
    assert processor_from_hf(changed(ORIGINAL, "dynamic_image_size", False)).max_tiles == 1
    fixed = changed(changed(ORIGINAL, "rope_pos_id_version", "v2pe_fix"), "rope_pos_id_stride", 64)
    assert processor_from_hf(fixed).delta == 64
    assert from_hf(fixed, image_token_id=151667) == with_drop_path(SIZES["1b"])
    with pytest.raises(ValueError, match="rope_pos_id_stride"):
        processor_from_hf(changed(fixed, "rope_pos_id_stride", 0))


def test_preprocessor_config_of_the_hf_layout():
    preprocessor = {
        "size": {"height": 448, "width": 448},
        "min_patches": 2,
        "max_patches": 6,
        "image_mean": [0.5] * 3,
        "image_std": [0.25] * 3,
    }
    processor = processor_from_hf(HF, preprocessor)
    assert (processor.min_tiles, processor.max_tiles) == (2, 6)
    vision = from_hf(HF, has_head=True, preprocessor_config=preprocessor).vision
    assert (vision.mean, vision.std) == ((0.5,) * 3, (0.25,) * 3)
    with pytest.raises(ValueError, match="image_size"):
        processor_from_hf(HF, preprocessor | {"size": {"height": 384, "width": 384}})


@pytest.mark.parametrize(("layout", "change", "named"), [
    ("hf", {"ps_version": "v1"}, "ps_version"),
    ("hf", {"language": dataclasses.replace(SIZES["9b"].language, qkv_bias=True)}, "InternLM3"),
    ("internvl", {"language": dataclasses.replace(SIZES["9b"].language, o_bias=True)}, "o_bias"),
    ("internvl", {"language": dataclasses.replace(SIZES["1b"].language, qkv_bias=False)}, "qkv_bias"),
    ("internvl", {"language": dataclasses.replace(SIZES["1b"].language, tie_embeddings=True)}, "ties"),
    ("hf", {"language": dataclasses.replace(SIZES["1b"].language, qk_norm=True)}, "qk_norm"),
    ("hf", {"language": dataclasses.replace(SIZES["3.5-1b"].language, qk_norm=False)}, "qk_norm"),
    ("internvl", {"language": dataclasses.replace(SIZES["3.5-1b"].language, qkv_bias=True)}, "Qwen3"),
])  # fmt: skip
def test_what_a_layout_cannot_express_is_refused(layout, change, named):
    with pytest.raises(ValueError, match=named):
        to_hf(dataclasses.replace(SIZES["9b"], **change), ProcessorConfig(), layout, "bfloat16")


NAN = float("nan")
SIZES_OF_WRONG_KINDS = {
    "hidden_size": ["24", [24], 0, -1, 1.5, True, 10**12],
    "num_attention_heads": [0, -1, 1.5, "3", 10**9, 5],
    "num_hidden_layers": ["2", 2.5, 0, 10**9],
    "intermediate_size": ["2", -1, 10**12],
}
WRONG = {
    **{
        f"{part}.{name}": values
        for part in ("vision_config", "llm_config")
        for name, values in SIZES_OF_WRONG_KINDS.items()
    },
    "vision_config": [[], "x", 3],
    "vision_config.image_size": ["448", [448], [448.0, 448], 449, 10**9],
    "vision_config.patch_size": [0, "14"],
    "vision_config.layer_norm_eps": [NAN, -1, "1e-6", 0, 5],
    "vision_config.qkv_bias": ["yes", 1],
    "vision_config.drop_path_rate": [1.0, -0.1, "0.1"],
    "vision_config.initializer_factor": [NAN, -1],
    "vision_config.use_moe": [1, "no"],
    "llm_config": [[], 3],
    "llm_config.num_key_value_heads": [0, 3, "2"],
    "llm_config.head_dim": [0, "64"],
    "llm_config.vocab_size": ["460", 0, 10**12],
    "llm_config.rms_norm_eps": [NAN, -1, "1e-6"],
    "llm_config.rope_theta": [0, -1, NAN, "1e6"],
    "llm_config.rope_scaling": ["x", {"type": 3}]
    + [{"type": "dynamic", "factor": factor} for factor in (NAN, -2)],
    "llm_config.max_position_embeddings": [0, -1, "2048"],
    "llm_config.layer_types": ["full_attention", [3], ["full_attention"]],
    "llm_config.tie_word_embeddings": ["no"],
    "llm_config.pruned_heads": [{"0": [1]}],
    "llm_config.quantization_config": [{"quant_method": "awq"}],
    "downsample_ratio": [0, "0.5", -0.5, 2, NAN],
    "min_dynamic_patch": [-1, "1", 99],
    "max_dynamic_patch": [0, -3, "12", 2.5, 10**9],
    "template": [["x"], ""],
    "system_message": [7],
    "use_thumbnail": ["no", 1],
    "dynamic_image_size": ["yes"],
    "force_image_size": ["448", True],
    "ps_version": [2, "v3"],
    "tie_word_embeddings": ["no"],
    "use_llm_lora": [16, True],
}


@pytest.mark.parametrize("path", WRONG)
def test_values_of_a_wrong_type_or_size_are_named(path):
    for value in WRONG[path]:
        config = changed(ORIGINAL, path, value)
        with pytest.raises(
            ValueError, match=rf"^at/config.json: .*{path.rpartition('.')[2]}"
        ) as caught:
            from_hf(config, image_token_id=151667, has_head=True, place="at/")
            processor_from_hf(config, place="at/")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_mean": 0.5}, "image_mean"),
        ({"image_mean": ["a", "b", "c"]}, "image_mean"),
        ({"image_std": [0, 0, 0]}, "image_std"),
        ({"image_std": [-1, -1, -1]}, "image_std"),
        ({"image_std": [NAN] * 3}, "image_std"),
        ({"do_normalize": False}, "do_normalize"),
        ({"rescale_factor": 1}, "rescale_factor"),
        ({"resample": 0}, "resample"),
        ({"min_patches": 0}, "min_patches"),
        ({"max_patches": "12"}, "max_patches"),
        ({"min_patches": 13}, "min_patches"),
        ({"size": 32}, "size"),
        ({"size": "448"}, "size"),
        ({"size": {"height": "448"}}, "size"),
        ([], "preprocessor_config.json"),
    ],
)
def test_preprocessor_values_of_a_wrong_type_or_size_are_named(values, key):
    with pytest.raises(ValueError, match=rf"^preprocessor_config.json: .*{key}|{key}: is the list"):
        from_hf(HF, has_head=True, preprocessor_config=values)
        processor_from_hf(HF, values)


def test_a_size_that_is_a_number_is_read():
    assert processor_from_hf(HF, {"size": 448}) == ProcessorConfig()
