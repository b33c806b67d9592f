"""The decoder: one module for Qwen2.5, Qwen3, InternLM2 and InternLM3.

The families differ by sizes and flags, which are in the config. The layers have two parameter
layouts:

    stacked   [L, ...] arrays and a scan; for checkpoints and training
    unrolled  separate arrays per layer, with q/k/v and gate/up fused; for generation, where a scan
              would copy every weight at every decoded token

`unroll` makes the second from the first.
"""

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from internvl3_jax.config import LanguageConfig
from internvl3_jax.model import kv_cache
from internvl3_jax.model.experts import STATISTICS, Experts
from internvl3_jax.model.ops.attention import (
    MASKED,
    Mask,
    attention,
    cache_mask,
    causal_mask,
    int8_attention,
)
from internvl3_jax.model.ops.context_parallel import from_zigzag, num_context_shards, to_zigzag
from internvl3_jax.model.ops.linear import Dense, Head, head_logits, is_decoding
from internvl3_jax.model.ops.norms import make_norm
from internvl3_jax.model.ops.remat import checkpoint_name, remat
from internvl3_jax.model.ops.rope import Rope, apply_rope, rope_tables
from internvl3_jax.parallel.collectives import constrain, platform
from internvl3_jax.parallel.sharding import BATCH_AXES, ROW_AXES, SHARDED_AXES
from internvl3_jax.param_tree import own, unstack


class DecoderLayer(nn.Module):
    """Pre-norm attention, and a SwiGLU MLP or a mixture of them.

    Attributes:
      fused: q/k/v, and gate/up, are one kernel each.
      attention: Implementation; see ops/attention.py.
    """

    config: LanguageConfig
    dtype: DTypeLike
    fused: bool
    attention: str = "auto"

    def setup(self):
        config, dtype = self.config, self.dtype
        dense = functools.partial(Dense, dtype=dtype)
        norm = functools.partial(make_norm, "rms_norm", config.norm_eps, dtype)

        # Norms before attention and before the MLP, and those of each head of q and k (Qwen3, after
        # Dehghani et al. 2023).
        self.input_norm, self.post_norm = norm(), norm()
        if config.qk_norm:
            self.q_norm, self.k_norm = norm(), norm()
        # The input products, in one of the two layouts, and the output products.
        if self.fused:
            self.qkv = dense(config.q_width + 2 * config.kv_width, config.qkv_bias)
        else:
            self.q = dense(config.q_width, config.qkv_bias)
            self.k = dense(config.kv_width, config.qkv_bias)
            self.v = dense(config.kv_width, config.qkv_bias)
        self.o = dense(config.hidden_size, config.o_bias)
        if config.num_experts:
            self.experts = Experts(config, dtype, self.fused)
            return
        if self.fused:
            self.gate_up = dense(2 * config.intermediate_size, config.mlp_bias)
        else:
            self.gate = dense(config.intermediate_size, config.mlp_bias)
            self.up = dense(config.intermediate_size, config.mlp_bias)
        self.down = dense(config.hidden_size, config.mlp_bias)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: Rope,
        mask: Mask,
        slots: Int[Array, "B T"] | None = None,
        layer_cache: kv_cache.LayerCache | None = None,
    ) -> tuple[Float[Array, "B T D"], kv_cache.LayerCache | None]:
        """Returns the residual stream after the layer, and the updated cache.

        With a cache the new keys and values are written to `slots` first. All slots are then keys,
        unless the mask is that of the tokens among themselves.
        """
        # Between the products tokens are sharded over tensor, too (Korthikanti et al. 2022): its
        # devices repeat neither the norms nor what is kept for the backward pass.
        x = checkpoint_name(constrain(x, BATCH_AXES, ROW_AXES, None), "stream")
        attended, layer_cache = self.attend(self.input_norm(x), rope, mask, slots, layer_cache)
        x = checkpoint_name(x + attended, "attended")
        x = x + self.mlp(self.post_norm(x), mask)
        self.sow("intermediates", "block", x)
        return x, layer_cache

    def attend(
        self,
        x: Float[Array, "B T D"],
        rope: Rope,
        mask: Mask,
        slots: Int[Array, "B T"] | None,
        layer_cache: kv_cache.LayerCache | None,
    ) -> tuple[Float[Array, "B T D"], kv_cache.LayerCache | None]:
        config = self.config

        # Project, split into heads, shard, normalize, rotate.
        if self.fused:
            q, k, v = jnp.split(
                self.qkv(x), (config.q_width, config.q_width + config.kv_width), axis=-1
            )
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        q, k, v = (y.reshape(*x.shape[:2], -1, config.head_dim) for y in (q, k, v))
        q, k, v = (constrain(y, BATCH_AXES, "context", "tensor", None) for y in (q, k, v))
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)

        # Attend to the cache, or to the row itself.
        if layer_cache is not None:
            layer_cache = kv_cache.write(layer_cache, k, v, slots)
            if not mask.self_attention:
                if kv_cache.is_int8(layer_cache) and is_decoding(x):
                    out = int8_attention(q, *kv_cache.read_int8(layer_cache), mask)
                    return self.o(out.reshape(*x.shape[:2], config.q_width)), layer_cache
                k, v = kv_cache.read(layer_cache, q.dtype)
        q, k, v = (checkpoint_name(y, "attention_input") for y in (q, k, v))
        out = attention(q, k, v, mask, self.attention)
        return self.o(out.reshape(*x.shape[:2], config.q_width)), layer_cache

    def mlp(self, x: Float[Array, "B T D"], mask: Mask) -> Float[Array, "B T D"]:
        if self.config.num_experts:
            return self.experts(x, mask.q_segments)
        if self.fused:
            gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        else:
            gate, up = self.gate(x), self.up(x)
        return self.down(constrain(nn.silu(gate) * up, BATCH_AXES, "context", "tensor"))


def float32_layer(config: LanguageConfig, params: dict, *arguments) -> tuple:
    """Calls a `DecoderLayer` of the fused layout that computes in float32, without a kernel."""
    layer = DecoderLayer(config, jnp.float32, fused=True, attention="xla")
    return layer.apply({"params": params}, *arguments)


class Decoder(nn.Module):
    """Embedding, layers, final norm and output head.

    Attributes:
      unrolled: The parameters are in the unrolled layout.
      fused: In the unrolled layout, q/k/v and gate/up are one kernel each. False where "tensor"
          shards the heads, which a fused kernel would interleave.
      scan_unroll: Layers per step of the scan.
      remat: What the backward pass recomputes; see ops/remat.py.
      attention: Implementation; see ops/attention.py.
      max_segments: No packed row has more samples than this; 0: there is no such limit.
    """

    config: LanguageConfig
    dtype: DTypeLike
    unrolled: bool = False
    fused: bool = True
    scan_unroll: int = 1
    remat: str = "none"
    attention: str = "auto"
    max_segments: int = 0

    def setup(self):
        config = self.config
        self.embedding = self.param(
            "embedding",
            nn.initializers.normal(config.hidden_size**-0.5),
            (config.padded_vocab_size, config.hidden_size),
        )
        # Layers with parameters of their own, or one scanned layer with stacked parameters.
        if self.unrolled:
            self.layer = [
                DecoderLayer(config, self.dtype, self.fused, self.attention)
                for _ in range(config.num_layers)
            ]
        else:
            self.layers = nn.scan(
                remat(DecoderLayer, self.remat, self.scan_unroll),
                variable_axes={"params": 0, "lora": 0, "intermediates": 0, STATISTICS: 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=config.num_layers,
                unroll=self.scan_unroll,
            )(config, self.dtype, fused=False, attention=self.attention)
        self.norm = make_norm("rms_norm", config.norm_eps, self.dtype)
        if not config.tie_embeddings:
            self.head = Head(config.hidden_size, config.padded_vocab_size)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Looks up the tokens' embeddings without gathering the table."""
        # 1) Every device looks up its slice of the width, for the rows of all devices that share
        #    it. Ids and features are communicated, the table is not.
        tokens = constrain(tokens, ("slice", "data"), None)
        x = jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)
        x = constrain(x, ("slice", "data"), None, SHARDED_AXES)
        # 2) From slices of the width to slices of the rows: fsdp, then context, each an all-to-all.
        #    Both at once the compiler would do by gathering everything.
        x = constrain(x, BATCH_AXES, None, "context")
        x = constrain(x, BATCH_AXES, "context", None)
        # 3) Tokens over tensor, as the layers take them.
        return constrain(x, BATCH_AXES, ROW_AXES, None)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"] | None = None,
        cache: kv_cache.Cache | None = None,
        slots: Int[Array, "B T"] | None = None,
        scaling: str | Int[Array, " B"] | None = None,
        last_query: Int[Array, "B T"] | None = None,
        is_start: bool = False,
    ) -> tuple[Float[Array, "B T D"], kv_cache.Cache | None]:
        """Runs embeddings through the layers and the final norm.

        Args:
          x: Embeddings.
          positions: In units of 1/256.
          segments: Sample of each token, 0 is padding. None: every row is one sequence, with its
              padding at the end.
          cache: Keys and values of earlier tokens; needs the unrolled layout.
          slots: The cache slot of each token.
          scaling: RoPE scaling instead of the config's, as of ops/rope.py; "none" under V2PE.
          last_query: The last token that sees each token; None: the end of its segment. Not with a
              cache.
          is_start: The cache is empty, so that the tokens see only each other: causal attention,
              which fused kernels compute without the cache's free slots.

        Returns:
          Final hidden states and the updated cache.

        Raises:
          ValueError: A cache is given in the stacked layout.
        """
        if cache is not None and not self.unrolled:
            raise ValueError(
                "the decoder has a cache and stacked parameters; a cache needs the unrolled "
                "layout: Decoder(..., unrolled=True) with parameters from language.unroll"
            )
        scaling = self.config.rope_scaling if scaling is None else scaling

        # 1) Where the mesh shards rows, reorder tokens until the end of this function, so that all
        #    devices have equal work.
        shards = num_context_shards(x.shape[1]) if cache is None else 1
        inputs = (x, positions, segments, last_query)
        x, positions, segments, last_query = jax.tree.map(lambda y: to_zigzag(y, shards), inputs)

        # 2) Rotary tables and the mask, shared by all layers.
        rope = rope_tables(self.config, positions, segments, scaling)
        if cache is None or is_start:
            mask = causal_mask(x.shape[:2], segments, shards, last_query, self.max_segments)
        else:
            mask = cache_mask(slots, kv_cache.num_slots(cache))

        # 3) The layers.
        if not self.unrolled:
            x, _ = self.layers(x, rope, mask)
            return self.norm(from_zigzag(x, shards)), None
        if cache is not None and self._is_fused_step(x, cache):
            from internvl3_jax.model.ops.fused_decode import decode_layers

            layers = [layer.variables["params"] for layer in self.layer]
            x, new_cache = decode_layers(self.config, layers, x, rope, slots, cache)
            return self.norm(x), new_cache
        new_cache = []
        for index, layer in enumerate(self.layer):
            x, layer_cache = layer(x, rope, mask, slots, None if cache is None else cache[index])
            new_cache.append(layer_cache)
        return self.norm(from_zigzag(x, shards)), None if cache is None else new_cache

    def _is_fused_step(self, x: Float[Array, "B T D"], cache: kv_cache.Cache) -> bool:
        """Returns whether ops/fused_decode.py computes the layers for these tokens."""
        if platform() != "gpu" or not is_decoding(x) or not self.fused or self.attention != "auto":
            return False
        if self.is_initializing() or self.is_mutable_collection("intermediates"):
            return False
        from internvl3_jax.model.ops.fused_decode import decodes_here

        layers = [layer.variables for layer in self.layer]
        return decodes_here(self.config, layers, x, cache, float32_layer)

    def head_kernel(self) -> Float[Array, "D V"] | Mapping[str, Array]:
        """Returns the output kernel as stored, for losses that compute logits in chunks."""
        return self.embedding.T if self.config.tie_embeddings else self.head()

    def logits(self, hidden: Float[Array, "B T D"]) -> Float32[Array, "B T V"]:
        """Returns logits; those of the vocabulary's padding are -1e30."""
        logits = head_logits(hidden, self.head_kernel(), self.dtype)
        if self.config.padded_vocab_size == self.config.vocab_size:
            return logits
        in_vocab = jnp.arange(self.config.padded_vocab_size) < self.config.vocab_size
        return jnp.where(in_vocab[None, None], logits, MASKED)


def unroll(params: dict, config: LanguageConfig, fused: bool = True, donate: bool = False) -> dict:
    """Converts decoder parameters from the stacked to the unrolled layout.

    Leaves outside of the layers are shared, those of the layers as by `unstack`.

    Args:
      fused: Concatenate the kernels of q/k/v, and of gate/up.
      donate: Empty `params["layers"]` leaf by leaf, so that a leaf to which nothing else refers is
        freed before the next one is copied.
    """

    def fuse(layer, target, sources):
        parts = [layer.pop(name) for name in sources]
        layer[target] = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), *parts)

    layers = unstack(params["layers"] if donate else own(params["layers"]), config.num_layers)
    for layer in layers if fused else ():
        fuse(layer, "qkv", ("q", "k", "v"))
        fuse(layer.get("experts", layer), "gate_up", ("gate", "up"))
    rest = {name: value for name, value in params.items() if name != "layers"}
    return rest | {f"layer_{index}": layer for index, layer in enumerate(layers)}
