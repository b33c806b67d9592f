"""Choosing the next token from logits. B rows, V vocabulary."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from internvl3_jax.model.ops.attention import MASKED

# below it the likeliest token is taken: float32 logits divided by less overflow
SMALLEST_TEMPERATURE = 1e-6
NOT_FINITE = -1  # what `sample` gives for a row whose logits are NaN or infinite


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Temperature 0, or below `SMALLEST_TEMPERATURE`, is greedy, the default
    of the reference.
    """

    temperature: float = 0.0
    top_k: int = 0  # only the k likeliest tokens; 0 is all
    top_p: float = 1.0  # only the likeliest tokens that together reach this probability
    # row 0 and every so many rows one is greedy: the first candidate of each question; 0: none
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


def sample(logits, keys, sampling: Sampling):
    """i32[B] from logits f32[B,V] and one key per row, so that a row's draw does not depend on its
    neighbours.

    Temperature, then top_k, then top_p, in the order of transformers' generate. NOT_FINITE for a
    row with a NaN or an infinity above:
    nothing can be drawn from it.
    """
    finite = jnp.isfinite(jnp.max(logits, axis=-1))
    return jnp.where(finite, _drawn(logits, keys, sampling), NOT_FINITE)


def _drawn(logits, keys, sampling: Sampling):
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if sampling.temperature < SMALLEST_TEMPERATURE:
        return greedy
    logits = logits / sampling.temperature
    if sampling.top_k:
        kept = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kept, MASKED, logits)
    if sampling.top_p < 1:
        logits = _nucleus(logits, sampling.top_p)
    drawn = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    if not sampling.greedy_every:
        return drawn
    return jnp.where(jnp.arange(len(drawn)) % sampling.greedy_every == 0, greedy, drawn)


def _nucleus(logits, top_p: float):
    """Masks all but the likeliest tokens up to and including the one that reaches top_p (Holtzman
    et al. 2020).

    Tokens as likely as the last one that is kept are kept too. The likeliest is kept whatever top_p
    is.
    """
    descending = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    threshold = jnp.where(before < top_p, descending, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits >= jnp.minimum(threshold, descending[:, :1]), logits, MASKED)
