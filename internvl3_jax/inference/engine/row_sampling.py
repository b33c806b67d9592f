"""Samples one token per row, where each row has its own settings. All settings are traced: no value
of them compiles anything.

B rows, V vocabulary, N = MAX_STOP_IDS.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32, Shaped

from internvl3_jax.inference.engine.request import MAX_STOP_IDS, MAX_TOP_LOGPROBS, Request
from internvl3_jax.inference.sampling import MIN_TEMPERATURE, NOT_FINITE, greedy
from internvl3_jax.model.ops.attention import MASKED

NO_TOKEN = -2  # fills the rows of stop ids


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class RowSettings:
    """The settings of all rows: numpy arrays on the host, of which the engine keeps a device copy.

    Attributes:
      temperature, top_p, min_p, repetition, presence, frequency: f32[B], as of `RowSampling`.
      top_k: i32[B].
      seed: u32[B].
      limit: i32[B], longest answer.
      stop_ids: i32[B,N], filled up with NO_TOKEN.
      is_dynamic: bool[B], whether the rope is stretched beyond the model's positions.
      adapter: i32[B], number of the LoRA adapter; 0 is the base.
      is_live: bool[B], whether the row has a request that is decoded.
      has_bias: bool[B], whether the row's `Histories.bias` applies.
      has_logprobs: bool[B], whether log-probabilities were asked for.
    """

    temperature: Any
    top_p: Any
    min_p: Any
    repetition: Any
    presence: Any
    frequency: Any
    top_k: Any
    seed: Any
    limit: Any
    stop_ids: Any
    is_dynamic: Any
    adapter: Any
    is_live: Any
    has_bias: Any
    has_logprobs: Any

    @classmethod
    def empty(cls, rows: int) -> "RowSettings":
        """Returns settings of rows without requests, as numpy arrays."""
        floats = {
            name: np.full(rows, value, np.float32)
            for name, value in {
                "temperature": 0,
                "top_p": 1,
                "min_p": 0,
                "repetition": 1,
                "presence": 0,
                "frequency": 0,
            }.items()
        }
        flags = ("is_dynamic", "is_live", "has_bias", "has_logprobs")
        return cls(
            **floats,
            **{name: np.zeros(rows, bool) for name in flags},
            top_k=np.zeros(rows, np.int32),
            seed=np.zeros(rows, np.uint32),
            limit=np.zeros(rows, np.int32),
            stop_ids=np.full((rows, MAX_STOP_IDS), NO_TOKEN, np.int32),
            adapter=np.zeros(rows, np.int32),
        )

    def is_plain(self) -> bool:
        """Returns whether every live row is decoded greedily with nothing else asked; on the host."""
        live = self.is_live
        asked = (
            (self.temperature >= MIN_TEMPERATURE)
            | (self.repetition != 1)
            | (self.presence != 0)
            | (self.frequency != 0)
            | self.has_bias
            | self.has_logprobs
        )
        return not (asked & live).any()


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Histories:
    """State that the penalties and biases of rows depend on.

    Attributes:
      in_prompt: bool[B,V], whether the prompt has the token.
      counts: i32[B,V], how often the answer has it.
      bias: f32[B,V], added to the logits; MASKED where a token is not allowed.
    """

    in_prompt: Any
    counts: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Logprobs:
    """Log-probabilities of sampled tokens; zero where no row asked for them.

    Attributes:
      chosen: f32[B].
      top: f32[B,MAX_TOP_LOGPROBS], of the likeliest tokens.
      top_ids: i32[B,MAX_TOP_LOGPROBS].
    """

    chosen: Any
    top: Any
    top_ids: Any


def empty_histories(rows: int, vocabulary: int) -> Histories:
    shape = (rows, vocabulary)
    return Histories(jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32), jnp.zeros(shape))


def sample_rows(
    logits: Float[Array, "B V"],
    keys: Shaped[Array, " B"],
    settings: RowSettings,
    histories: Histories,
) -> tuple[Int32[Array, " B"], Logprobs]:
    """Samples a token per row: penalties, bias, temperature, top_k, top_p and min_p apply in this
    order, which is that of transformers' generate and of vLLM.

    What no live row asks for is not computed.

    Returns:
      (token ids; NOT_FINITE for a row with NaN or positive infinity among its logits,
      log-probabilities of the model's own distribution)
    """
    finite = jnp.isfinite(jnp.max(logits, axis=-1))
    live = settings.is_live
    # 1) Penalties and biases.
    is_penalized = _is_penalized(settings) & live
    changed = _if_any(is_penalized, lambda: penalized(logits, settings, histories), lambda: logits)
    has_bias = settings.has_bias & live
    changed = _if_any(
        has_bias,
        lambda: jnp.where(has_bias[:, None], changed + histories.bias, changed),
        lambda: changed,
    )
    likeliest = greedy(changed)
    # 2) Sampling.
    is_sampled = (settings.temperature >= MIN_TEMPERATURE) & live
    sampled = _if_any(is_sampled, lambda: _sampled(changed, keys, settings), lambda: likeliest)
    token = jnp.where(finite, jnp.where(is_sampled, sampled, likeliest), NOT_FINITE)
    # 3) Log-probabilities.
    rows = len(logits)
    none = Logprobs(
        jnp.zeros(rows),
        jnp.zeros((rows, MAX_TOP_LOGPROBS)),
        jnp.zeros((rows, MAX_TOP_LOGPROBS), jnp.int32),
    )
    logprobs = _if_any(settings.has_logprobs & live, lambda: _logprobs(logits, token), lambda: none)
    return token, logprobs


def penalized(
    logits: Float[Array, "B V"], settings: RowSettings, histories: Histories
) -> Float[Array, "B V"]:
    """Applies the repetition, presence and frequency penalties of each row."""
    counts = histories.counts
    repetition = settings.repetition[:, None]
    scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(histories.in_prompt | (counts > 0), scaled, logits)
    presence = settings.presence[:, None] * (counts > 0)
    return logits - presence - settings.frequency[:, None] * counts


def _is_penalized(settings: RowSettings) -> Bool[Array, " B"]:
    return (settings.repetition != 1) | (settings.presence != 0) | (settings.frequency != 0)


def _sampled(logits, keys, settings: RowSettings) -> Int32[Array, " B"]:
    temperature = jnp.maximum(settings.temperature, MIN_TEMPERATURE)
    logits = logits / temperature[:, None]
    cut = ((settings.top_k > 0) | (settings.top_p < 1)) & settings.is_live
    logits = _if_any(
        cut,
        lambda: jnp.where(cut[:, None], _nucleus(logits, settings), logits),
        lambda: logits,
    )
    # A token of probability min_p times the highest one has its logit plus log(min_p).
    least = logits.max(axis=-1) + jnp.log(settings.min_p)
    logits = jnp.where(logits < least[:, None], MASKED, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _nucleus(logits: Float32[Array, "B V"], settings: RowSettings) -> Float32[Array, "B V"]:
    """Masks the tokens outside of top_k, then those outside of top_p (Holtzman et al. 2020).

    Tokens that tie with the last one that is kept are kept too. The likeliest is always kept.
    """
    size = logits.shape[-1]
    descending = -jnp.sort(-logits, axis=-1)
    last = jnp.where(settings.top_k > 0, jnp.minimum(settings.top_k, size), size) - 1
    kept = jnp.take_along_axis(descending, last[:, None], axis=-1)
    logits = jnp.where(logits < kept, MASKED, logits)
    descending = jnp.where(descending < kept, MASKED, descending)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    is_kept = before < settings.top_p[:, None]
    threshold = jnp.where(is_kept, descending, jnp.inf).min(axis=-1, keepdims=True)
    threshold = jnp.minimum(threshold, descending[:, :1])
    # Rounding of the sums must not cut a row that keeps all tokens.
    threshold = jnp.where(settings.top_p[:, None] < 1, threshold, MASKED)
    return jnp.where(logits >= threshold, logits, MASKED)


def _logprobs(logits: Float32[Array, "B V"], token: Int32[Array, " B"]) -> Logprobs:
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, jnp.maximum(token, 0)[:, None], axis=-1)[:, 0]
    count = min(MAX_TOP_LOGPROBS, logits.shape[-1])
    top, top_ids = jax.lax.top_k(logprobs, count)
    pad = ((0, 0), (0, MAX_TOP_LOGPROBS - count))
    return Logprobs(
        chosen, jnp.pad(top, pad, constant_values=MASKED), jnp.pad(top_ids, pad).astype(jnp.int32)
    )


def _if_any(rows: Bool[Array, " B"], then, otherwise):
    return jax.lax.cond(rows.any(), then, otherwise)


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
