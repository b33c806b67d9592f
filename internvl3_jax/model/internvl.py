"""InternVL3: tiles and tokens in, logits out.

    params = model.init(key, batch)["params"]
    logits = model.apply({"params": params}, batch)                                        # f32[B,T,V]
    hidden = model.apply({"params": params}, batch, method=InternVL.hidden)                # [B,T,D]
    features = model.apply({"params": params}, tiles, method=InternVL.encode)              # [M, tokens per tile, D]

B rows, T tokens, N tiles a row, M tiles, D width, V vocabulary.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from internvl3_jax.config import ModelConfig
from internvl3_jax.model.language import Decoder
from internvl3_jax.model.projector import Projector
from internvl3_jax.model.vision import VisionTower
from internvl3_jax.parallel.sharding import BATCH_AXES, TILE_AXES, constrain


class InternVL(nn.Module):
    config: ModelConfig
    dtype: DTypeLike = jnp.float32
    unrolled: bool = False  # the decoder's generation layout; see language.py
    unrolled_vision: bool = False  # the tower's; see vision.py
    fused: bool = True  # of the generation layout: q/k/v and gate/up as one matrix each
    # layers per step of the scans; on a CPU more is faster, since a loop's body runs on one core
    scan_unroll: int = 1
    remat_vision: str = "none"  # what the backward pass recomputes in each layer; see ops/remat.py
    remat_language: str = "none"
    attention_vision: str = "auto"  # implementation; see ops/attention.py
    attention_language: str = "auto"

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
        self.language = Decoder(
            self.config.language,
            self.dtype,
            self.unrolled,
            self.fused,
            self.scan_unroll,
            self.remat_language,
            self.attention_language,
        )

    def __call__(self, batch, deterministic: bool = True, scaling: str | None = None):
        """batch: a `Batch` or a dict with its fields (data/batch.py). Returns logits f32[B,T,V]
        without the vocabulary's padding.
        """
        logits = self.language.logits(self.hidden(batch, deterministic, scaling))
        return logits[..., : self.config.language.vocab_size]

    def hidden(self, batch, deterministic: bool = True, scaling: str | None = None):
        """Final hidden states [B,T,D]; the head runs elsewhere, only where it is needed."""
        tokens, tiles = batch["tokens"], batch["tiles"]
        x = self.language.embed(tokens)
        rows, count = tiles.shape[:2]
        if count:
            features = self.encode(tiles.reshape(rows * count, *tiles.shape[2:]), deterministic)
            # Back from tiles over all devices to rows: what a row's devices made is gathered among
            # them, nothing crosses rows.
            features = constrain(features, TILE_AXES, None, None).reshape(
                rows, -1, features.shape[-1]
            )
            features = constrain(features, BATCH_AXES, None, None)
            x = merge(x, features, tokens == self.config.image_token_id, batch.get("features"))
        self.sow("intermediates", "merged", x)
        x, _ = self.language(
            x, batch["positions"], batch["segments"], scaling=scaling, until=batch.get("until")
        )
        return x

    def encode(self, tiles, deterministic: bool = True):
        """tiles u8[M,S,S,3] -> [M, tokens per tile, D]"""
        patch = self.config.vision.patch_size
        x = self.vision(tiles, deterministic)
        return self.projector(x, (tiles.shape[1] // patch, tiles.shape[2] // patch))

    def step(self, tokens, visual, positions, slots, cache, scaling: str | None = None):
        """Runs tokens i32[B,T] through the decoder, into `cache`.

        `visual` [B,T,D] holds the features of pictures at the places of their tokens, or is None
        where there are none. Returns (hidden [B,T,D], cache).
        """
        x = self.language.embed(tokens)
        if visual is not None:
            x = jnp.where(
                (tokens == self.config.image_token_id)[..., None], visual.astype(x.dtype), x
            )
        return self.language(x, positions, cache=cache, slots=slots, scaling=scaling)

    def head_kernel(self):
        """The output matrix [D, padded V] as stored."""
        return self.language.head_kernel()

    def logits(self, hidden):
        """[B,T,D] -> f32[B,T,padded V]"""
        return self.language.logits(hidden)


def merge(embeddings, features, is_visual, slot=None):
    """Puts a row's k-th visual feature at its k-th visual token; with `slot` i32[B,T], the feature
    of that number at each.

    embeddings [B,T,D], features [B,F,D], is_visual bool[B,T] -> [B,T,D]. A gather within each row:
    sharding rows needs no collective.
    """
    slot = jnp.cumsum(is_visual, axis=1) - 1 if slot is None else slot
    slot = jnp.clip(slot, 0, features.shape[1] - 1)
    gathered = jax.vmap(lambda row, index: row[index])(features, slot)
    return jnp.where(is_visual[..., None], gathered.astype(embeddings.dtype), embeddings)


def abstract_params(config: ModelConfig, dtype=jnp.float32) -> dict:
    """The parameter tree as ShapeDtypeStructs: no memory is touched, whatever the size."""
    size = config.vision.image_size
    batch = {
        "tokens": jax.ShapeDtypeStruct((1, 1), jnp.int32),
        "positions": jax.ShapeDtypeStruct((1, 1), jnp.int32),
        "segments": jax.ShapeDtypeStruct((1, 1), jnp.int32),
        "tiles": jax.ShapeDtypeStruct((1, 1, size, size, 3), jnp.uint8),
    }
    shapes = jax.eval_shape(InternVL(config).init, jax.random.key(0), batch)["params"]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)


def count_params(config: ModelConfig) -> dict[str, int]:
    """Parameters of "vision", "projector" and "language", without the rows that pad the vocabulary."""
    shapes = abstract_params(config)
    counts = {
        name: sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(part))
        for name, part in shapes.items()
    }
    language = config.language
    matrices = 1 if language.tie_embeddings else 2
    counts["language"] -= (
        matrices * (language.padded_vocab_size - language.vocab_size) * language.hidden_size
    )
    return counts
