"""Builds small models of transformers and random adapters in PEFT's format."""

import jax
import numpy as np

from internvl3_jax.checkpoints.hf.assemble import params_from_tensors
from internvl3_jax.checkpoints.hf.config import from_hf
from internvl3_jax.config import LoraConfig
from internvl3_jax.model import lora
from tests.support import torch_reference

EVERYWHERE = (
    "vision/layers/(qkv|proj|fc1|fc2)",
    "projector/fc[12]",
    "language/layers/(q|k|v|o|gate|up|down)",
)
SETTINGS = LoraConfig(rank=3, alpha=5.0, targets=EVERYWHERE)


def build(vit="300m", llm="qwen2"):
    model, values = torch_reference.build_reference(vit, llm)
    config = from_hf(values, image_token_id=120, has_head=True)
    return (
        model,
        config,
        params_from_tensors(
            config, {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        ),
    )


def drawn(params, settings):
    rng = np.random.default_rng(0)
    new = lora.init(params, settings, jax.random.key(0))
    return jax.tree.map(
        lambda leaf: np.asarray(leaf) + 0.1 * rng.standard_normal(leaf.shape, np.float32), new
    )
