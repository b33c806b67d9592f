"""InternVL3: tiles and tokens in, logits out.

    params = model.init(key, batch)["params"]
    logits = model.apply({"params": params}, batch)                            # f32[B,T,V]
    hidden = model.apply({"params": params}, batch, method=InternVL.hidden)    # [B,T,D]
    features = model.apply({"params": params}, tiles, method=InternVL.encode)  # [M,tile_tokens,D]

Axis letters are those of model/__init__.py; tile_tokens is 256 in the released models.
"""

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped

from internvl3_jax.config import ModelConfig
from internvl3_jax.model.flash import Flash
from internvl3_jax.model.kv_cache import Cache
from internvl3_jax.model.language import Decoder
from internvl3_jax.model.projector import Projector
from internvl3_jax.model.vision import VisionTower
from internvl3_jax.parallel.collectives import constrain
from internvl3_jax.parallel.sharding import BATCH_AXES, TILE_AXES


class InternVL(nn.Module):
    """The vision-language model.

    Attributes:
      config: Sizes of the tower, the projector and the decoder.
      dtype: Compute dtype.
      unrolled: Decoder parameters are in the generation layout; see language.py.
      unrolled_vision: Tower parameters have separate arrays per layer; see vision.py.
      fused: In the generation layout, q/k/v and gate/up are one kernel each.
      scan_unroll: Layers per step of the scans. On a CPU more is faster, since the body of a loop
          runs on one core.
      remat_vision: What the tower's backward pass recomputes; see ops/remat.py.
      remat_language: The same of the decoder.
      attention_vision: Attention implementation of the tower; see ops/attention.py.
      attention_language: The same of the decoder.
      max_segments: No packed row has more samples than this; 0: there is no such limit.
    """

    config: ModelConfig
    dtype: DTypeLike = jnp.float32
    unrolled: bool = False
    unrolled_vision: bool = False
    fused: bool = True
    scan_unroll: int = 1
    remat_vision: str = "none"
    remat_language: str = "none"
    attention_vision: str = "auto"
    attention_language: str = "auto"
    max_segments: int = 0

    def setup(self):
        self.vision = VisionTower(
            self.config.vision,
            self.dtype,
            self.scan_unroll,
            self.remat_vision,
            self.unrolled_vision,
            self.attention_vision,
        )
        self.projector = Projector(self.config, self.dtype)
        if self.config.flash:
            self.flash = Flash(self.config, self.dtype)
        self.language = Decoder(
            self.config.language,
            self.dtype,
            self.unrolled,
            self.fused,
            self.scan_unroll,
            self.remat_language,
            self.attention_language,
            self.max_segments,
        )

    def __call__(
        self, batch: Mapping, deterministic: bool = True, scaling: str | None = None
    ) -> Float32[Array, "B T vocab_size"]:
        """Returns the logits of a `Batch` (data/batch.py), without the vocabulary's padding.

        Args:
          batch: A `Batch`, or any mapping with its fields tokens, tiles, positions and segments. With
            "visual" [B,F,D] in it, of `all_features`, the tiles are not encoded.
          deterministic: False drops paths in the tower, with the rng "drop_path".
          scaling: RoPE scaling instead of the config's; "none" under V2PE.
        """
        logits = self.language.logits(self.hidden(batch, deterministic, scaling))
        return logits[..., : self.config.language.vocab_size]

    def hidden(
        self, batch: Mapping, deterministic: bool = True, scaling: str | None = None
    ) -> Float[Array, "B T D"]:
        """Returns the final hidden states; losses compute logits only where they need them.

        The arguments are those of `__call__`.
        """
        tokens, tiles = batch["tokens"], batch["tiles"]
        x = self.language.embed(tokens)

        # 1) Encode the tiles, sharded over all devices.
        rows, count = tiles.shape[:2]
        features = batch.get("visual")
        if features is None and count:
            features = self.encode(tiles.reshape(rows * count, *tiles.shape[2:]), deterministic)
            # 2) Back from tiles to rows.
            features = by_rows(features, rows)
        if features is not None:
            # 3) Put them in place of the image tokens.
            x = merge(x, features, tokens == self.config.image_token_id, batch.get("features"))
        self.sow("intermediates", "merged", x)

        # 4) Decode.
        x, _ = self.language(
            x,
            batch["positions"],
            batch["segments"],
            scaling=scaling,
            last_query=batch.get("last_query"),
        )
        return x

    def encode(
        self, tiles: Shaped[Array, "M height width 3"], deterministic: bool = True
    ) -> Float[Array, "M tile_tokens D"]:
        """Returns the visual tokens of tiles (uint8, or float already normalized).

        No tile is compressed.
        """
        x = self.vision(tiles, deterministic)
        if self.config.flash and self.is_initializing():
            self.flash(x, self._grid(tiles))
        return self.projector(x, self._grid(tiles))

    def encode_both(
        self, tiles: Shaped[Array, "M height width 3"], deterministic: bool = True
    ) -> tuple[
        Float[Array, "M tile_tokens D"],
        Float[Array, "M compressed_tokens D"],
        Float32[Array, " M"],
    ]:
        """Returns the visual tokens of tiles, those of the tiles if they are compressed, and the
        router's probability that they may be. Only of a model with a router (Flash).
        """
        x = self.vision(tiles, deterministic)
        return self.projector(x, self._grid(tiles)), *self.flash(x, self._grid(tiles))

    def all_features(
        self, tiles: Shaped[Array, "B N height width 3"], deterministic: bool = True
    ) -> tuple[Float[Array, "B F D"], Float32[Array, "B N 2"]]:
        """Returns the features of rows of tiles, F = N * (tile_tokens + compressed_tokens): of all
        tiles in full, then of all as compressed; and the router's logits, the first for compression.

        Only of a model with a router (Flash).
        """
        rows, count = tiles.shape[:2]
        tiles = tiles.reshape(rows * count, *tiles.shape[2:])
        x, grid = self.vision(tiles, deterministic), self._grid(tiles)
        full, few = self.projector(x, grid), self.flash.compress(x, grid)
        logits = constrain(self.flash.router_logits(x), TILE_AXES, None)
        features = jnp.concatenate([by_rows(full, rows), by_rows(few, rows)], axis=1)
        return features, logits.reshape(rows, count, 2)

    def _grid(self, tiles: Shaped[Array, "M height width 3"]) -> tuple[int, int]:
        """Returns the rows and columns of patches of a tile."""
        patch = self.config.vision.patch_size
        return tiles.shape[1] // patch, tiles.shape[2] // patch

    def step(
        self,
        tokens: Int[Array, "B T"],
        visual: Float[Array, "B T D"] | None,
        positions: Int[Array, "B T"],
        slots: Int[Array, "B T"],
        cache: Cache,
        scaling: str | Int[Array, " B"] | None = None,
        is_start: bool = False,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Runs tokens through the decoder and writes their keys and values into the cache.

        Args:
          visual: The feature of each image token, anything elsewhere; None: there are no images.
          positions: In units of 1/256.
          slots: The cache slot of each token.
          is_start: The cache is empty; see `Decoder`.

        Returns:
          Hidden states and the updated cache.
        """
        x = self.language.embed(tokens)
        if visual is not None:
            is_visual = tokens == self.config.image_token_id
            x = jnp.where(is_visual[..., None], visual.astype(x.dtype), x)
        return self.language(
            x, positions, cache=cache, slots=slots, scaling=scaling, is_start=is_start
        )

    def head_kernel(self) -> Float[Array, "D V"]:
        """Returns the output kernel as stored; V includes the vocabulary's padding."""
        return self.language.head_kernel()

    def logits(self, hidden: Float[Array, "B T D"]) -> Float32[Array, "B T V"]:
        """Returns the logits of hidden states, those of the vocabulary's padding included."""
        return self.language.logits(hidden)


def by_rows(features: Float[Array, "M P D"], rows: int) -> Float[Array, "B F D"]:
    """Moves features from tiles to rows: all-gathered among the devices of a row only."""
    features = constrain(features, TILE_AXES, None, None)
    features = features.reshape(rows, -1, features.shape[-1])
    return constrain(features, BATCH_AXES, None, None)


def merge(
    embeddings: Float[Array, "B T D"],
    features: Float[Array, "B F D"],
    is_visual: Bool[Array, "B T"],
    indices: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:
    """Puts visual features in place of the embeddings of visual tokens.

    A gather within each row: sharded rows need no collective.

    Args:
      is_visual: Which tokens are visual.
      indices: The row's feature for each visual token; None: the k-th visual token of a row gets
          its k-th feature.
    """
    indices = jnp.cumsum(is_visual, axis=1) - 1 if indices is None else indices
    indices = jnp.clip(indices, 0, features.shape[1] - 1)
    gathered = jax.vmap(lambda row, index: row[index])(features, indices)
    return jnp.where(is_visual[..., None], gathered.astype(embeddings.dtype), embeddings)


def abstract_params(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> dict:
    """Returns the parameter tree as ShapeDtypeStructs, without allocating memory."""
    shapes = _param_shapes(config)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)


@functools.lru_cache(maxsize=64)  # traces the whole model
def _param_shapes(config: ModelConfig) -> dict:
    size = config.vision.image_size
    batch = {
        "tokens": jax.ShapeDtypeStruct((1, 1), jnp.int32),
        "positions": jax.ShapeDtypeStruct((1, 1), jnp.int32),
        "segments": jax.ShapeDtypeStruct((1, 1), jnp.int32),
        "tiles": jax.ShapeDtypeStruct((1, 1, size, size, 3), jnp.uint8),
    }
    return jax.eval_shape(InternVL(config).init, jax.random.key(0), batch)["params"]


def count_params(config: ModelConfig) -> dict[str, int]:
    """Returns the parameters of "vision", "projector", "language", and "flash" if there is a router.

    The rows that pad the vocabulary are not counted.
    """
    counts = {
        name: sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(subtree))
        for name, subtree in abstract_params(config).items()
    }
    language = config.language
    padding = language.padded_vocab_size - language.vocab_size
    embeddings = 1 if language.tie_embeddings else 2
    counts["language"] -= embeddings * padding * language.hidden_size
    return counts
