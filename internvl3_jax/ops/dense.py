"""A linear layer whose matrix may be split over the devices (sharding.py)."""

import flax.linen as nn
import jax.numpy as jnp

from internvl3_jax.sharding import gathered


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
        kernel = gathered(kernel.astype(self.dtype), "/".join((*self.path, "kernel")))
        y = jnp.dot(x.astype(self.dtype), kernel)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
            y = y + bias.reshape((1,) * (y.ndim - 1) + (-1,))
        return y
