"""Floating-point operations of a model's parts, for MFU and floors: a multiply-add counts two;
products, attention and the patch embedding are counted, norms and activations are not; nothing that
is recomputed counts.

Attention in the decoder counts the pairs that a causal query sees, segment by segment; in the tower
all pairs of a tile.
"""

import dataclasses

import numpy as np

from internvl3_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Forward:
    """FLOPs of one forward pass: of a tile, of a token, of a query-key pair, and of the head at one
    position.
    """

    vision_tile: float
    projector_tile: float
    language_token: float
    language_pair: float
    head: float


def forward_flops(config: ModelConfig) -> Forward:
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
    matrices = attention + 3 * language.hidden_size * language.intermediate_size
    return Forward(
        vision_tile=embedding + vision.num_layers * layer,
        projector_tile=projector,
        language_token=2 * language.num_layers * matrices,
        language_pair=4 * language.num_layers * language.num_heads * language.head_dim,
        head=2 * language.hidden_size * language.vocab_size,
    )


def batch_counts(batch, config: ModelConfig) -> dict[str, int]:
    """What a Batch (data/batch.py) really holds: tokens, trained tokens, tiles, query-key pairs;
    and its room for tokens and tiles.
    """
    segments = np.asarray(batch["segments"])
    rows = np.arange(len(segments))[:, None] * (segments.max(initial=0) + 1)
    lengths = np.unique((segments + rows)[segments > 0], return_counts=True)[1].astype(np.int64)
    is_visual = np.asarray(batch["tokens"]) == config.image_token_id
    # Of a pair both answers show the same features.
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
    """FLOPs that an update needs: three forward passes; one and no backward through a frozen tower.
    `counts` is of `batch_counts`.

    adapters: of LoRA, where matrices have no gradient: two passes, but for attention, which has
        none that could be spared. The adapters' own few are not counted.
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
