"""LayerNorm and RMSNorm, computed in float32 whatever the compute dtype."""

import flax.linen as nn


def make_norm(kind: str, epsilon: float, dtype) -> nn.Module:
    """`kind` is "layer_norm" (scale and bias) or "rms_norm" (scale). Two-pass variance: the
    one-pass form cancels in float32.
    """
    if kind == "layer_norm":
        return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False)
    if kind == "rms_norm":
        return nn.RMSNorm(epsilon=epsilon, dtype=dtype)
    raise ValueError(f"norm {kind!r} is neither layer_norm nor rms_norm")
