"""The output head: its kernel, and logits."""

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from internvl3_jax.model.ops.linear import as_two_rows, decoding_dot, is_decoding
from internvl3_jax.model.ops.quantize import is_quantized, scale_columns, split_scales
from internvl3_jax.parallel.collectives import constrain
from internvl3_jax.parallel.sharding import SHARDED_AXES


class Head(nn.Module):
    """Holds the output kernel [D,V]; a chunked loss takes the kernel itself."""

    width: int
    features: int

    @nn.compact
    def __call__(self) -> Float[Array, "D V"] | Mapping[str, Array]:
        # A quantized kernel is a subtree, which `self.param` would not accept.
        if self.has_variable("params", "kernel"):
            if is_quantized(stored := self.get_variable("params", "kernel")):
                return stored
        return self.param("kernel", nn.initializers.lecun_normal(), (self.width, self.features))


def head_logits(
    hidden: Float[Array, "B T D"],
    stored: Float[Array, "D V"] | Mapping[str, Array],
    dtype: DTypeLike,
) -> Float32[Array, "B T V"]:
    """Returns hidden times the kernel as it is stored, computed in `dtype` and summed in float32."""
    kernel, scales = split_scales(stored)

    def head(hidden, kernel):
        return jnp.dot(hidden, kernel.astype(dtype), preferred_element_type=jnp.float32)

    if is_decoding(hidden):
        # Weight-stationary, as in ops/linear.py.
        hidden = constrain(hidden, ("slice", "data"), None, SHARDED_AXES)
        product = as_two_rows if scales is None else decoding_dot
        logits = product(head, hidden, kernel)
    else:
        logits = head(hidden, kernel)
    return logits if scales is None else scale_columns(logits, scales)
