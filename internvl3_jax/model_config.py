"""Shapes of the model family and the settings of its processor, as typed dataclasses.

Nothing here touches jax. `checkpoints/hf/config.py` reads and writes the two released
`config.json` layouts.

The dataclasses are mutable so that `--config.model.vision.num_layers=2` can override a field, and
hashable so that Flax modules can carry them. Treat them as values once a module has been built.
"""

import dataclasses

from internvl3_jax.io import limits
from internvl3_jax.io.typed import ConfigError

# Positions are integers in units of 1 / UNITS; see positions.py.
UNITS = 256


@dataclasses.dataclass(unsafe_hash=True)
class VisionConfig:
    """InternViT, the vision tower. The defaults are InternViT-300M-448px-V2_5."""

    # Height and width of a tile, in pixels.
    image_size: int = 448
    # Height and width of a patch, in pixels.
    patch_size: int = 14
    # Width of the residual stream.
    hidden_size: int = 1024
    # Number of transformer blocks.
    num_layers: int = 24
    # Number of attention heads; must divide hidden_size.
    num_heads: int = 16
    # Width of the MLP.
    intermediate_size: int = 4096
    # Normalization before attention and MLP: "layer_norm" (300M) or "rms_norm" (6B).
    norm: str = "layer_norm"
    # Added to the variance before the square root.
    norm_eps: float = 1e-6
    # Whether the projections to q, k and v have a bias.
    qkv_bias: bool = True
    # Whether q and k pass an RMSNorm over all channels, before the split into heads (6B).
    qk_norm: bool = False
    # Initial value of the per-channel scales of the two residual branches.
    layer_scale_init: float = 0.1
    # Stochastic depth in training: rate of the last block. It grows linearly from 0 in the first.
    drop_path: float = 0.0
    # Mean and standard deviation of RGB in [0, 1]; tiles are normalized on the device.
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads


@dataclasses.dataclass(unsafe_hash=True)
class LanguageConfig:
    """Decoder. Qwen2.5, Qwen3, InternLM2 and InternLM3 differ by numbers and flags only.

    With experts, each layer has a mixture of them in place of its MLP (Qwen3 MoE).
    """

    # Number of tokens of the tokenizer, special tokens included.
    vocab_size: int
    # Width of the residual stream.
    hidden_size: int
    # Number of transformer blocks.
    num_layers: int
    # Number of query heads.
    num_heads: int
    # Number of key and value heads; must divide num_heads.
    num_kv_heads: int
    # Channels of one attention head; must be even.
    head_dim: int
    # Width of the gated MLP.
    intermediate_size: int
    # Added to the mean square before the square root of an RMSNorm.
    norm_eps: float = 1e-6
    # Base of the rotary frequencies.
    rope_theta: float = 1e6
    # "none", or "dynamic" for NTK scaling by the current length, as in transformers >= 5. V2PE
    # switches it off.
    rope_scaling: str = "none"
    # Factor of "dynamic" scaling.
    rope_factor: float = 1.0
    # Length in tokens beyond which "dynamic" scaling acts.
    max_position: int = 32768
    # Whether the projections to q, k and v, the output projection and the MLP have biases.
    qkv_bias: bool = True
    o_bias: bool = False
    mlp_bias: bool = False
    # Whether each head of q and k passes an RMSNorm over its channels before the rotation (Qwen3).
    qk_norm: bool = False
    # Whether the output head shares the embedding's weights.
    tie_embeddings: bool = False
    # Experts of a layer. 0 means an MLP, and the next three fields have no effect.
    num_experts: int = 0
    # Experts that each token takes part in.
    experts_per_token: int = 0
    # Width of an expert's gated MLP; intermediate_size is then that of layers without experts,
    # of which the released models have none.
    expert_size: int = 0
    # Whether the weights of a token's experts are divided by their sum.
    normalize_experts: bool = True
    # Architecture and tensor names in an exported model: "qwen2", "qwen3", "qwen3_moe", "internlm2"
    # or "internlm3".
    family: str = "qwen2"
    # The vocabulary is padded to a multiple of this inside the model; exports cut the padding.
    vocab_multiple: int = 256

    @property
    def q_width(self) -> int:
        """Channels of all query heads together; Qwen3's are more than hidden_size."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Channels of all key heads together, as of all value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and columns of the head, padding included."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclasses.dataclass(unsafe_hash=True)
class ModelConfig:
    """Everything that the parameters and the forward pass depend on."""

    vision: VisionConfig
    language: LanguageConfig
    # Id of <IMG_CONTEXT>, the placeholder of one visual token, in the checkpoint's tokenizer.
    image_token_id: int
    # Pixel shuffle folds downsample x downsample patches into one visual token.
    downsample: int = 2
    # Pixel shuffle variant: "v2", or "v1", which leaves both spatial axes swapped (old models).
    ps_version: str = "v2"
    # Added to the variance in the projector's LayerNorm.
    projector_norm_eps: float = 1e-5
    # Whether the model has a visual resolution router (InternVL3.5-Flash), which compresses tiles
    # to a quarter of their visual tokens, and the projector of such tiles.
    flash: bool = False
    # A tile is compressed if the router's probability for that is above this quantile of those of
    # all tiles of the request, and at least the second number.
    flash_relative: float = 0.0
    flash_absolute: float = 0.0

    @property
    def tokens_per_tile(self) -> int:
        """Returns the number of visual tokens of one tile."""
        return (self.vision.grid // self.downsample) ** 2

    @property
    def tokens_per_compressed_tile(self) -> int:
        """Returns the number of visual tokens of a tile that the router compresses."""
        return (self.vision.grid // self.downsample**2) ** 2

    def __post_init__(self):
        validate(self)


@dataclasses.dataclass(unsafe_hash=True)
class ProcessorConfig:
    """Settings by which images and messages become tiles and token ids.

    It is part of a checkpoint's fingerprint, since training and inference must agree on it.
    """

    # Height and width of a tile, in pixels; must equal model.vision.image_size.
    image_size: int = 448
    # Visual tokens of one tile; must equal the model's.
    tokens_per_tile: int = 256
    # Lowest and highest number of tiles, thumbnails not counted. `tiles` says of what.
    min_tiles: int = 1
    max_tiles: int = 12
    # "per image": max_tiles holds for each image, as in the released models' inference code.
    # "shared": max_tiles is shared by all images of a prompt, as in their training code.
    tiles: str = "per image"
    # Highest number of tiles of all images of a prompt, thumbnails not counted. Each image gets an
    # equal share. 0 sets no limit.
    max_total_tiles: int = 0
    # Whether an image of several tiles is followed by a thumbnail of the whole image.
    use_thumbnail: bool = True
    # Whether the EXIF orientation is applied. InternVL's code ignores it.
    apply_exif: bool = False
    # Name of the chat template.
    template: str = "internvl2_5"
    # "default" is the template's own system message, None leaves the system block out, and any
    # other text replaces the message.
    system_message: str | None = "default"
    # Tokens that end an answer.
    stop_tokens: tuple[str, ...] = ("<|im_end|>",)
    # Text before each frame of a video; {} is replaced by the frame's number, from 1.
    frame_label: str = "Frame-{}: "
    # V2PE: position step of a visual token, in units of 1 / 256. 256 gives ordinary positions.
    delta: int = UNITS

    def __post_init__(self):
        check_tile_rule(self.tiles, "processor.tiles")
        if self.max_total_tiles < 0:
            raise ValueError(
                f"processor.max_total_tiles is {self.max_total_tiles}; "
                f"it must be at least 1, or 0 for no limit"
            )
        if not self.stop_tokens or not all(self.stop_tokens):
            raise ValueError(
                f"processor.stop_tokens is {self.stop_tokens!r}; name the tokens that end an "
                'answer, such as "<|im_end|>"'
            )
        if self.frame_label.count("{}") != 1 or "<image>" in self.frame_label:
            raise ValueError(
                f"processor.frame_label is {self.frame_label!r}; it must have {{}} once, for the "
                f"number of the frame, and no <image>"
            )


TILE_RULES = ("per image", "shared")


def check_tile_rule(rule: str, name: str) -> None:
    """Raises ValueError, naming the setting `name`, unless `rule` is one of TILE_RULES."""
    if rule not in TILE_RULES:
        raise ValueError(
            f"{name} is {rule!r}; it must be one of {', '.join(map(repr, TILE_RULES))}"
        )


def validate(config: ModelConfig) -> None:
    """Raises ConfigError naming each field of a wrong type, out of its range, or that contradicts
    another.
    """
    if problems := limits.problems(config):
        raise ConfigError("; ".join(f"ModelConfig.{problem}" for problem in problems))
    vision, language = config.vision, config.language
    checks = [
        (
            vision.image_size % vision.patch_size == 0,
            "vision.image_size",
            f"{vision.image_size} is not a multiple of patch_size",
        ),
        (
            vision.grid % config.downsample == 0,
            "downsample",
            f"{vision.grid} patches a side do not fold by {config.downsample}",
        ),
        (
            not config.flash or vision.grid % config.downsample**2 == 0,
            "flash",
            f"{vision.grid} patches a side do not fold by {config.downsample**2}, as in a "
            "compressed tile",
        ),
        (
            not config.flash or vision.hidden_size % 16 == 0,
            "flash",
            f"the router has 16 heads, which do not divide the tower's width {vision.hidden_size}",
        ),
        (
            vision.hidden_size % vision.num_heads == 0,
            "vision.num_heads",
            f"{vision.num_heads} does not divide the width",
        ),
        (
            language.num_heads % language.num_kv_heads == 0,
            "language.num_kv_heads",
            f"{language.num_kv_heads} does not divide num_heads ({language.num_heads})",
        ),
        (
            language.head_dim % 2 == 0,
            "language.head_dim",
            f"{language.head_dim} is odd; rotary embedding needs pairs",
        ),
        (
            (language.num_experts > 0) == (language.family == "qwen3_moe"),
            "language.num_experts",
            f"{language.num_experts} with the family {language.family!r}; experts are Qwen3's, "
            "of the family 'qwen3_moe'",
        ),
        (
            not language.num_experts
            or 1 <= language.experts_per_token <= language.num_experts
            and language.expert_size > 0,
            "language.experts_per_token",
            f"{language.experts_per_token} of {language.num_experts} experts of width "
            f"{language.expert_size}; a token has at least one and at most all, and width is "
            "positive",
        ),
        (
            not (language.num_experts and language.mlp_bias),
            "language.mlp_bias",
            "experts have no biases",
        ),
        (
            0 <= config.image_token_id < language.vocab_size,
            "image_token_id",
            f"{config.image_token_id} is outside the vocabulary",
        ),
    ]
    for holds, field, problem in checks:
        if not holds:
            raise ConfigError(f"ModelConfig.{field}: {problem}")
