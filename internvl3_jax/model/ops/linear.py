"""Linear layers whose kernel may be sharded, quantized (quantize.py) and adapted (lora.py)."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from internvl3_jax.model.ops.quantize import dequantize
from internvl3_jax.parallel.collectives import (
    all_gather_weight,
    barrier_after,
    matmul_weight_stationary,
)


class Dense(nn.Module):
    """`flax.linen.Dense` with the same parameters, for kernels sharded as in parallel/sharding.py.

    FSDP-sharded kernels are cast, all-gathered just before use, and their gradients
    reduce-scattered. While decoding, kernels stay in place and activations move instead.

    If the collection "lora" has an adapter for the layer, {"a" [in,R], "b" [R,features]}, then
    x @ a @ b is added. "rate" f32[] in it is the dropout rate of the adapter's input.

    Attributes:
      features: Width of the output.
      use_bias: Whether a bias is added.
      dtype: Compute dtype, of the output as well.
    """

    features: int
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*rows d_in"]) -> Float[Array, "*rows features"]:
        x = x.astype(self.dtype)
        # A quantized kernel is a subtree, which `self.param` would not accept.
        stored = (
            self.get_variable("params", "kernel") if self.has_variable("params", "kernel") else None
        )
        if isinstance(stored, Mapping):
            y = self._quantized(x, stored)
        else:
            shape = (x.shape[-1], self.features)
            kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
            y = self._matmul(x, kernel.astype(self.dtype))
        if self.has_variable("lora", "a"):
            y = y + self._adapter(x)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
            y = y + bias.reshape((1,) * (y.ndim - 1) + (-1,))
        return y

    def _matmul(self, x, kernel):
        path = "/".join((*self.path, "kernel"))
        if is_decoding(x):
            return matmul_weight_stationary(x, kernel, path)
        x, kernel = barrier_after(x, kernel, path)
        return jnp.dot(x, all_gather_weight(kernel, path))

    def _quantized(self, x, kernel: Mapping):
        """Multiplies with a quantized kernel, which is all-gathered in its few bits.

        The backward pass unpacks it again instead of keeping it.
        """
        leaves = {name: self._all_gather(leaf, f"kernel/{name}") for name, leaf in kernel.items()}
        return jax.checkpoint(lambda x, leaves: jnp.dot(x, dequantize(leaves, self.dtype)))(
            x, leaves
        )

    def _adapter(self, x):
        a, b = (
            self._all_gather(self.get_variable("lora", name).astype(self.dtype), name, "lora")
            for name in "ab"
        )
        if self.has_variable("lora", "rate"):
            keep = 1.0 - self.get_variable("lora", "rate")
            is_kept = jax.random.bernoulli(self.make_rng("dropout"), keep, x.shape)
            x = jnp.where(is_kept, x / keep.astype(self.dtype), 0)
        return jnp.dot(jnp.dot(x, a), b)

    def _all_gather(self, leaf, name: str, *prefix: str):
        return all_gather_weight(leaf, "/".join((*prefix, *self.path, name)))


def is_decoding(x: Shaped[Array, "..."]) -> bool:
    """Returns whether x is [B,1,D], one token of each row.

    A kernel is then larger than everything it is multiplied with. All-gathering it would also hoist
    the gathers of all layers out of the loop over tokens.
    """
    return x.ndim == 3 and x.shape[1] == 1
