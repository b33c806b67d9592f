"""Prompt lookup decoding: speculation without a draft model (Saxena 2023; Leviathan et al. 2023).

Answers about documents repeat what they read. The last tokens are looked up earlier in the prompt
and the answer, and what followed them there is guessed to follow again. The model checks all
guesses in one run, which costs little more than one token, since decoding waits for the weights.
Accepted are those that it would have sampled itself, so greedy answers stay the same, up to
rounding.

B rows, S cache slots, G guesses, W = G + 1 tokens per run, V vocabulary.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from internvl3_jax.config import UNITS, ModelConfig
from internvl3_jax.data.batch import Prompt
from internvl3_jax.inference import programs
from internvl3_jax.inference.generation_config import GenerationConfig
from internvl3_jax.inference.programs import DecodeState
from internvl3_jax.inference.sampling import check_finite, greedy
from internvl3_jax.model import lora
from internvl3_jax.model.internvl import InternVL
from internvl3_jax.parallel.collectives import constrain

GUESSES = 7  # with the last token they are the 8 rows that a GPU's products take at once
RUNS_PER_CALL = 4  # before the host looks at the tokens
_LENGTHS = (3, 2)  # of the tokens that are looked up, the first that is found


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Lookup:
    """State that prompt lookup adds to a `DecodeState`.

    Attributes:
      history: i32[B,S], the token of each slot, with the sampled one that has not been run.
      num_runs: i32[B], runs of the model that gave the row tokens, after the prompt.
    """

    history: Any
    num_runs: Any


def is_exact(
    model: ModelConfig, position: Int32[np.ndarray, " B"], config: GenerationConfig
) -> bool:
    """Returns whether guesses leave the answer as it is.

    Beyond the trained length dynamic rope depends on the furthest position of a run, be it a guess.

    Args:
      position: of the first new token, in units of 1/256.
    """
    end = int(position.max()) // UNITS + config.max_new_tokens + GUESSES
    return config.scaling != "dynamic" or end <= model.language.max_position


def start(prompts: Sequence[Prompt], copies: int, slots: int, token: Int32[Array, " R"]) -> Lookup:
    """Returns the lookup after prompts of `copies` rows each; token: the first of each row."""
    history = np.zeros((len(prompts), slots), np.int32)
    for row, prompt in enumerate(prompts):
        history[row, : len(prompt.tokens)] = prompt.tokens
    history = np.repeat(history, copies, axis=0)
    lengths = np.repeat([len(prompt.tokens) for prompt in prompts], copies)
    with_token = jnp.asarray(history).at[np.arange(len(history)), lengths].set(token)
    return Lookup(with_token, jnp.zeros(len(history), jnp.int32))


def stream(
    run: Callable,
    stopped: Bool[np.ndarray, " B"],
    config: GenerationConfig,
    stop_ids: Sequence[int],
    calls_ahead: int,
) -> Iterator[list[list[int]]]:
    """Yields the new ids of each row, as many as a call gave it, until all have ended.

    Args:
      run: starts a call of `decode`; returns its tokens and counts.
      stopped: rows that had ended before.
      calls_ahead: calls that run while the results of one are read.
    """
    sampled, queue = np.ones(len(stopped), np.int32), collections.deque()
    while not (stopped | (sampled >= config.max_new_tokens)).all():
        while len(queue) <= calls_ahead:
            queue.append(run())
        tokens, counts = map(np.asarray, queue.popleft())
        rows = [row[:count] for row, count in zip(tokens, counts, strict=True)]
        for row, before in zip(rows, sampled, strict=True):
            check_finite(row[None], int(before) + 1)
        yield [row.tolist() for row in rows]
        sampled = sampled + counts
        stopped = stopped | [bool(np.isin(row, stop_ids).any()) for row in rows]


def guess(history: Int32[Array, "B S"], lengths: Int32[Array, " B"]) -> Int32[Array, "B G"]:
    """Returns what followed the latest earlier occurrence of each row's last tokens.

    A row without one gets tokens that mean nothing.

    Args:
      lengths: of the rows; what is after them in `history` is ignored.
    """
    slots = jnp.arange(history.shape[1])[None]
    found = jnp.zeros(len(history), jnp.int32)  # where the guesses begin; 0: not found yet
    for count in _LENGTHS:
        # [B,S]: whether the last `count` tokens are at this slot too.
        matches = slots < (lengths - count)[:, None]
        for offset in range(count):
            last = jnp.take_along_axis(history, (lengths - count + offset)[:, None], axis=1)
            matches &= jnp.roll(history, -offset, axis=1) == last
        latest = jnp.where(matches, slots + count, 0).max(axis=1)
        found = jnp.where(found > 0, found, latest)
    places = found[:, None] + jnp.arange(GUESSES)[None]
    return jnp.take_along_axis(history, places, axis=1, mode="clip")


@functools.partial(jax.jit, static_argnums=(0, 4, 5), donate_argnums=2)
def decode(
    model: InternVL,
    params: dict,
    state: DecodeState,
    limit: Int32[Array, ""] | int,
    stop_ids: tuple[int, ...],
    scaling: str,
) -> tuple[Int32[Array, "B n"], Int32[Array, " B"], DecodeState]:
    """Decodes greedily in RUNS_PER_CALL runs of the model, without the host.

    On a CPU it ends when every row is done. A row is done with a stop token or `limit` tokens.

    Returns:
      (tokens i32[B,RUNS_PER_CALL*W], how many of each row are valid, the new state)
    """
    variables = lora.variables(params)
    width = GUESSES + 1
    ahead = jnp.arange(width, dtype=jnp.int32)[None]

    def run(tokens, counts, state):
        # Run the last token and the guesses.
        guesses = guess(state.lookup.history, state.slot + 1)
        inputs = jnp.concatenate([state.token[:, None], guesses], axis=1)
        positions, slots = state.position[:, None] + UNITS * ahead, state.slot[:, None] + ahead
        hidden, cache = model.apply(
            variables, inputs, None, positions, slots, state.cache, scaling, method=InternVL.step
        )
        sampled = greedy(model.apply(variables, hidden, method=InternVL.logits))

        # Take what the model samples up to the first wrong guess, stop token, or the limit.
        right = jnp.cumprod(guesses == sampled[:, :-1], axis=1).sum(axis=1)
        stops = programs.is_stop(sampled.reshape(-1), stop_ids).reshape(sampled.shape)
        first_stop = jnp.where(stops.any(axis=1), stops.argmax(axis=1), width)
        number = jnp.minimum(1 + jnp.minimum(right, first_stop), limit - state.num_sampled)
        number = jnp.where(state.done, 0, number).astype(jnp.int32)
        last = jnp.take_along_axis(sampled, jnp.maximum(number - 1, 0)[:, None], axis=1)[:, 0]
        token = jnp.where(number > 0, last, state.token)
        num_sampled = state.num_sampled + number
        lookup = Lookup(
            _append(state.lookup.history, sampled, state.slot + 1, number),
            state.lookup.num_runs + (number > 0),
        )
        done = state.done | programs.is_stop(token, stop_ids) | (num_sampled >= limit)
        position = state.position + UNITS * number
        new = DecodeState(cache, token, position, state.slot + number, num_sampled, done, lookup)
        return _append(tokens, sampled, counts, number), counts + number, new

    rows = state.token.shape[0]
    loop = jnp.zeros((rows, RUNS_PER_CALL * width), jnp.int32), jnp.zeros(rows, jnp.int32), state
    if programs.on_cpu():
        _, (tokens, counts, state) = jax.lax.while_loop(
            lambda carry: (carry[0] < RUNS_PER_CALL) & ~carry[1][2].done.all(),
            lambda carry: (carry[0] + 1, run(*carry[1])),
            (0, loop),
        )
    else:
        tokens, counts, state = jax.lax.fori_loop(
            0, RUNS_PER_CALL, lambda _, loop: run(*loop), loop
        )
    state = dataclasses.replace(state, done=constrain(state.done, None))
    return constrain(tokens, None, None), constrain(counts, None), state


def _append(
    target: Int32[Array, "B n"],
    new: Int32[Array, "B W"],
    start: Int32[Array, " B"],
    number: Int32[Array, " B"],
) -> Int32[Array, "B n"]:
    """Writes the first `number` of each row's new tokens from `start` on."""
    index = jnp.arange(new.shape[1])[None]
    columns = jnp.where(index < number[:, None], start[:, None] + index, target.shape[1])
    rows = jnp.arange(len(target))[:, None]
    return target.at[rows, columns].set(new, mode="drop")
