"""A linear layer whose matrix may be split over the devices (sharding.py)."""

import flax.linen as nn
import jax.numpy as jnp

from internvl3_jax.sharding import gathered, product_in_place


class Dense(nn.Module):
    """As `flax.linen.Dense`, with the same parameters; a matrix that is split by its width is gathered in the compute dtype, where it
    is used, and its gradient is summed to where it is stored."""

    features: int
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        """[..., in] -> [..., features] in `dtype`"""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        x, kernel, path = x.astype(self.dtype), kernel.astype(self.dtype), "/".join((*self.path, "kernel"))
        y = product_in_place(x, kernel, path) if is_decoding(x) else jnp.dot(x, gathered(kernel, path))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
            y = y + bias.reshape((1,) * (y.ndim - 1) + (-1,))
        return y


def is_decoding(x) -> bool:
    """Whether [B,T,D] is one token of each row. A matrix is then larger than all that it is multiplied with; and gathered, it would be
    gathered before the loop over tokens, all layers at once."""
    return x.ndim == 3 and x.shape[1] == 1
