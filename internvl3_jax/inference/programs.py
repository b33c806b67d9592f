"""The compiled programs of inference: tiles to features, prompts into the cache (prefill), and the
decode loop.

B rows, T prompt tokens, S cache slots, D decoder width, V vocabulary, P tokens per tile, M tiles,
R rows times answers per prompt, N labels per row.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int32, Shaped, UInt8, UInt32

from internvl3_jax.config import UNITS, LanguageConfig
from internvl3_jax.inference.sampling import NOT_FINITE, Sampling, sample
from internvl3_jax.model import kv_cache, lora
from internvl3_jax.model.internvl import InternVL
from internvl3_jax.parallel.collectives import axis_size, constrain, platform
from internvl3_jax.parallel.compiler_options import Program
from internvl3_jax.parallel.sharding import BATCH_AXES

TOKENS_PER_CALL = 16  # tokens decoded before the host looks at them
TOKENS_PER_CHUNK = 32_768  # tokens of prompts that run at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DecodeState:
    """State of a decode loop, carried from token to token.

    Attributes:
      cache: keys and values of every token but the last sampled one.
      token: i32[B], sampled and not yet run.
      position: i32[B] of that token, in units of 1/256.
      slot: i32[B], where its keys and values go.
      num_sampled: i32[B], tokens sampled so far; the random keys are numbered by it.
      done: bool[B], whether the row has sampled a stop token.
      lookup: a `prompt_lookup.Lookup`, or None.
    """

    cache: Any
    token: Any
    position: Any
    slot: Any
    num_sampled: Any
    done: Any
    lookup: Any = None

    def assign(self, other: "DecodeState") -> None:
        """Takes the arrays of `other`, after its own were donated to the call that made them."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(other, field.name))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def init_cache(config: LanguageConfig, rows: int, slots: int, dtype: DTypeLike) -> list:
    """Returns a zero cache for `rows` rows of `slots` tokens."""
    return kv_cache.init_cache(config, rows, slots, dtype)


@functools.partial(jax.jit, static_argnums=1)
def repeat_cache(cache: list, copies: int) -> list:
    """Repeats each row `copies` times, one after the other."""
    return kv_cache.repeat(cache, copies)


@jax.jit
def row_keys(seeds: UInt32[Array, " R"]) -> Shaped[Array, " R"]:
    """Returns a random key per seed.

    The keys, and all that the host reads, are replicated over the mesh: with several processes each
    of them needs the full array.
    """
    return constrain(jax.vmap(jax.random.key)(seeds), None)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def zero_features(rows: int, length: int, width: int, dtype: DTypeLike) -> Float[Array, "B T D"]:
    """Returns the features of a batch before any image is written into them."""
    return constrain(jnp.zeros((rows, length, width), dtype), BATCH_AXES, None, None)


@functools.partial(Program, name="encode", static_argnums=0)
def encode_tiles(
    model: InternVL, params: dict, tiles: UInt8[Array, "M S S 3"]
) -> Float[Array, "M P D"]:
    """Returns the features of tiles: vision tower, pixel shuffle and projector."""
    return model.apply(lora.variables(params), tiles, method=InternVL.encode)


@functools.partial(Program, name="encode", static_argnums=0)
def encode_both(
    model: InternVL, params: dict, tiles: UInt8[Array, "M S S 3"]
) -> tuple[Float[Array, "M P D"], Float[Array, "M Q D"], Float32[Array, " M"]]:
    """Returns what `InternVL.encode_both` does; the host reads the probabilities."""
    full, compressed, probability = model.apply(
        lora.variables(params), tiles, method=InternVL.encode_both
    )
    return full, compressed, constrain(probability, None)


@functools.partial(jax.jit, donate_argnums=0)
def write_features(
    visual: Float[Array, "B T D"],
    features: Float[Array, "M P D"],
    rows: Int32[Array, " M"],
    columns: Int32[Array, " M"],
) -> Float[Array, "B T D"]:
    """Writes the features of each tile into its row, from its column on."""
    indices = columns[:, None] + jnp.arange(features.shape[1], dtype=jnp.int32)[None]
    return visual.at[rows[:, None], indices].set(features, unique_indices=True)


@functools.partial(jax.jit, static_argnums=(0, 7, 8), donate_argnums=6)
def hidden_states(
    model: InternVL,
    params: dict,
    tokens: Int32[Array, "B T"],
    visual: Float[Array, "B T D"] | None,
    positions: Int32[Array, "B T"],
    slots: Int32[Array, "B T"],
    cache: list,
    scaling: str,
    is_start: bool,
) -> tuple[Float[Array, "B T D"], list]:
    """Runs tokens into the cache; returns the decoder's output at each of them, and the cache.

    is_start: the cache is empty.
    """
    return model.apply(
        lora.variables(params),
        tokens,
        visual,
        positions,
        slots,
        cache,
        scaling,
        is_start,
        method=InternVL.step,
    )


@functools.partial(jax.jit, static_argnums=(0, 9, 10, 11), donate_argnums=8)
def prefill(
    model: InternVL,
    params: dict,
    tokens: Int32[Array, "B T"],
    visual: Float[Array, "B T D"] | None,
    positions: Int32[Array, "B T"],
    slots: Int32[Array, "B T"],
    last: Int32[Array, " B"],
    keys: Shaped[Array, " R"],
    cache: list,
    sampling: Sampling,
    scaling: str,
    is_start: bool,
) -> tuple[Int32[Array, " R"], list]:
    """Runs prompts into the cache and samples R / B first tokens for each.

    is_start: the cache is empty.

    Returns:
      (the sampled tokens, those of one prompt one after the other; the cache of B rows)
    """
    variables = lora.variables(params)

    def run(tokens, visual, positions, slots, last, cache):
        inputs = (tokens, visual, positions, slots, cache, scaling, is_start)
        hidden, cache = model.apply(variables, *inputs, method=InternVL.step)
        # The head, which is V wide, runs at each row's last token only.
        return jnp.take_along_axis(hidden, last[:, None, None], axis=1), cache

    hidden, cache = _in_chunks(run, (tokens, visual, positions, slots, last), cache)
    logits = model.apply(variables, hidden, method=InternVL.logits)[:, 0]
    logits = jnp.repeat(logits, len(keys) // len(logits), axis=0)
    sampled = sample(logits, _fold_in(keys, jnp.zeros(len(keys), jnp.int32)), sampling)
    return constrain(sampled, None), cache


def _in_chunks(run: Callable, inputs: tuple, cache: list) -> tuple[Float[Array, "B 1 D"], list]:
    """Calls `run` on as many rows at once as have TOKENS_PER_CHUNK tokens.

    Many long prompts need more memory for activations than for the weights. Rows that are sharded
    over a mesh run at once.
    """
    rows, length = inputs[0].shape
    chunk = max(
        (
            size
            for size in range(1, rows + 1)
            if rows % size == 0 and (size == 1 or size * length <= TOKENS_PER_CHUNK)
        ),
    )
    if chunk == rows or axis_size(*BATCH_AXES) > 1:
        return run(*inputs, cache)

    def step(cache, start):
        def take(x):
            return jax.lax.dynamic_slice_in_dim(x, start, chunk)

        hidden, new = run(*jax.tree.map(take, inputs), jax.tree.map(take, cache))
        cache = jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, start, 0), cache, new
        )
        return cache, hidden

    cache, hidden = jax.lax.scan(step, cache, jnp.arange(0, rows, chunk))
    return hidden.reshape(rows, 1, -1), cache


@functools.partial(jax.jit, static_argnums=(0, 5, 6, 7), donate_argnums=2)
def decode(
    model: InternVL,
    params: dict,
    state: DecodeState,
    keys: Shaped[Array, " B"],
    count: Int32[Array, ""] | int,
    stop_ids: tuple[int, ...],
    sampling: Sampling,
    scaling: str,
) -> tuple[Int32[Array, "B n"], DecodeState]:
    """Samples up to TOKENS_PER_CALL tokens per row without the host.

    On a CPU the loop ends after `count` tokens or when every row is done. On an accelerator it
    always runs TOKENS_PER_CALL times: a fixed trip count needs no device-to-host synchronization,
    and the host truncates surplus tokens.

    Returns:
      (i32[B,TOKENS_PER_CALL] tokens, the new state)
    """
    variables = lora.variables(params)

    def step(index, tokens, state):
        # Run the last token and sample the next one.
        inputs = (state.token[:, None], None, state.position[:, None], state.slot[:, None])
        hidden, cache = model.apply(variables, *inputs, state.cache, scaling, method=InternVL.step)
        logits = model.apply(variables, hidden, method=InternVL.logits)[:, 0]
        sampled = sample(logits, _fold_in(keys, state.num_sampled), sampling)
        # A finished row repeats its last token in one slot.
        token = jnp.where(state.done, state.token, sampled)
        advance = jnp.where(state.done, 0, 1)
        state = DecodeState(
            cache=cache,
            token=token,
            position=state.position + UNITS * advance,
            slot=state.slot + advance,
            num_sampled=state.num_sampled + advance,
            done=state.done | is_stop(token, stop_ids),
        )
        return tokens.at[:, index].set(token), state

    tokens = jnp.zeros((state.token.shape[0], TOKENS_PER_CALL), jnp.int32)
    if on_cpu():
        _, tokens, state = jax.lax.while_loop(
            lambda loop: (loop[0] < count) & ~loop[2].done.all(),
            lambda loop: (loop[0] + 1, *step(*loop)),
            (0, tokens, state),
        )
    else:
        tokens, state = jax.lax.fori_loop(
            0, TOKENS_PER_CALL, lambda index, loop: step(index, *loop), (tokens, state)
        )
    state = dataclasses.replace(state, done=constrain(state.done, None))
    return constrain(tokens, None, None), state


@functools.partial(jax.jit, static_argnums=0)
def label_log_probabilities(
    model: InternVL,
    params: dict,
    hidden: Float[Array, "B T D"],
    indices: Int32[Array, "B N"],
    ids: Int32[Array, " k"],
) -> Float32[Array, "B N k"]:
    """Returns the log-probability, over the vocabulary, of each of `ids` after the tokens at
    `indices`. The head runs at these tokens only.
    """
    hidden = jnp.take_along_axis(hidden, indices[..., None], axis=1)
    logits = model.apply(lora.variables(params), hidden, method=InternVL.logits)
    # Replicated, so that every process can read it.
    return constrain(jax.nn.log_softmax(logits, axis=-1)[..., ids], None, None, None)


@functools.partial(jax.jit, static_argnums=1)
def is_stop(tokens: Int32[Array, " B"], stop_ids: tuple[int, ...]) -> Bool[Array, " B"]:
    """Returns which tokens end an answer: stop ids, and NOT_FINITE."""
    return (tokens[:, None] == jnp.asarray((*stop_ids, NOT_FINITE), jnp.int32)[None]).any(axis=1)


def on_cpu() -> bool:
    """Returns whether the devices in context are CPUs, also if they are only compiled for."""
    return platform() == "cpu"


def _fold_in(keys, numbers):
    return jax.vmap(jax.random.fold_in)(keys, numbers)
