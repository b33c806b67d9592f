"""Pixel shuffle and the two-layer MLP between the vision tower and the decoder. M tiles, G patches
a side, C and D widths.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from internvl3_jax.config import ModelConfig
from internvl3_jax.model.ops.linear import Dense
from internvl3_jax.model.ops.norms import make_norm


def pixel_shuffle(x, factor: int, version: str = "v2"):
    """[M,R,Q,C] -> [M, R/f, Q/f, f*f*C]: a block of f x f patches becomes one token.

    Within a token the row inside the block is most significant, then the column, then the channel,
    as in InternVL. "v1" returns the two spatial axes swapped, as the first released models did.
    """
    tiles, rows, columns, channels = x.shape
    x = x.reshape(tiles, rows // factor, factor, columns // factor, factor, channels)
    order = (0, 1, 3, 2, 4, 5) if version == "v2" else (0, 3, 1, 2, 4, 5)
    x = x.transpose(order)
    return x.reshape(x.shape[0], x.shape[1], x.shape[2], factor * factor * channels)


class Projector(nn.Module):
    config: ModelConfig
    dtype: DTypeLike

    def setup(self):
        width = self.config.language.hidden_size
        self.norm = make_norm("layer_norm", self.config.projector_norm_eps, self.dtype)
        self.fc1 = Dense(width, dtype=self.dtype)
        self.fc2 = Dense(width, dtype=self.dtype)

    def __call__(self, x, grid: tuple[int, int]):
        """x [M, 1 + rows*columns, C] from the tower, CLS first -> [M, tokens per tile, D]."""
        x = x[:, 1:].reshape(x.shape[0], grid[0], grid[1], x.shape[2])
        x = pixel_shuffle(x, self.config.downsample, self.config.ps_version)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = self.fc2(nn.gelu(self.fc1(self.norm(x)), approximate=False))
        self.sow("intermediates", "projected", x)
        return x
