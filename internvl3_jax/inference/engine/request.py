"""Requests to the engine, and the pieces of answers that it returns."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Bool

from internvl3_jax.data.batch import Prompt

MAX_STOP_IDS = 16  # of a request, the model's own included
MAX_TOP_LOGPROBS = 20


class QueueFullError(RuntimeError):
    """The engine has as many waiting requests as it takes."""


class TokenConstraint(Protocol):
    """Which tokens may come next, for example by a grammar. Belongs to one request."""

    def allowed(self) -> Bool[np.ndarray, " V"]:
        """Returns which ids may come next; the end token must be among them where it may end."""

    def accept(self, token: int) -> None:
        """Takes the token that was sampled."""


@dataclasses.dataclass(frozen=True)
class RowSampling:
    """Settings by which the tokens of one request are sampled. All of it is traced: no value
    compiles anything.

    Attributes:
      temperature: 0 is greedy decoding.
      top_k: sample from the k likeliest tokens; 0 is all.
      top_p: sample from the likeliest tokens that together reach this probability.
      min_p: leave out tokens that are less likely than min_p times the likeliest one.
      repetition_penalty: divides positive logits of tokens that the prompt or the answer has, and
        multiplies negative ones (Keskar et al. 2019); 1 is none.
      presence_penalty: subtracted from the logits of tokens that the answer has, as OpenAI does.
      frequency_penalty: the same, times how often the answer has the token.
      logit_bias: added to the logits of these ids.
      seed: of the sampling, below 2**32.

    Raises:
      ValueError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int = 0

    def __post_init__(self):
        checks = [
            (0 <= self.temperature < math.inf, "temperature", "0 (greedy) or above, and finite"),
            (0 <= self.top_k < 2**31, "top_k", "0 (all tokens) or above"),
            (0 < self.top_p <= 1, "top_p", "above 0 and at most 1"),
            (0 <= self.min_p <= 1, "min_p", "at least 0 and at most 1"),
            (0 < self.repetition_penalty < math.inf, "repetition_penalty", "above 0 and finite"),
            (-2 <= self.presence_penalty <= 2, "presence_penalty", "from -2 to 2"),
            (-2 <= self.frequency_penalty <= 2, "frequency_penalty", "from -2 to 2"),
            (0 <= self.seed < 2**32, "seed", "at least 0 and below 2**32"),
        ]
        for holds, field, rule in checks:
            if not holds:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be {rule}")
        for token, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:
                raise ValueError(
                    f"logit_bias of token {token} is {bias}; it must be from -100 to 100"
                )


@dataclasses.dataclass(frozen=True)
class Request:
    """One answer to one prompt.

    Attributes:
      prompt: token ids, positions and tiles; its V2PE delta is in the positions.
      sampling: how tokens are sampled.
      max_new_tokens: longest answer.
      stop_ids: ids that end the answer, at most MAX_STOP_IDS.
      scaling: rope scaling, of `positions.rope_scaling`.
      adapter: name of a loaded LoRA adapter; None is the base.
      top_logprobs: None: no log-probabilities; else those of the sampled token and of as many of
        the likeliest ones, at most MAX_TOP_LOGPROBS.
      constraint: which tokens may come next.
      flash: "auto": the model's router decides which tiles are compressed; "off": none are. None:
        "auto" where the model has a router.
    """

    prompt: Prompt
    sampling: RowSampling = RowSampling()
    max_new_tokens: int = 1024
    stop_ids: tuple[int, ...] = ()
    scaling: str = "none"
    adapter: str | None = None
    top_logprobs: int | None = None
    constraint: TokenConstraint | None = None
    flash: str | None = None


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """Log-probabilities of one token, of the model's own distribution (before any setting).

    Attributes:
      logprob: of the sampled token.
      top: (id, log-probability) of the likeliest tokens, the likeliest first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Piece:
    """The next tokens of an answer.

    Attributes:
      ids: new token ids; the stop id is the last one if it was sampled.
      logprobs: of each id, if they were asked for.
      finish: None before the end; "stop", "length", "cancelled" or "error".
      error: of "error": what happened to this request.
    """

    ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprob] = ()
    finish: str | None = None
    error: Exception | None = None


@dataclasses.dataclass(eq=False)
class Ticket:
    """A request in the engine.

    Attributes:
      request: what was asked. Once the router has decided, its prompt has the tokens that are run.
      on_piece: called with each `Piece` from the thread that calls `Engine.step`; it must be quick.
      reused_tokens: tokens of the prompt that the cache had already; set before the first piece.
      digests: hashes of the tiles of the prompt's images.
      ids: all ids so far.
      finish, error: of the last piece.
      awaits_routing: the router has yet to decide about the tiles.
    """

    request: Request
    on_piece: Callable[[Piece], None]
    reused_tokens: int = 0
    digests: list[bytes] = dataclasses.field(default_factory=list)
    ids: list[int] = dataclasses.field(default_factory=list)
    finish: str | None = None
    error: Exception | None = None
    awaits_routing: bool = False
