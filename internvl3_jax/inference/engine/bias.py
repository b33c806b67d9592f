"""Biases of a row's logits: those of the request, and a mask of allowed tokens."""

import numpy as np
from jaxtyping import Float

from internvl3_jax.inference.engine.request import Request
from internvl3_jax.model.ops.attention import MASKED


def bias_of(request: Request, vocabulary: int) -> Float[np.ndarray, " V"] | None:
    """Returns what is added to the logits of the next token; None if that is nothing.

    Raises:
      ValueError: the constraint allows no token.
    """
    if not request.sampling.logit_bias and request.constraint is None:
        return None
    bias = np.zeros(vocabulary, np.float32)
    for token, value in request.sampling.logit_bias.items():
        bias[token] = value
    if request.constraint is not None:
        allowed = np.asarray(request.constraint.allowed(), bool)
        if not allowed.any():
            raise ValueError("the constraint allows no token after those that were sampled")
        bias[: len(allowed)][~allowed[:vocabulary]] = MASKED
        bias[len(allowed) :] = MASKED
    return bias
