"""The decoder: one module for Qwen2.5, InternLM2 and InternLM3, which differ by numbers and bias
flags.

Two layouts of the same layers. Stacked (canonical: checkpoints, training) keeps [L, ...] arrays and
scans. Unrolled (generation) keeps separate arrays for every layer, with q/k/v and gate/up merged: a
scan would copy every weight at every decoded token. `unroll` makes the second from the first.

B rows, T tokens, D width, V vocabulary, N query heads, K key/value heads, H head width, S cache
slots.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from internvl3_jax.config import LanguageConfig
from internvl3_jax.model import kv_cache
from internvl3_jax.model.ops.attention import MASKED, attention, cache_mask, causal
from internvl3_jax.model.ops.context_parallel import from_zigzag, row_parts, to_zigzag
from internvl3_jax.model.ops.linear import Dense, is_decoding
from internvl3_jax.model.ops.norms import make_norm
from internvl3_jax.model.ops.remat import checkpoint_name, remat
from internvl3_jax.model.ops.rope import apply_rope, rope_tables
from internvl3_jax.parallel.sharding import BATCH_AXES, ROW_AXES, SHARDED_AXES, constrain


class DecoderLayer(nn.Module):
    config: LanguageConfig
    dtype: DTypeLike
    fused: bool  # q/k/v and gate/up as one product each
    attention: str = "auto"

    def setup(self):
        config, dtype = self.config, self.dtype
        q_width, kv_width = (
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        )

        def dense(features, bias):
            return Dense(features, use_bias=bias, dtype=dtype)

        self.input_norm = make_norm("rms_norm", config.norm_eps, dtype)
        self.post_norm = make_norm("rms_norm", config.norm_eps, dtype)
        if self.fused:
            self.qkv = dense(q_width + 2 * kv_width, config.qkv_bias)
            self.gate_up = dense(2 * config.intermediate_size, config.mlp_bias)
        else:
            self.q = dense(q_width, config.qkv_bias)
            self.k = dense(kv_width, config.qkv_bias)
            self.v = dense(kv_width, config.qkv_bias)
            self.gate = dense(config.intermediate_size, config.mlp_bias)
            self.up = dense(config.intermediate_size, config.mlp_bias)
        self.o = dense(config.hidden_size, config.o_bias)
        self.down = dense(config.hidden_size, config.mlp_bias)

    def __call__(self, x, rope, mask, slots=None, cache_layer=None):
        """x [B,T,D] -> (x, cache_layer). With a cache the new keys and values go to `slots` first,
        and all its slots are keys.
        """
        # Between the products tokens are split over tensor, too (Korthikanti et al. 2022): what is
        # kept for the backward pass, and the norms, are not repeated on each of its devices.
        x = checkpoint_name(constrain(x, BATCH_AXES, ROW_AXES, None), "stream")
        attended, cache_layer = self.attend(self.input_norm(x), rope, mask, slots, cache_layer)
        x = x + attended
        x = x + self.mlp(self.post_norm(x))
        self.sow("intermediates", "block", x)
        return x, cache_layer

    def attend(self, x, rope, mask, slots, cache_layer):
        config = self.config
        q_width, kv_width = (
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        )
        if self.fused:
            q, k, v = jnp.split(self.qkv(x), (q_width, q_width + kv_width), axis=-1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        q, k, v = (part.reshape(*x.shape[:2], -1, config.head_dim) for part in (q, k, v))
        q, k, v = (constrain(part, BATCH_AXES, "context", "tensor", None) for part in (q, k, v))
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if cache_layer is not None:
            cache_layer = kv_cache.write(cache_layer, k, v, slots)
            k, v = cache_layer["k"].astype(q.dtype), cache_layer["v"].astype(q.dtype)
        q, k, v = (checkpoint_name(part, "attention_input") for part in (q, k, v))
        mixed = attention(q, k, v, mask, self.attention)
        return self.o(mixed.reshape(*x.shape[:2], q_width)), cache_layer

    def mlp(self, x):
        gate, up = (
            jnp.split(self.gate_up(x), 2, axis=-1) if self.fused else (self.gate(x), self.up(x))
        )
        return self.down(constrain(nn.silu(gate) * up, BATCH_AXES, "context", "tensor"))


class Decoder(nn.Module):
    config: LanguageConfig
    dtype: DTypeLike
    unrolled: bool = False
    # of the unrolled layout; False where "tensor" splits the heads, which a merged matrix would
    # interleave
    fused: bool = True
    scan_unroll: int = 1  # layers per step of the scan
    remat: str = "none"  # see ops/remat.py
    attention: str = "auto"  # implementation; see ops/attention.py

    def setup(self):
        config = self.config
        init = nn.initializers.normal(config.hidden_size**-0.5)
        self.embedding = self.param(
            "embedding", init, (config.padded_vocab_size, config.hidden_size)
        )
        if self.unrolled:
            self.layer = [
                DecoderLayer(config, self.dtype, self.fused, self.attention)
                for _ in range(config.num_layers)
            ]
        else:
            self.layers = nn.scan(
                remat(DecoderLayer, self.remat, self.scan_unroll),
                variable_axes={"params": 0, "lora": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=config.num_layers,
                unroll=self.scan_unroll,
            )(config, self.dtype, fused=False, attention=self.attention)
        self.norm = make_norm("rms_norm", config.norm_eps, self.dtype)
        if not config.tie_embeddings:
            self.head = Head(config.hidden_size, config.padded_vocab_size)

    def embed(self, tokens):
        """i32[B,T] -> [B,T,D]"""
        # Every device looks its part of the width up for all rows, then they exchange: ids and
        # features travel, the table does not.
        tokens = constrain(tokens, ("slice", "data"), None)
        x = jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)
        x = constrain(x, ("slice", "data"), None, SHARDED_AXES)
        # One axis at a time, each an all-to-all; both at once the compiler would do by gathering
        # everything.
        x = constrain(x, BATCH_AXES, None, "context")
        x = constrain(x, BATCH_AXES, "context", None)
        return constrain(x, BATCH_AXES, ROW_AXES, None)

    def __call__(
        self,
        x,
        positions,
        segments=None,
        cache=None,
        slots=None,
        scaling: str | None = None,
        until=None,
    ):
        """Embeddings to final hidden states.

        Args:
          x: [B,T,D]; positions: i32[B,T] in units of 1/256.
          segments: i32[B,T], 0 = padding; None where every row is one sequence (padding then
              belongs at its end).
          cache, slots: see cache.py; slots i32[B,T] are where the T tokens go. Needs the unrolled
              layout.
          scaling: rope scaling in place of the config's ("none" under V2PE).
          until: i32[B,T], the last place that sees each token; None: its segment's end. Without a
              cache only.

        Returns ([B,T,D], cache).
        """
        scaling = self.config.rope_scaling if scaling is None else scaling
        # Where the mesh splits rows, their tokens stand in another order between here and the end,
        # so that all devices have equal work.
        parts = row_parts(x.shape[1]) if cache is None else 1
        given = (x, positions, segments, until)
        x, positions, segments, until = (
            None if part is None else to_zigzag(part, parts) for part in given
        )
        rope = rope_tables(self.config, positions, segments, scaling)
        if cache is None:
            mask = causal(x.shape[:2], segments, parts, until)
        elif not self.unrolled:
            raise ValueError(
                "a cache needs the unrolled layout: Decoder(..., unrolled=True) with parameters from language.unroll"
            )
        else:
            mask = cache_mask(slots, cache[0]["k"].shape[1])
        if not self.unrolled:
            x, _ = self.layers(x, rope, mask)
            return self.norm(from_zigzag(x, parts)), None
        layers = []
        for index, layer in enumerate(self.layer):
            x, updated = layer(x, rope, mask, slots, None if cache is None else cache[index])
            layers.append(updated)
        return self.norm(from_zigzag(x, parts)), None if cache is None else layers

    def head_kernel(self):
        """The output matrix [D, padded V] as stored, for a loss that makes the logits itself."""
        return self.embedding.T if self.config.tie_embeddings else self.head()

    def logits(self, hidden):
        """[B,T,D] -> f32[B,T,padded V]; the padding's logits are -1e30."""
        kernel = self.head_kernel().astype(self.dtype)
        if is_decoding(hidden):
            hidden = constrain(hidden, ("slice", "data"), None, SHARDED_AXES)  # as in ops/dense.py
        logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
        if self.config.padded_vocab_size == self.config.vocab_size:
            return logits
        real = jnp.arange(self.config.padded_vocab_size) < self.config.vocab_size
        return jnp.where(real[None, None], logits, MASKED)


class Head(nn.Module):
    """Holds the output matrix [D, padded V], so that a chunked loss can take the matrix itself."""

    width: int
    features: int

    @nn.compact
    def __call__(self):
        return self.param("kernel", nn.initializers.lecun_normal(), (self.width, self.features))


def unroll(params: dict, config: LanguageConfig, fused: bool = True) -> dict:
    """Stacked decoder parameters -> the unrolled layout. Leaves outside the layers are shared, the
    layers' are copied.
    """
    layers = params["layers"]

    def one(index):
        part = jax.tree.map(lambda leaf: leaf[index], layers)
        if not fused:
            return part
        merged = {name: part[name] for name in ("input_norm", "post_norm", "o", "down")}
        for target, sources in (("qkv", ("q", "k", "v")), ("gate_up", ("gate", "up"))):
            merged[target] = jax.tree.map(
                lambda *leaves: jnp.concatenate(leaves, axis=-1), *(part[name] for name in sources)
            )
        return merged

    rest = {name: value for name, value in params.items() if name != "layers"}
    return rest | {f"layer_{index}": one(index) for index in range(config.num_layers)}
