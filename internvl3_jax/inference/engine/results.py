"""Turns what a block returned for a row into the next piece of its answer."""

from collections.abc import Sequence

import numpy as np

from internvl3_jax.inference.engine.request import Piece, Ticket, TokenLogprob
from internvl3_jax.inference.sampling import NOT_FINITE, NotFiniteError, check_finite


def new_tokens(
    ticket: Ticket, tokens: Sequence[int], logprobs: Sequence[np.ndarray] | None
) -> Piece:
    """Returns the tokens of a block up to the end of the answer.

    Args:
      logprobs: of the sampled tokens f32[n], of the likeliest ones f32[n,k], and these i32[n,k].
    """
    request = ticket.request
    ids, finish, error = [], None, None
    for token in tokens:
        number = len(ticket.ids) + len(ids) + 1
        if token == NOT_FINITE:
            finish, error = "error", _not_finite(number)
            break
        ids.append(token)
        if token in request.stop_ids:
            finish = "stop"
        elif number >= request.max_new_tokens:
            finish = "length"
        if finish is not None:
            break
    asked = request.top_logprobs
    values = () if asked is None else _logprobs(len(ids), asked, logprobs)
    return Piece(ids, values, finish, error)


def _not_finite(number: int) -> NotFiniteError:
    try:
        check_finite(np.asarray([[NOT_FINITE]]), number)
    except NotFiniteError as error:
        return error
    raise AssertionError


def _logprobs(count: int, asked: int, logprobs: Sequence[np.ndarray]) -> list[TokenLogprob]:
    chosen, top, top_ids = logprobs
    return [
        TokenLogprob(
            float(chosen[index]),
            tuple(zip(top_ids[index, :asked].tolist(), top[index, :asked].tolist(), strict=True)),
        )
        for index in range(count)
    ]
