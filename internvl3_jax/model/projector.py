"""Pixel shuffle and the two-layer MLP between the vision tower and the decoder."""

import flax.linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from internvl3_jax.config import ModelConfig
from internvl3_jax.model.ops.linear import Dense, gelu
from internvl3_jax.model.ops.norms import make_norm


def pixel_shuffle(
    x: Float[Array, "M rows columns C"], factor: int, version: str = "v2"
) -> Float[Array, "M rows2 columns2 C2"]:
    """Folds [M,R,Q,C] -> [M, R/f, Q/f, f*f*C]: each block of f x f patches becomes one token.

    Within a token the row of the block is the most significant index, then its column, then the
    channel, as in InternVL's `pixel_shuffle`.

    Args:
      version: "v1" returns the two spatial axes swapped, as the first released models did.
    """
    tiles, rows, columns, channels = x.shape
    x = x.reshape(tiles, rows // factor, factor, columns // factor, factor, channels)
    order = (0, 1, 3, 2, 4, 5) if version == "v2" else (0, 3, 1, 2, 4, 5)
    x = x.transpose(order)
    return x.reshape(x.shape[0], x.shape[1], x.shape[2], factor * factor * channels)


class Projector(nn.Module):
    """Maps the tower's tokens to visual tokens of the decoder's width."""

    config: ModelConfig
    dtype: DTypeLike

    def setup(self):
        width = self.config.language.hidden_size
        self.norm = make_norm("layer_norm", self.config.projector_norm_eps, self.dtype)
        self.fc1 = Dense(width, dtype=self.dtype)
        self.fc2 = Dense(width, dtype=self.dtype)

    def __call__(
        self, x: Float[Array, "M P C"], grid: tuple[int, int]
    ) -> Float[Array, "M tile_tokens D"]:
        """Projects a tile's P = 1 + rows * columns tokens, CLS first; `grid` is (rows, columns)."""
        # The CLS token is not used.
        x = x[:, 1:].reshape(x.shape[0], grid[0], grid[1], x.shape[2])
        x = pixel_shuffle(x, self.config.downsample, self.config.ps_version)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = self.fc2(gelu(self.fc1(self.norm(x))))
        self.sow("intermediates", "projected", x)
        return x
