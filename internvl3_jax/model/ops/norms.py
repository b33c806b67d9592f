"""LayerNorm and RMSNorm, computed in float32 whatever the compute dtype."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019) over the last axis.

    The parameters are those of `flax.linen.LayerNorm` and `flax.linen.RMSNorm`.

    Attributes:
      centered: LayerNorm, with mean and bias.
      epsilon: Added to the variance.
      dtype: Of the output.
    """

    centered: bool
    epsilon: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        width = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, width).astype(jnp.float32)
        bias = jnp.zeros(width, jnp.float32)
        if self.centered:
            bias = self.param("bias", nn.initializers.zeros, width).astype(jnp.float32)
        return normalize(x, scale, bias, self.centered, self.epsilon, jnp.dtype(self.dtype))


def make_norm(kind: str, epsilon: float, dtype: DTypeLike) -> Norm:
    """Returns a norm layer whose output has `dtype`.

    Args:
      kind: "layer_norm" (scale and bias) or "rms_norm" (scale).

    Raises:
      ValueError: The kind is unknown.
    """
    if kind not in ("layer_norm", "rms_norm"):
        raise ValueError(f"norm {kind!r} is unknown; use layer_norm or rms_norm")
    return Norm(kind == "layer_norm", epsilon, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def normalize(
    x: Float[Array, "*rows D"],
    scale: Float32[Array, " D"],
    bias: Float32[Array, " D"],
    centered: bool,
    epsilon: float,
    dtype: DTypeLike,
) -> Float[Array, "*rows D"]:
    """Returns (x - mean) / sqrt(variance + epsilon) * scale + bias; `centered` False: mean 0.

    The variance takes two passes: the one-pass form cancels in float32. The gradient is written
    out, since that of the formula stores float32 arrays of x's size between its kernels.
    """
    wide = x.astype(jnp.float32)
    mean, rate = _statistics(wide, centered, epsilon)
    rows = (1,) * (x.ndim - 1)
    y = (wide - mean) * (rate * scale.reshape(*rows, -1)) + bias.reshape(*rows, -1)
    return y.astype(dtype)


def _statistics(x, centered: bool, epsilon: float):
    """Returns the mean and 1 / sqrt(variance + epsilon) of each row of x, which is float32."""
    mean = x.mean(axis=-1, keepdims=True) if centered else jnp.zeros((), jnp.float32)
    variance = jnp.square(x - mean).mean(axis=-1, keepdims=True)
    return mean, jax.lax.rsqrt(variance + epsilon)


def _forward(x, scale, bias, centered, epsilon, dtype):
    # The barrier keeps XLA from computing the statistics again in every kernel that needs them:
    # such a kernel could not sum over rows as well.
    statistics = _statistics(x.astype(jnp.float32), centered, epsilon)
    statistics = jax.lax.optimization_barrier(statistics)
    return normalize(x, scale, bias, centered, epsilon, dtype), (x, scale, *statistics)


def _backward(centered, epsilon, dtype, saved, gradient):
    x, scale, mean, rate = saved
    rows = tuple(range(x.ndim - 1))
    normalized = (x.astype(jnp.float32) - mean) * rate
    gradient = gradient.astype(jnp.float32)
    scaled = gradient * scale.reshape((1,) * len(rows) + (-1,))
    along = (scaled * normalized).mean(axis=-1, keepdims=True)
    shift = scaled.mean(axis=-1, keepdims=True) if centered else 0.0
    dx = (rate * (scaled - shift - normalized * along)).astype(x.dtype)
    dbias = gradient.sum(axis=rows) if centered else jnp.zeros_like(scale)
    return dx, (gradient * normalized).sum(axis=rows), dbias


normalize.defvjp(_forward, _backward)
