"""Model configurations by name: the released sizes, and "tiny" for tests and laptops.

"8b" is InternVL3-8B, "2.5-8b" InternVL2.5-8B and "3.5-8b" InternVL3.5-8B. Vocabulary, token ids,
rotary base and scaling, and trained length of a released checkpoint come from its own files
(checkpoints/hf/config.py). Those of 9b, InternVL2.5 and InternVL3.5 here are the base models'.
"""

import dataclasses

from internvl3_jax.config import LanguageConfig, ModelConfig, VisionConfig


def _vit_300m() -> VisionConfig:
    return VisionConfig()


def _vit_6b() -> VisionConfig:
    return VisionConfig(
        hidden_size=3200,
        num_layers=45,
        num_heads=25,
        intermediate_size=12800,
        norm="rms_norm",
        qkv_bias=False,
        qk_norm=True,
    )


def _qwen(
    hidden_size, num_layers, num_heads, num_kv_heads, head_dim, intermediate_size
) -> LanguageConfig:
    """Returns a Qwen2.5 decoder, with the rotary scaling that InternVL3 adds."""
    return LanguageConfig(
        vocab_size=151674,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate_size,
        rope_scaling="dynamic",
        rope_factor=2.0,
    )


def _unscaled(model: ModelConfig) -> ModelConfig:
    """Returns an InternVL2.5 model: InternVL3's with the rotary embedding of Qwen2.5 itself."""
    language = dataclasses.replace(model.language, rope_scaling="none", rope_factor=1.0)
    return dataclasses.replace(model, language=language)


def _qwen3(hidden_size, num_layers, num_heads, num_kv_heads, intermediate_size) -> LanguageConfig:
    """Returns a Qwen3 decoder. Its head is not tied, although that of a small Qwen3 is."""
    return LanguageConfig(
        vocab_size=151936,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=128,
        intermediate_size=intermediate_size,
        max_position=40960,
        qkv_bias=False,
        qk_norm=True,
        family="qwen3",
    )


def _experts(hidden_size, num_layers, num_heads, intermediate_size, expert_size) -> LanguageConfig:
    """Returns a Qwen3 decoder with 128 experts in each layer, of which a token takes part in 8."""
    dense = _qwen3(hidden_size, num_layers, num_heads, 4, intermediate_size)
    return dataclasses.replace(
        dense, num_experts=128, experts_per_token=8, expert_size=expert_size, family="qwen3_moe"
    )


def _internlm2(
    hidden_size, num_layers, num_heads, num_kv_heads, intermediate_size
) -> LanguageConfig:
    """Returns an InternLM2.5 decoder."""
    return LanguageConfig(
        vocab_size=92553,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=128,
        intermediate_size=intermediate_size,
        norm_eps=1e-5,
        rope_scaling="dynamic",
        rope_factor=2.0,
        qkv_bias=False,
        family="internlm2",
    )


def _internlm3() -> LanguageConfig:
    return LanguageConfig(
        vocab_size=128512,
        hidden_size=4096,
        num_layers=48,
        num_heads=32,
        num_kv_heads=2,
        head_dim=128,
        intermediate_size=10240,
        norm_eps=1e-5,
        rope_theta=5e7,
        rope_scaling="dynamic",
        rope_factor=6.0,
        qkv_bias=False,
        family="internlm3",
    )


def _model(
    vision: VisionConfig, language: LanguageConfig, image_token_id: int = 151667
) -> ModelConfig:
    return ModelConfig(vision=vision, language=language, image_token_id=image_token_id)


def _tiny() -> ModelConfig:
    """Returns the digits model of configs/tiny_digits.py: 4 tokens per tile, vocabulary of 460."""
    vision = VisionConfig(
        image_size=32,
        patch_size=8,
        hidden_size=128,
        num_layers=4,
        num_heads=4,
        intermediate_size=384,
        layer_scale_init=1.0,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    language = LanguageConfig(
        vocab_size=460,
        hidden_size=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        intermediate_size=256,
        rope_theta=1e4,
        max_position=4096,
    )
    return _model(vision, language, image_token_id=453)


def _sizes() -> dict[str, ModelConfig]:
    return {
        "tiny": _tiny(),
        "1b": _model(_vit_300m(), _qwen(896, 24, 14, 2, 64, 4864)),
        "2b": _model(_vit_300m(), _qwen(1536, 28, 12, 2, 128, 8960)),
        "8b": _model(_vit_300m(), _qwen(3584, 28, 28, 4, 128, 18944)),
        "9b": _model(_vit_300m(), _internlm3(), image_token_id=128133),
        "14b": _model(_vit_300m(), _qwen(5120, 48, 40, 8, 128, 13824)),
        "38b": _model(_vit_6b(), _qwen(5120, 64, 40, 8, 128, 27648)),
        "78b": _model(_vit_6b(), _qwen(8192, 80, 64, 8, 128, 29568)),
    }


# Ids of <IMG_CONTEXT>. The one of Qwen2.5 is <think> in Qwen3.
_INTERNLM2_IMAGE, _QWEN3_IMAGE = 92546, 151671


def _sizes_2_5(internvl3: dict[str, ModelConfig]) -> dict[str, ModelConfig]:
    """Returns InternVL2.5: InternVL3's architectures, InternLM2.5 and Qwen2.5-3B."""
    small, large = _vit_300m(), _vit_6b()
    return {
        "2.5-1b": _unscaled(internvl3["1b"]),
        "2.5-2b": _model(small, _internlm2(2048, 24, 16, 8, 8192), _INTERNLM2_IMAGE),
        "2.5-4b": _unscaled(_model(small, _qwen(2048, 36, 16, 2, 128, 11008))),
        "2.5-8b": _model(small, _internlm2(4096, 32, 32, 8, 14336), _INTERNLM2_IMAGE),
        "2.5-26b": _model(large, _internlm2(6144, 48, 48, 8, 16384), _INTERNLM2_IMAGE),
        "2.5-38b": _unscaled(internvl3["38b"]),
        "2.5-78b": _unscaled(internvl3["78b"]),
    }


def _sizes_3_5() -> dict[str, ModelConfig]:
    """Returns InternVL3.5: dense decoders and mixtures of experts."""
    small, large = _vit_300m(), _vit_6b()
    return {
        "3.5-1b": _model(small, _qwen3(1024, 28, 16, 8, 3072), _QWEN3_IMAGE),
        "3.5-2b": _model(small, _qwen3(2048, 28, 16, 8, 6144), _QWEN3_IMAGE),
        "3.5-4b": _model(small, _qwen3(2560, 36, 32, 8, 9728), _QWEN3_IMAGE),
        "3.5-8b": _model(small, _qwen3(4096, 36, 32, 8, 12288), _QWEN3_IMAGE),
        "3.5-14b": _model(small, _qwen3(5120, 40, 40, 8, 17408), _QWEN3_IMAGE),
        "3.5-38b": _model(large, _qwen3(5120, 64, 64, 8, 25600), _QWEN3_IMAGE),
        "3.5-30b-a3b": _model(small, _experts(2048, 48, 32, 6144, 768), _QWEN3_IMAGE),
        "3.5-241b-a28b": _model(large, _experts(4096, 94, 64, 12288, 1536), _QWEN3_IMAGE),
    }


SIZES = _sizes()
SIZES |= _sizes_2_5(SIZES) | _sizes_3_5()
