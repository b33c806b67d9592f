"""FLOPs of the model, for MFU and lower bounds of the step time.

A multiply-add counts as two. Matrix products, attention and the patch embedding count; norms,
activations and recomputation do not. Attention in the decoder counts the pairs of query and key
that the causal mask of each segment leaves, in the tower all pairs of a tile. Of a mixture of
experts, those count that a token uses.
"""

import dataclasses

import numpy as np

from internvl3_jax.config import LanguageConfig, ModelConfig


@dataclasses.dataclass(frozen=True)
class Forward:
    """FLOPs of a forward pass: per tile, token, query-key pair, and position of the head."""

    vision_tile: float
    projector_tile: float
    language_token: float
    language_pair: float
    head: float


def forward_flops(config: ModelConfig) -> Forward:
    """Returns the FLOPs of the model's parts."""
    vision, language = config.vision, config.language
    width, patches = vision.hidden_size, vision.grid**2
    layer = (
        2 * (1 + patches) * (4 * width**2 + 2 * width * vision.intermediate_size)
        + 4 * (1 + patches) ** 2 * width
    )
    embedding = 2 * patches * 3 * vision.patch_size**2 * width
    folded = config.downsample**2 * width
    projector = 2 * config.tokens_per_tile * (folded + language.hidden_size) * language.hidden_size
    attention = (
        language.hidden_size
        * (2 * language.num_heads + 2 * language.num_kv_heads)
        * language.head_dim
    )
    matrices = attention + mlp_params(language)
    return Forward(
        vision_tile=embedding + vision.num_layers * layer,
        projector_tile=projector,
        language_token=2 * language.num_layers * matrices,
        language_pair=4 * language.num_layers * language.num_heads * language.head_dim,
        head=2 * language.hidden_size * language.vocab_size,
    )


def mlp_params(language: LanguageConfig) -> int:
    """Returns the parameters of a layer's MLP, or those of router and experts that a token uses."""
    width = language.hidden_size
    if not language.num_experts:
        return 3 * width * language.intermediate_size
    chosen = language.experts_per_token * 3 * width * language.expert_size
    return chosen + width * language.num_experts


def batch_counts(batch, config: ModelConfig) -> dict[str, int]:
    """Counts tokens, supervised tokens, tiles and query-key pairs of a `Batch`, without padding,
    and its room for tokens and tiles.
    """
    segments = np.asarray(batch["segments"])
    rows = np.arange(len(segments))[:, None] * (segments.max(initial=0) + 1)
    lengths = np.unique((segments + rows)[segments > 0], return_counts=True)[1].astype(np.int64)
    is_visual = np.asarray(batch["tokens"]) == config.image_token_id
    # Both answers of a pair share the features of its images.
    visual = (
        int(is_visual.sum())
        if "features" not in batch
        else int(np.where(is_visual, batch["features"] + 1, 0).max(axis=1).sum())
    )
    return {
        "tokens": int(lengths.sum()),
        "trained_tokens": int((np.asarray(batch["loss_weights"]) > 0).sum()),
        "tiles": visual // config.tokens_per_tile,
        "pairs": int((lengths * (lengths + 1) // 2).sum()),
        "token_room": segments.size,
        "tile_room": int(np.prod(batch["tiles"].shape[:2])),
    }


def train_flops(
    config: ModelConfig, counts: dict[str, int], vision_trained: bool = True, adapters: bool = False
) -> float:
    """Returns the FLOPs of an update: three forward passes, one through a frozen tower.

    Args:
      counts: As `batch_counts` returns them.
      vision_trained: Whether the vision tower gets gradients.
      adapters: Whether only LoRA adapters are trained. Kernels then have no gradient, which leaves
        two passes; attention still takes three. The adapters' own FLOPs are not counted.
    """
    forward, passes = forward_flops(config), 2 if adapters else 3
    vision = counts["tiles"] * forward.vision_tile * (passes if vision_trained else 1)
    projector = (
        counts["tiles"]
        * forward.projector_tile
        * (1 if adapters and not vision_trained else passes)
    )
    products = counts["tokens"] * forward.language_token + counts["trained_tokens"] * forward.head
    return vision + projector + passes * products + 3 * counts["pairs"] * forward.language_pair
