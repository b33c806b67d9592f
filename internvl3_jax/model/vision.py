"""InternViT: one module for the 300M tower (LayerNorm, qkv bias) and the 6B tower (RMSNorm).

Follows InternViT-448px-V2_5 as released with InternVL3: no final norm, layer scale inside the
residual, CLS dropped after the tower. The 6B tower has QK-norm over all channels.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Shaped

from internvl3_jax.config import VisionConfig
from internvl3_jax.model.ops.attention import attention, padding_works
from internvl3_jax.model.ops.linear import Dense, gelu
from internvl3_jax.model.ops.norms import make_norm
from internvl3_jax.model.ops.remat import checkpoint_name, remat
from internvl3_jax.parallel.collectives import constrain, platform, row_major
from internvl3_jax.parallel.sharding import TILE_AXES
from internvl3_jax.param_tree import own, unstack


class VisionBlock(nn.Module):
    """Pre-norm attention and MLP, each with layer scale and stochastic depth."""

    config: VisionConfig
    dtype: DTypeLike
    attention: str = "auto"

    def setup(self):
        config, dtype = self.config, self.dtype
        width = config.hidden_size
        self.norm1 = make_norm(config.norm, config.norm_eps, dtype)
        self.qkv = Dense(3 * width, use_bias=config.qkv_bias, dtype=dtype, splits=3)
        if config.qk_norm:
            self.q_norm = make_norm("rms_norm", config.norm_eps, dtype)
            self.k_norm = make_norm("rms_norm", config.norm_eps, dtype)
        self.proj = Dense(width, dtype=dtype)
        self.norm2 = make_norm(config.norm, config.norm_eps, dtype)
        self.fc1 = Dense(config.intermediate_size, dtype=dtype)
        self.fc2 = Dense(width, dtype=dtype)
        init = nn.initializers.constant(config.layer_scale_init)
        self.layer_scale1 = self.param("layer_scale1", init, (width,))
        self.layer_scale2 = self.param("layer_scale2", init, (width,))

    def __call__(
        self,
        x: Float[Array, "M P C"],
        drop_rate: Float[Array, ""],
        deterministic: bool,
        tokens: int,
    ) -> tuple[Float[Array, "M P C"], None]:
        """Returns the residual stream after the block, and None as `nn.scan` expects.

        Args:
          drop_rate: Probability of dropping each branch for a tile; unused if deterministic.
          tokens: Tokens of a tile; the others are padding.
        """
        x = row_major(checkpoint_name(constrain(x, TILE_AXES, None, None), "stream"))
        branch = self.proj(self.attend(self.norm1(x), tokens), self.layer_scale1)
        x = x + self.drop_path(branch, drop_rate, deterministic)
        x = row_major(checkpoint_name(x, "attended"))
        branch = self.fc2(gelu(self.fc1(self.norm2(x))), self.layer_scale2)
        x = x + self.drop_path(branch, drop_rate, deterministic)
        self.sow("intermediates", "block", x)
        return x, None

    def attend(self, x: Float[Array, "M P C"], tokens: int) -> Float[Array, "M P C"]:
        """Returns the output of attention, before its last product."""
        q, k, v = self.qkv(x)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        heads = (*x.shape[:2], self.config.num_heads, self.config.head_dim)
        q, k, v = (checkpoint_name(y.reshape(heads), "attention_input") for y in (q, k, v))
        out = attention(q, k, v, implementation=self.attention, num_keys=tokens)
        return out.reshape(x.shape)

    def drop_path(
        self, branch: Float[Array, "M P C"], rate: Float[Array, ""], deterministic: bool
    ) -> Float[Array, "M P C"]:
        """Drops the branch for whole tiles and rescales the others (Huang et al. 2016)."""
        if deterministic or self.config.drop_path == 0.0:
            return branch
        keep_prob = 1.0 - rate
        shape = (branch.shape[0], 1, 1)
        is_kept = jax.random.bernoulli(self.make_rng("drop_path"), keep_prob, shape)
        return jnp.where(is_kept, branch / keep_prob, 0.0).astype(branch.dtype)


class VisionTower(nn.Module):
    """Patch and position embeddings, and the blocks.

    Attributes:
      scan_unroll: Layers per step of the scan.
      remat: What the backward pass recomputes; see ops/remat.py.
      unrolled: Separate arrays for every layer, made by `unroll`. A CPU copies a layer out of
          stacked arrays at every use.
      attention: Implementation; see ops/attention.py.
    """

    config: VisionConfig
    dtype: DTypeLike
    scan_unroll: int = 1
    remat: str = "none"
    unrolled: bool = False
    attention: str = "auto"

    def setup(self):
        config = self.config
        self.patch_embedding = Dense(config.hidden_size, dtype=self.dtype)
        # Training from scratch needs position embeddings as large as the content: with a standard
        # deviation of 0.02 a small tower learns several times more slowly.
        init = nn.initializers.normal(0.5)
        self.class_embedding = self.param("class_embedding", init, (config.hidden_size,))
        self.position_embedding = self.param(
            "position_embedding", init, (1 + config.grid**2, config.hidden_size)
        )
        if self.unrolled:
            self.layer = [
                VisionBlock(config, self.dtype, self.attention) for _ in range(config.num_layers)
            ]
            return
        self.layers = nn.scan(
            remat(VisionBlock, self.remat, self.scan_unroll, static_argnums=(3, 4)),
            variable_axes={"params": 0, "lora": 0, "intermediates": 0},
            split_rngs={"params": True, "drop_path": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=config.num_layers,
            unroll=self.scan_unroll,
        )(config, self.dtype, self.attention)

    def __call__(
        self, tiles: Shaped[Array, "M height width 3"], deterministic: bool = True
    ) -> Float[Array, "M P C"]:
        """Encodes tiles; height and width are multiples of the patch size.

        Args:
          tiles: uint8, or float already normalized.

        Returns:
          The CLS token and the patches, row by row.
        """
        patch = self.config.patch_size
        grid = (tiles.shape[1] // patch, tiles.shape[2] // patch)

        # Embed the patches and put the CLS token in front.
        x = patches(normalize(tiles, self.config), patch).astype(self.dtype)
        x = self.patch_embedding(x)
        cls = self.class_embedding.astype(self.dtype)[None, None]
        cls = jnp.broadcast_to(cls, (x.shape[0], 1, x.shape[2]))
        table = interpolate_positions(self.position_embedding, grid)
        x = jnp.concatenate([cls, x], axis=1) + table.astype(self.dtype)[None]
        x = constrain(x, TILE_AXES, None, None)
        self.sow("intermediates", "embedded", x)

        # Blocks, with drop rates that increase linearly.
        tokens = x.shape[1]
        x = jnp.pad(x, ((0, 0), (0, self._padding(tokens)), (0, 0)))
        rates = jnp.linspace(0.0, self.config.drop_path, self.config.num_layers)
        if not self.unrolled:
            return self.layers(x, rates, deterministic, tokens)[0][:, :tokens]
        for layer, rate in zip(self.layer, rates, strict=True):
            x, _ = layer(x, rate, deterministic, tokens)
        return x[:, :tokens]

    def _padding(self, tokens: int) -> int:
        """Returns how many tokens to add to a tile's, once for all layers.

        On NVIDIA GPUs products take a multiple of 8 rows and cuDNN an even number of tokens, so
        that each layer would pad the 1,025 tokens of a tile several times.
        """
        dtype = jnp.dtype(self.dtype)
        if platform() != "gpu" or self.attention not in ("auto", "cudnn") or dtype.itemsize != 2:
            return 0
        return -tokens % 8 if padding_works(self.config.head_dim, dtype) else 0


def unroll(params: dict, config: VisionConfig, donate: bool = False) -> dict:
    """Converts parameters of the tower from stacked to separate arrays, as `unstack` does.

    Args:
      donate: As of `language.unroll`.
    """
    layers = unstack(params["layers"] if donate else own(params["layers"]), config.num_layers)
    rest = {name: value for name, value in params.items() if name != "layers"}
    return rest | {f"layer_{index}": layer for index, layer in enumerate(layers)}


def normalize(
    tiles: Shaped[Array, "M height width 3"], config: VisionConfig
) -> Float[Array, "M height width 3"]:
    """Returns (tiles / 255 - mean) / std in float32; float tiles are returned as they are."""
    if jnp.issubdtype(tiles.dtype, jnp.floating):
        return tiles
    mean, std = (jnp.asarray(x, jnp.float32)[None, None, None] for x in (config.mean, config.std))
    return (tiles.astype(jnp.float32) / 255.0 - mean) / std


def patches(
    tiles: Float[Array, "M height width channels"], size: int
) -> Float[Array, "M patches values"]:
    """Cuts [M,H,W,3] -> [M, H/size * W/size, size*size*3], row-major.

    With a dense layer this is the patch convolution of InternVL's code as one product.
    """
    count, height, width, channels = tiles.shape
    x = tiles.reshape(count, height // size, size, width // size, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(
        count, (height // size) * (width // size), size * size * channels
    )


def interpolate_positions(
    table: Float[Array, "P C"], grid: tuple[int, int]
) -> Float[Array, "P2 C"]:
    """Resamples a position table [1 + G*G, C] to `grid`: [1 + rows*columns, C].

    Bicubic in float32 with half-pixel centers and the kernel of torch's
    `interpolate(mode="bicubic", align_corners=False)` (a = -0.75, edges clamped, no antialiasing);
    `jax.image.resize` has another kernel. The CLS row stays as it is.

    Args:
      grid: (rows, columns) of patches.
    """
    side = int((table.shape[0] - 1) ** 0.5)
    if grid == (side, side):
        return table
    cls, body = table[:1], table[1:].reshape(side, side, -1).astype(jnp.float32)
    rows, columns = _bicubic_matrix(side, grid[0]), _bicubic_matrix(side, grid[1])
    body = jnp.einsum("rs,sxc->rxc", rows, body)
    body = jnp.einsum("kx,rxc->rkc", columns, body)
    return jnp.concatenate([cls, body.reshape(grid[0] * grid[1], -1).astype(table.dtype)])


def _bicubic_matrix(source: int, target: int, a: float = -0.75) -> Float32[Array, "target source"]:
    """Returns the matrix that resamples a line of `source` samples to `target`."""
    centers = (jnp.arange(target) + 0.5) * (source / target) - 0.5
    first = jnp.floor(centers)
    matrix = jnp.zeros((target, source))
    for tap in range(-1, 3):
        # Keys' cubic convolution: one polynomial up to distance 1, another up to 2.
        distance = jnp.abs(centers - (first + tap))
        near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
        far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        index = jnp.clip(first + tap, 0, source - 1).astype(jnp.int32)
        matrix = matrix.at[jnp.arange(target), index].add(jnp.where(distance <= 1, near, far))
    return matrix
