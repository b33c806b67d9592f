"""Model configurations by name: the released sizes, and "tiny" for tests and laptops."""

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
        # The vocabulary and the id of the image token are those of the base model. A released
        # checkpoint's own come from its config (checkpoints/hf/config.py).
        "9b": _model(_vit_300m(), _internlm3(), image_token_id=128133),
        "14b": _model(_vit_300m(), _qwen(5120, 48, 40, 8, 128, 13824)),
        "38b": _model(_vit_6b(), _qwen(5120, 64, 40, 8, 128, 27648)),
        "78b": _model(_vit_6b(), _qwen(8192, 80, 64, 8, 128, 29568)),
    }


SIZES = _sizes()
