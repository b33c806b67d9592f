"""Activation functions."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns the exact GELU (Hendrycks and Gimpel 2016), computed in float32, in x's dtype.

    With erf, as torch computes it. `jax.nn.gelu` takes erfc, which XLA computes in a kernel of its
    own on GPUs.
    """
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)
