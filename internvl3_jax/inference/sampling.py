"""Samples the next token from logits. B rows, V vocabulary."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, Shaped

from internvl3_jax.model.ops.attention import MASKED

# Below this, decoding is greedy: float32 logits divided by less overflow.
MIN_TEMPERATURE = 1e-6
NOT_FINITE = -1  # returned by `sample` for a row whose logits are NaN or infinite


class NotFiniteError(ValueError):
    """The model gives NaN or infinite logits, from which no token can be sampled."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings by which tokens are sampled.

    Attributes:
      temperature: 0, or below `MIN_TEMPERATURE`, is greedy decoding, as by default in InternVL's
        code.
      top_k: sample from the k likeliest tokens; 0 is all.
      top_p: sample from the likeliest tokens that together reach this probability.
      greedy_every: every n-th row (0, n, 2n, ...) is decoded greedily; 0 disables.

    Raises:
      ValueError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    greedy_every: int = 0

    def __post_init__(self):
        checks = [
            (0 <= self.temperature < math.inf, "temperature", "0 (greedy) or above, and finite"),
            (self.top_k >= 0, "top_k", "0 (all tokens) or above"),
            (0 < self.top_p <= 1, "top_p", "above 0 and at most 1"),
            (self.greedy_every >= 0, "greedy_every", "0 (no row) or above"),
        ]
        for holds, field, rule in checks:
            if not holds:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be {rule}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE


def sample(
    logits: Float[Array, "B V"], keys: Shaped[Array, " B"], sampling: Sampling
) -> Int32[Array, " B"]:
    """Samples a token per row. Each row has its own key, so that it does not depend on the others.

    Temperature, then top_k, then top_p apply, in the order of transformers' generate.

    Returns:
      token ids; NOT_FINITE for a row with NaN or positive infinity among its logits
    """
    if sampling.is_greedy:
        return greedy(logits)
    finite = jnp.isfinite(jnp.max(logits, axis=-1))
    return jnp.where(finite, _sampled(logits, keys, sampling), NOT_FINITE)


def greedy(logits: Float[Array, "*rows V"]) -> Int32[Array, "*rows"]:
    """Returns the likeliest token of each row; NOT_FINITE as `sample` does."""
    finite = jnp.isfinite(jnp.max(logits, axis=-1))
    return jnp.where(finite, jnp.argmax(logits, axis=-1).astype(jnp.int32), NOT_FINITE)


def _sampled(logits, keys, sampling: Sampling):
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k:
        kept = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kept, MASKED, logits)
    if sampling.top_p < 1:
        logits = _nucleus(logits, sampling.top_p)
    sampled = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    if not sampling.greedy_every:
        return sampled
    return jnp.where(jnp.arange(len(sampled)) % sampling.greedy_every == 0, likeliest, sampled)


def _nucleus(logits, top_p: float):
    """Masks all but the likeliest tokens up to and including the one that reaches top_p (Holtzman
    et al. 2020).

    Tokens that tie with the last one that is kept are kept too. The likeliest is always kept.
    """
    descending = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    threshold = jnp.where(before < top_p, descending, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits >= jnp.minimum(threshold, descending[:, :1]), logits, MASKED)


def check_finite(tokens: Int[np.ndarray, "B n"], first: int) -> None:
    """Raises NotFiniteError for NOT_FINITE among sampled tokens. first: number of the first one."""
    _, columns = np.nonzero(tokens == NOT_FINITE)
    if len(columns):
        raise NotFiniteError(
            f"the model gives NaN or infinite logits for token {first + columns.min()} of an "
            "answer; its weights are damaged, or the dtype of the computation (float16?) is too "
            "narrow for it: try float32"
        )
