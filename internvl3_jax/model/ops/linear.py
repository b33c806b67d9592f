"""A linear layer whose matrix may be split over the devices (sharding.py), quantized (quantize.py)
and adapted (lora.py).
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from internvl3_jax.model.ops.quantize import dequantize
from internvl3_jax.parallel.sharding import (
    all_gather_weight,
    barrier_after,
    matmul_weight_stationary,
)


class Dense(nn.Module):
    """As `flax.linen.Dense`, with the same parameters; a matrix that is split by its width is
    gathered in the compute dtype, where it is used, and its gradient is summed to where it is
    stored.

    Where the collection "lora" has a layer for it ({"a" [in,r], "b" [r,features]} and, to drop
    inputs, "rate" f32[]), x @ a @ b is added.
    """

    features: int
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x):
        """[..., in] -> [..., features] in `dtype`"""
        x = x.astype(self.dtype)
        stored = (
            self.get_variable("params", "kernel") if self.has_variable("params", "kernel") else None
        )
        if isinstance(stored, Mapping):
            y = self._quantized(x, stored)
        else:
            kernel = self.param(
                "kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features)
            )
            y = self._product(x, kernel.astype(self.dtype))
        if self.has_variable("lora", "a"):
            y = y + self._adapter(x)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
            y = y + bias.reshape((1,) * (y.ndim - 1) + (-1,))
        return y

    def _product(self, x, kernel):
        path = "/".join((*self.path, "kernel"))
        if is_decoding(x):
            return matmul_weight_stationary(x, kernel, path)
        x, kernel = barrier_after(x, kernel, path)
        return jnp.dot(x, all_gather_weight(kernel, path))

    def _quantized(self, x, kernel: Mapping):
        """The product with a quantized matrix: its few bits travel, and the backward pass unpacks
        them again instead of keeping it.
        """
        parts = {name: self._gathered(part, f"kernel/{name}") for name, part in kernel.items()}
        return jax.checkpoint(lambda x, parts: jnp.dot(x, dequantize(parts, self.dtype)))(x, parts)

    def _adapter(self, x):
        a, b = (
            self._gathered(self.get_variable("lora", name).astype(self.dtype), name, "lora")
            for name in "ab"
        )
        if self.has_variable("lora", "rate"):
            keep = 1.0 - self.get_variable("lora", "rate")
            kept = jax.random.bernoulli(self.make_rng("dropout"), keep, x.shape)
            x = jnp.where(kept, x / keep.astype(self.dtype), 0)
        return jnp.dot(jnp.dot(x, a), b)

    def _gathered(self, part, name: str, *start: str):
        return all_gather_weight(part, "/".join((*start, *self.path, name)))


def is_decoding(x) -> bool:
    """Whether [B,T,D] is one token of each row. A matrix is then larger than all that it is
    multiplied with; and gathered, it would be gathered before the loop over tokens, all layers at
    once.
    """
    return x.ndim == 3 and x.shape[1] == 1
