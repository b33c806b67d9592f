"""The compiled programs of the rows: the first token of one, and blocks of tokens of all.

B rows, S cache slots, D decoder width, V vocabulary, n tokens of a block.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Shaped

from internvl3_jax.config import UNITS
from internvl3_jax.inference.engine.prompt_programs import adapted
from internvl3_jax.inference.engine.request import MAX_TOP_LOGPROBS
from internvl3_jax.inference.engine.row_sampling import (
    Histories,
    Logprobs,
    RowSettings,
    empty_histories,
    sample_rows,
)
from internvl3_jax.inference.programs import on_cpu
from internvl3_jax.inference.sampling import NOT_FINITE, greedy
from internvl3_jax.model import kv_cache, lora
from internvl3_jax.model.internvl import InternVL
from internvl3_jax.parallel.collectives import constrain

BLOCK = 16  # tokens that a row decodes before the host looks at them


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class RowState:
    """State of the rows, carried from token to token.

    Attributes:
      token: i32[B], sampled and not yet run.
      position: i32[B] of that token, in units of 1/256.
      slot: i32[B], where its keys and values go.
      num_sampled: i32[B], tokens sampled so far; the random keys are numbered by it.
      done: bool[B], whether the row's answer has ended.
      histories: of the rows.
    """

    token: Any
    position: Any
    slot: Any
    num_sampled: Any
    done: Any
    histories: Histories


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    """The tokens of one block, and their log-probabilities.

    Attributes:
      tokens: i32[B,n].
      chosen: f32[B,n]; top f32[B,n,20]; top_ids i32[B,n,20]: as of `Logprobs`.
      count: i32[], tokens of each row that were decoded, at most n.
    """

    tokens: Any
    chosen: Any
    top: Any
    top_ids: Any
    count: Any


def rope_lengths(
    settings: RowSettings, highest: Int32[Array, " B"], has_scaling: bool
) -> Int32[Array, " B"] | str:
    """Returns the `scaling` of ops/rope.py. highest: position of each row, in units of 1/256."""
    return jnp.where(settings.is_dynamic, highest, 0) if has_scaling else "none"


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def start_row(
    model: InternVL,
    params: dict,
    state: RowState,
    settings: RowSettings,
    hidden: Float[Array, "1 1 D"],
    scalars: dict[str, Int32[Array, ""]],
    in_prompt: Bool[Array, " V"],
    bias: Float[Array, " V"],
) -> tuple[Block, RowState]:
    """Samples the first token of a row's answer.

    Args:
      hidden: the decoder's output at the last token of the prompt.
      scalars: `row`; `position` and `slot` of the first token.
      in_prompt: which tokens the prompt has.
      bias: of the first token.

    Returns:
      (the token as a block of one row and token, the new state)
    """
    row = scalars["row"]
    logits = model.apply(lora.variables(params), hidden, method=InternVL.logits)[:, 0]

    def of_row(x):
        return jax.lax.dynamic_slice_in_dim(x, row, 1, axis=0)

    own = jax.tree.map(of_row, settings)
    own = dataclasses.replace(own, is_live=jnp.ones_like(own.is_live))
    history = Histories(in_prompt[None], jnp.zeros_like(in_prompt, jnp.int32)[None], bias[None])
    keys = row_keys(own.seed, jnp.zeros(1, jnp.int32))
    token, logprobs = sample_rows(logits, keys, own, history)
    history.counts = _counted(history.counts, token, jnp.ones(1, bool))
    new = RowState(
        token,
        scalars["position"][None],
        scalars["slot"][None],
        jnp.ones(1, jnp.int32),
        _ends(token, jnp.ones(1, jnp.int32), own),
        history,
    )

    def write(x, y):
        return jax.lax.dynamic_update_slice(x, y.astype(x.dtype), (row, *(0,) * (x.ndim - 1)))

    block = Block(
        token[:, None],
        logprobs.chosen[:, None],
        logprobs.top[:, None],
        logprobs.top_ids[:, None],
        jnp.int32(1),
    )
    return _replicated(block), jax.tree.map(write, state, new)


@functools.partial(jax.jit, donate_argnums=0)
def set_bias(
    bias: Float[Array, "B V"], row: Int32[Array, ""], values: Float[Array, " V"]
) -> Float[Array, "B V"]:
    """Replaces the bias of a row."""
    return jax.lax.dynamic_update_slice(bias, values[None], (row, 0))


# --- blocks ---------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4, 5))
def decode_block(
    model: InternVL,
    is_plain: bool,
    num_read: int,
    params: dict,
    state: RowState,
    cache: kv_cache.Cache,
    settings: RowSettings,
    count: Int32[Array, ""],
    until_free: Bool[Array, ""],
) -> tuple[Block, RowState, kv_cache.Cache]:
    """Decodes up to BLOCK tokens of every live row without the host.

    Args:
      is_plain: all live rows are decoded greedily with nothing else asked. On an accelerator the
        loop then has a fixed trip count, which needs no synchronization with the host.
      num_read: slots that the block reads; no live row has more at its end.
      count: how many tokens, at most BLOCK. The fixed loop always runs BLOCK times.
      until_free: end once a row's answer has ended, except in the fixed loop.

    Returns:
      (the tokens; those after a row's last one repeat it, the new state, the cache)
    """
    variables = adapted(params, settings.adapter)
    has_scaling = model.config.language.rope_scaling != "none"
    rows = state.token.shape[0]
    # A row that is not live writes into its first slot, which is restored at the end.
    live = settings.is_live
    state = dataclasses.replace(
        state,
        token=jnp.where(live, state.token, 0),
        slot=jnp.where(live, state.slot, 0),
        done=state.done | ~live,
    )

    def step(index, block, state, cache):
        # 1) Run the last token.
        hidden, cache = model.apply(
            variables,
            state.token[:, None],
            None,
            state.position[:, None],
            state.slot[:, None],
            cache,
            rope_lengths(settings, state.position, has_scaling),
            method=InternVL.step,
        )
        logits = model.apply(variables, hidden, method=InternVL.logits)[:, 0]
        # 2) Sample the next one.
        histories = state.histories
        if is_plain:
            sampled = greedy(logits)
        else:
            active = dataclasses.replace(settings, is_live=settings.is_live & ~state.done)
            keys = row_keys(settings.seed, state.num_sampled)
            sampled, logprobs = sample_rows(logits, keys, active, histories)
            histories = dataclasses.replace(
                histories, counts=_counted(histories.counts, sampled, ~state.done)
            )
            block = _with_logprobs(block, index, logprobs)
        # 3) A finished row repeats its last token in one slot.
        token = jnp.where(state.done, state.token, sampled)
        advance = jnp.where(state.done, 0, 1)
        num_sampled = state.num_sampled + advance
        state = RowState(
            token=token,
            position=state.position + UNITS * advance,
            slot=state.slot + advance,
            num_sampled=num_sampled,
            done=state.done | _ends(token, num_sampled, settings),
            histories=histories,
        )
        block = dataclasses.replace(block, tokens=block.tokens.at[:, index].set(token))
        return block, state, cache

    # The block works on the slots that it reads: copied once, not in each step.
    whole, cache = cache, jax.tree.map(lambda x: x[:, :, :num_read], cache)
    # The barrier makes them now: read after the loop they would keep a copy of the whole cache.
    cache, first_slots = jax.lax.optimization_barrier(
        (cache, jax.tree.map(lambda x: x[:, :, :1], cache))
    )
    block = empty_block(rows)
    if is_plain and not on_cpu():
        loop = jax.lax.fori_loop(
            0, BLOCK, lambda index, loop: step(index, *loop), (block, state, cache)
        )
    else:
        was_done = state.done

        def is_on(loop):
            done = loop[2].done
            is_free = (done & ~was_done).any()
            return (loop[0] < count) & ~done.all() & ~(until_free & is_free)

        count, *loop = jax.lax.while_loop(
            is_on, lambda loop: (loop[0] + 1, *step(*loop)), (0, block, state, cache)
        )
    block, state, cache = loop
    block = dataclasses.replace(block, count=jnp.int32(count))

    def restore(whole, part, first):
        own = live.reshape((-1,) + (1,) * (part.ndim - 1))
        part = part.at[:, :, :1].set(jnp.where(own, part[:, :, :1], first))
        if part.shape == whole.shape:  # then the loop has worked in place
            return part
        return jax.lax.dynamic_update_slice(whole, part, (0,) * whole.ndim)

    cache = jax.tree.map(restore, whole, cache, first_slots)
    return _replicated(block), state, cache


def empty_block(rows: int) -> Block:
    """Returns a block of zeros."""
    top = (rows, BLOCK, MAX_TOP_LOGPROBS)
    return Block(
        jnp.zeros((rows, BLOCK), jnp.int32),
        jnp.zeros((rows, BLOCK)),
        jnp.zeros(top),
        jnp.zeros(top, jnp.int32),
        jnp.int32(0),
    )


def row_keys(seeds, numbers: Int32[Array, " B"]) -> Shaped[Array, " B"]:
    """Returns the random key of each row's next token: that of its seed, numbered."""
    return jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.key)(seeds), numbers)


def _with_logprobs(block: Block, index, logprobs: Logprobs) -> Block:
    return dataclasses.replace(
        block,
        chosen=block.chosen.at[:, index].set(logprobs.chosen),
        top=block.top.at[:, index].set(logprobs.top),
        top_ids=block.top_ids.at[:, index].set(logprobs.top_ids),
    )


def _counted(counts, token, is_new):
    rows = jnp.arange(counts.shape[0])
    return counts.at[rows, jnp.maximum(token, 0)].add(is_new.astype(jnp.int32))


def _ends(token, num_sampled, settings: RowSettings) -> Bool[Array, " B"]:
    is_stop = (token[:, None] == settings.stop_ids).any(axis=1) | (token == NOT_FINITE)
    return is_stop | (num_sampled >= settings.limit)


def _replicated(tree):
    """Replicates what the host reads over the mesh: every process needs the full arrays."""
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), tree)


def first_state(rows: int, vocabulary: int) -> RowState:
    """Returns the state of rows without requests."""
    zeros = np.zeros(rows, np.int32)
    return RowState(
        *(jnp.asarray(zeros) for _ in range(4)),
        jnp.ones(rows, bool),
        empty_histories(rows, vocabulary),
    )
