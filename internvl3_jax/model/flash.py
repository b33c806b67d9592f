"""The visual resolution router of InternVL3.5-Flash, and its projector to a quarter of the tokens.

Follows the code that the released Flash models come with. M tiles, P = 1 + rows * columns tokens of
a tile with CLS first, C and D the widths of tower and decoder.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from internvl3_jax.config import ModelConfig
from internvl3_jax.model.ops.linear import Dense, gelu
from internvl3_jax.model.ops.norms import make_norm
from internvl3_jax.model.projector import pixel_shuffle

_EPSILON = 1e-5  # of every LayerNorm here; torch's default
_BLOCKS = 4  # of the gating, and attentions of the pooling
_EXPANSION = 4  # inner width of a block of the gating


class Flash(nn.Module):
    """Holds both parts: the projector of compressed tiles (`mlp2`) and the router."""

    config: ModelConfig
    dtype: DTypeLike

    def setup(self):
        self.projector = CompressedProjector(self.config, self.dtype)
        self.pooling = Pooling(self.config.vision.hidden_size, self.dtype)
        self.gating = Gating(self.config.vision.hidden_size, self.dtype)

    def __call__(
        self, x: Float[Array, "M P C"], grid: tuple[int, int]
    ) -> tuple[Float[Array, "M compressed_tokens D"], Float32[Array, " M"]]:
        """Returns the tokens of each tile if it is compressed, and `probability`."""
        return self.compress(x, grid), self.probability(x)

    def compress(
        self, x: Float[Array, "M P C"], grid: tuple[int, int]
    ) -> Float[Array, "M compressed_tokens D"]:
        """Returns the visual tokens of compressed tiles. grid: (rows, columns) of patches."""
        return self.projector(x, grid)

    def probability(self, x: Float[Array, "M P C"]) -> Float32[Array, " M"]:
        """Returns the router's probability that a tile may be compressed.

        It depends on nothing but the tile.
        """
        return jax.nn.softmax(self.router_logits(x))[:, 0]

    def router_logits(self, x: Float[Array, "M P C"]) -> Float32[Array, "M 2"]:
        """Returns the router's logits: a tile is compressed, or it is not."""
        return self.gating(self.pooling(x[:, 1:])).astype(jnp.float32)


class CompressedProjector(nn.Module):
    """Maps the tower's tokens to a quarter of the visual tokens: `mlp2`, three linear layers.

    Its dropout is left out, as at inference.
    """

    config: ModelConfig
    dtype: DTypeLike

    def setup(self):
        width = self.config.language.hidden_size
        self.norm = make_norm("layer_norm", _EPSILON, self.dtype)
        self.fc1 = Dense(2 * width, dtype=self.dtype)
        self.fc2 = Dense(2 * width, dtype=self.dtype)
        self.fc3 = Dense(width, dtype=self.dtype)

    def __call__(
        self, x: Float[Array, "M P C"], grid: tuple[int, int]
    ) -> Float[Array, "M compressed_tokens D"]:
        x = x[:, 1:].reshape(x.shape[0], *grid, x.shape[2])
        x = pixel_shuffle(x, self.config.downsample**2, self.config.ps_version)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        return self.fc3(gelu(self.fc2(gelu(self.fc1(self.norm(x))))))


class Pooling(nn.Module):
    """Pools the patches of a tile: a learned query attends to them four times.

    The released code uses the first attention and norm once, and then the second ones three times.
    The third and fourth are in the files, so the tree has them; nothing reads them.
    """

    width: int
    dtype: DTypeLike

    def setup(self):
        self.query = self.param("query", nn.initializers.normal(1.0), (1, self.width))
        numbers = range(1, _BLOCKS + 1)
        attentions = [CrossAttention(self.width, self.dtype) for _ in numbers]
        norms = [make_norm("layer_norm", _EPSILON, self.dtype) for _ in numbers]
        self.attn1, self.attn2, self.attn3, self.attn4 = attentions
        self.norm1, self.norm2, self.norm3, self.norm4 = norms

    def __call__(self, x: Float[Array, "M patches C"]) -> Float[Array, "M C"]:
        query = jnp.broadcast_to(self.query.astype(self.dtype), (x.shape[0], self.width))
        query = self.norm1(self.attn1(query, *self.attn1.keys_and_values(x)))
        if self.is_initializing():
            for attention, norm in ((self.attn3, self.norm3), (self.attn4, self.norm4)):
                norm(attention(query, *attention.keys_and_values(x)))
        keys, values = self.attn2.keys_and_values(x)
        for _ in range(_BLOCKS - 1):
            query = self.norm2(self.attn2(query, keys, values))
        return query


class CrossAttention(nn.Module):
    """Multi-head attention of one query per tile to the tile's patches."""

    width: int
    dtype: DTypeLike
    num_heads: int = 16  # fixed in the released code

    def setup(self):
        self.qkv = Dense(3 * self.width, dtype=self.dtype, splits=3)
        self.out = Dense(self.width, dtype=self.dtype)

    def keys_and_values(
        self, x: Float[Array, "M patches C"]
    ) -> tuple[Float[Array, "M patches H W"], Float[Array, "M patches H W"]]:
        """Returns the keys and values of patches, by head."""
        _, keys, values = self.qkv(x)
        return self._heads(keys), self._heads(values)

    def __call__(
        self,
        query: Float[Array, "M C"],
        keys: Float[Array, "M patches H W"],
        values: Float[Array, "M patches H W"],
    ) -> Float[Array, "M C"]:
        query = self._heads(self.qkv(query)[0])
        scores = jnp.einsum("mhw,mphw->mhp", query, keys, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * keys.shape[-1] ** -0.5).astype(self.dtype)
        pooled = jnp.einsum("mhp,mphw->mhw", weights, values)
        return self.out(pooled.reshape(pooled.shape[0], self.width))

    def _heads(self, x):
        return x.reshape(*x.shape[:-1], self.num_heads, -1)


class Gating(nn.Module):
    """Four residual blocks and a linear layer to two logits."""

    width: int
    dtype: DTypeLike

    def setup(self):
        self.block = [GatingBlock(self.width, self.dtype) for _ in range(_BLOCKS)]
        self.norm = make_norm("layer_norm", _EPSILON, self.dtype)
        self.gate = Dense(2, dtype=self.dtype)

    def __call__(self, x: Float[Array, "M C"]) -> Float[Array, "M 2"]:
        for block in self.block:
            x = x + block(x)
        return self.gate(self.norm(x))


class GatingBlock(nn.Module):
    """An MLP whose output is normalized."""

    width: int
    dtype: DTypeLike

    def setup(self):
        self.fc1 = Dense(_EXPANSION * self.width, dtype=self.dtype)
        self.fc2 = Dense(self.width, dtype=self.dtype)
        self.norm = make_norm("layer_norm", _EPSILON, self.dtype)

    def __call__(self, x: Float[Array, "M C"]) -> Float[Array, "M C"]:
        return self.norm(self.fc2(gelu(self.fc1(x))))
