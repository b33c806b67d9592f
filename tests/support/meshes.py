"""Model styles and device meshes under which the same update is computed."""

import dataclasses

import numpy as np
from jax.sharding import AbstractMesh

from internvl3_jax.config import MeshConfig
from internvl3_jax.parallel import sharding
from tests.support.tiny_checkpoint import CONFIG

# The 300M style has 4 query and 2 key heads; the 6B style 3 vision heads, and 14 query heads, which
# no even tensor axis above 2 divides.
VISION_6B = dataclasses.replace(CONFIG.vision, norm="rms_norm", qkv_bias=False, qk_norm=True)
LANGUAGE_14 = dataclasses.replace(CONFIG.language, hidden_size=64, num_heads=14, num_kv_heads=2)
# Qwen3: heads that together are not as wide as the model, with norms, and no bias.
LANGUAGE_QWEN3 = dataclasses.replace(
    CONFIG.language, head_dim=12, qkv_bias=False, qk_norm=True, family="qwen3"
)
LANGUAGE_EXPERTS = dataclasses.replace(
    LANGUAGE_QWEN3,
    num_experts=6,
    experts_per_token=2,
    expert_size=24,
    family="qwen3_moe",
)
STYLES = {
    "300m": CONFIG,
    "6b": dataclasses.replace(CONFIG, vision=VISION_6B, language=LANGUAGE_14),
    "qwen3": dataclasses.replace(CONFIG, language=LANGUAGE_QWEN3),
    "qwen3_moe": dataclasses.replace(CONFIG, language=LANGUAGE_EXPERTS),
}
MESHES = {
    "data": MeshConfig(data=8, fsdp=1),
    "fsdp": MeshConfig(fsdp=8),
    "slices": MeshConfig(slice=2, data=2, fsdp=2),
    "tensor": MeshConfig(fsdp=2, tensor=4),
    "tensor only": MeshConfig(fsdp=1, tensor=8),
    "context": MeshConfig(data=2, fsdp=1, context=4),
    "all": MeshConfig(fsdp=2, tensor=2, context=2),
}
# Meshes planned for the released sizes. The 6B tower's width of 3200 splits 128 ways at most.
PLANNED = [
    {"fsdp": 8},
    {"fsdp": 64},
    {"fsdp": 128},
    {"data": 2, "fsdp": 128},
    {"fsdp": 32, "tensor": 8},
    {"slice": 4, "fsdp": 128, "tensor": 2},
    {"fsdp": 16, "tensor": 4, "context": 4},
    {"data": 16, "fsdp": 128, "context": 2},
]


def mesh_of(sizes: dict) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in sharding.AXES), sharding.AXES)


def widened(values):
    """Pads the tiles of each row to a multiple of 8, the largest context x tensor of MESHES."""
    extra = -values["tiles"].shape[1] % 8
    return values | {"tiles": np.pad(values["tiles"], ((0, 0), (0, extra), (0, 0), (0, 0), (0, 0)))}
