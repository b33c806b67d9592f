"""LayerNorm and RMSNorm, computed in float32 whatever the compute dtype."""

import flax.linen as nn
from jax.typing import DTypeLike


def make_norm(kind: str, epsilon: float, dtype: DTypeLike) -> nn.Module:
    """Returns a norm layer whose output has `dtype`.

    The variance takes two passes: the one-pass form cancels in float32.

    Args:
      kind: "layer_norm" (scale and bias) or "rms_norm" (scale).

    Raises:
      ValueError: The kind is unknown.
    """
    if kind == "layer_norm":
        return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False)
    if kind == "rms_norm":
        return nn.RMSNorm(epsilon=epsilon, dtype=dtype)
    raise ValueError(f"norm {kind!r} is unknown; use layer_norm or rms_norm")
