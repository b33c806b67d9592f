"""Generation: pictures to features, prompt to cache (prefill), then a decode loop on the device.
Shapes come from a few buckets.

Rows are right-padded: a row's tokens sit in cache slots 0, 1, 2 ... and a query sees only slots up
to its own, so neither padding nor a longer neighbour changes what a row computes. Positions are
separate from slots, since under V2PE they differ.

B rows, T prompt tokens, S cache slots, D width, V vocabulary, P tokens per tile.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from internvl3_jax.checkpoints import adapters
from internvl3_jax.config import UNITS, ModelConfig
from internvl3_jax.data.batch import Prompt
from internvl3_jax.inference.sampling import NOT_FINITE, Sampling, sample
from internvl3_jax.model import kv_cache, language, lora, vision
from internvl3_jax.model.internvl import InternVL
from internvl3_jax.parallel.collectives import constrain
from internvl3_jax.parallel.sharding import BATCH_AXES, param_shardings
from internvl3_jax.positions import next_position

TILE_BUCKETS = (8, 4, 2, 1)  # tiles are encoded in pieces of these sizes: no tile is ever padded
LENGTH_BUCKETS = tuple(
    quarters * 2 ** (power - 2) for power in range(6, 24) for quarters in (4, 5, 6, 7)
)
TOKENS_PER_CALL = 16  # tokens decoded before the host looks at them


def bucket(length: int) -> int:
    """The smallest of 64, 80, 96, 112, 128, 160, 192, 224, 256, 320 ... that holds `length`."""
    return next(size for size in LENGTH_BUCKETS if size >= length)


class ContextError(ValueError):
    """A prompt that is too long for the model."""


class NotFiniteError(ValueError):
    """The model gives NaN or infinite logits, from which no token can be drawn."""


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How a batch is generated. `seeds` has one entry per row; several rows may continue one prompt
    (see `Generator.start`). `scaling` is the rope scaling, "none" under V2PE.
    """

    limit: int  # tokens per answer
    sampling: Sampling
    seeds: tuple[int, ...]
    scaling: str


@dataclasses.dataclass
class State:
    """Where a generation stands. `cache` holds the keys and values of every token but the last
    sampled one.
    """

    cache: kv_cache.Cache
    token: jax.Array  # i32[B] sampled and not yet run
    position: jax.Array  # i32[B] of that token, in units of 1/256
    slot: jax.Array  # i32[B] where its keys and values will go
    drawn: jax.Array  # i32[B] tokens drawn so far; numbers the random keys
    done: jax.Array  # bool[B]


class Generator:
    """Holds the parameters in generation layout on the device, and the compiled programs.

    Args:
      config: of the model.
      params: the canonical (stacked) tree. The decoder's layers are copied into the unrolled
          layout, so drop your reference to the
        original to free it. If they are split over a mesh (`load(..., mesh=)`), they stay so, and
        the cache is split, too.
      dtype: of parameters, computation and cache.
      stop_ids: ids that end an answer.
      named_adapters: that `use` can put on.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: dict,
        dtype=jnp.float32,
        stop_ids: Sequence[int] = (),
        named_adapters: Mapping[str, adapters.Adapter] | None = None,
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.stop_ids = tuple(stop_ids)
        # The tower of an accelerator scans: it compiles faster, and the copies cost little there.
        self.mesh = _mesh_of(params)
        self.fused = self.mesh is None or self.mesh.shape["tensor"] == 1
        self.model = InternVL(
            config, self.dtype, unrolled=True, unrolled_vision=_on_cpu(), fused=self.fused
        )
        self.base = self._unrolled(params)
        self.adapters = {
            name: self._unrolled(adapter.parts(params))
            for name, adapter in (named_adapters or {}).items()
        }
        self.use(None)

    def use(self, name: str | None) -> None:
        """Answers come from the base with this adapter from now on, or from the base alone. Nothing
        is loaded or copied.
        """
        if name is not None and name not in self.adapters:
            raise ValueError(
                f"there is no adapter {name!r}; loaded are: {', '.join(self.adapters) or 'none'}"
            )
        self.params = self.base if name is None else self.base | self.adapters[name]
        self.vision_params = {
            part: self.params[part]
            for part in ("vision", "projector", lora.SUBTREE)
            if part in self.params
        }

    def _unrolled(self, params: dict) -> dict:
        parts = jax.tree.map(lambda leaf: jnp.asarray(leaf, self.dtype), params)
        if _on_cpu() and "vision" in parts:
            parts["vision"] = vision.unroll(parts["vision"], self.config.vision)
        if "language" in parts:
            parts["language"] = language.unroll(parts["language"], self.config.language, self.fused)
        if lora.SUBTREE in parts:
            parts[lora.SUBTREE] = adapters.unroll(
                parts[lora.SUBTREE], self.config, self.fused, _on_cpu()
            )
        return (
            parts if self.mesh is None else jax.device_put(parts, param_shardings(parts, self.mesh))
        )

    def on_mesh(self):
        """The context in which the model's programs are called."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def check_room(self, prompt: Prompt, run: "GenerationConfig", where: str = "") -> None:
        """ContextError if the prompt and `run.limit` new tokens do not fit into the positions that
        the model knows.
        """
        settings = self.config.language
        known = settings.max_position * (settings.rope_factor if run.scaling == "dynamic" else 1)
        last = next_position(prompt.positions) // UNITS + run.limit
        if last > known:
            raise ContextError(
                f"{where + ': ' if where else ''}the prompt of {len(prompt.tokens):,} tokens and {run.limit:,} new ones reach position "
                f"{last:,}; the model knows {int(known):,}. Use fewer pictures, a lower max_tiles or max_total_tiles, a delta below 1 or "
                f"a lower max_new_tokens"
            )

    def start(
        self,
        prompts: Sequence[Prompt],
        run: "GenerationConfig",
        cache: kv_cache.Cache | None = None,
        keep: int = 0,
    ) -> State:
        """Encodes the pictures, runs the prompts and draws each row's first token.

        With n times as many seeds as prompts each prompt is run once, and the state has n rows for
        it, one after the other: each draws its own tokens and has its own copy of the cache.

        cache, keep: of an earlier `State` of one row, and how many of its slots already hold this
            prompt's beginning.
        """
        copies, rest = divmod(len(run.seeds), len(prompts))
        if rest or not copies:
            raise ValueError(
                f"{len(run.seeds)} seeds for {len(prompts)} prompts; each needs the same number, one or more"
            )
        new = [len(prompt.tokens) - keep for prompt in prompts]
        length = bucket(max(new))
        # an accelerator's last call may draw past the limit
        slots = bucket(keep + length + run.limit + TOKENS_PER_CALL)
        if cache is None:
            cache = self.empty_cache(len(prompts), slots)
        elif cache[0]["k"].shape[1] < slots:
            cache = kv_cache.grow(cache, slots)
        tokens, positions = np.zeros((2, len(prompts), length), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : new[row]] = prompt.tokens[keep:]
            positions[row, : new[row]] = prompt.positions[keep:]
            positions[row, new[row] :] = prompt.positions[-1]
        places = np.broadcast_to(keep + np.arange(length, dtype=np.int32), tokens.shape)
        last = np.asarray(new, np.int32) - 1
        visual = self.features(prompts, length, keep)
        with self.on_mesh():
            inputs = (
                tokens,
                visual,
                positions,
                places,
                last,
                _keys(np.asarray(run.seeds, np.uint32)),
                cache,
            )
            token, cache = _prefill(self.model, self.params, *inputs, run.sampling, run.scaling)
            done = _is_stop(token, self.stop_ids)
        cache = self.repeat(cache, copies)
        following = np.asarray([next_position(prompt.positions) for prompt in prompts], np.int32)
        following, slot = np.repeat([following, last + 1 + keep], copies, axis=1)
        return State(cache, token, following, slot, np.ones(len(slot), np.int32), done)

    def empty_cache(self, rows: int, slots: int) -> kv_cache.Cache:
        with self.on_mesh():
            return _init_cache(self.config.language, rows, slots, self.dtype)

    def repeat(self, cache: kv_cache.Cache, copies: int) -> kv_cache.Cache:
        """Each row `copies` times, one after the other."""
        if copies == 1:
            return cache
        with self.on_mesh():
            return _repeat(cache, copies)

    def stream(self, state: State, run: "GenerationConfig") -> Iterator[list[list[int]]]:
        """Yields each row's new ids, the first token at once and then up to TOKENS_PER_CALL at a
        time, until all rows have stopped or hold `run.limit` ids. A stop id ends its row and is
        yielded. `state` is updated in place. NotFiniteError if no token can be drawn.
        """
        with self.on_mesh():
            keys = _keys(np.asarray(run.seeds, np.uint32))
        token = np.asarray(state.token)
        _check_finite(token[:, None], 1)
        yield [[int(one)] for one in token]
        drawn = 1
        while drawn < run.limit and not (stopped := np.asarray(state.done)).all():
            count = min(TOKENS_PER_CALL, run.limit - drawn)
            carry = (state.token, state.position, state.slot, state.drawn, state.done, state.cache)
            with self.on_mesh():
                tokens, carry = _decode(
                    self.model,
                    self.params,
                    carry,
                    keys,
                    count,
                    self.stop_ids,
                    run.sampling,
                    run.scaling,
                )
            state.token, state.position, state.slot, state.drawn, state.done, state.cache = carry
            drawn += count
            tokens = np.asarray(tokens)[:, :count]
            _check_finite(np.where(stopped[:, None], 0, tokens), drawn - count + 1)
            yield [
                [] if done else _until_stop(row, self.stop_ids)
                for row, done in zip(tokens, stopped, strict=True)
            ]

    def generate(self, prompts: Sequence[Prompt], run: "GenerationConfig") -> list[list[int]]:
        """Answer ids of each prompt, its stop id included when one was drawn."""
        answers = [[] for _ in prompts]
        for pieces in self.stream(self.start(prompts, run), run):
            for answer, piece in zip(answers, pieces, strict=True):
                answer.extend(piece)
        return answers

    def features(self, prompts, length: int, keep: int):
        """Features of the new pictures at the places of their tokens: [B,T,D]; None where there are
        no pictures.

        The tiles of all rows are encoded as one line of tiles, so that a batch of small pictures
        runs in large pieces, too.
        """
        per_tile = self.config.tokens_per_tile
        tiles, rows, places = [], [], []
        for row, prompt in enumerate(prompts):
            for (start, _), picture in zip(prompt.runs, prompt.tiles, strict=True):
                if start >= keep:
                    tiles.append(picture)
                    rows += [row] * len(picture)
                    places += [start - keep + number * per_tile for number in range(len(picture))]
        if not tiles:
            return None
        tiles, rows, places = (
            np.concatenate(tiles),
            np.asarray(rows, np.int32),
            np.asarray(places, np.int32),
        )
        with self.on_mesh():
            visual = _no_features(
                len(prompts), length, self.config.language.hidden_size, self.dtype
            )
        done = 0
        for count in tile_pieces(len(tiles)):
            piece = slice(done, done + count)
            with self.on_mesh():
                features = _encode(self.model, self.vision_params, tiles[piece])
                visual = _place(visual, features, rows[piece], places[piece])
            done += count
        return visual


def _mesh_of(params: dict) -> jax.sharding.Mesh | None:
    """The mesh of several devices that the parameters are split over."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    return (
        sharding.mesh
        if isinstance(sharding, jax.NamedSharding) and sharding.mesh.size > 1
        else None
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _init_cache(config, rows, slots, dtype):
    return kv_cache.init_cache(config, rows, slots, dtype)


@jax.jit
def _keys(seeds):
    """Of u32[B] seeds. This and what else the host reads or starts from lies whole on every device
    of the mesh: with several processes each has it.
    """
    return constrain(jax.vmap(jax.random.key)(seeds), None)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _no_features(rows, length, width, dtype):
    return constrain(jnp.zeros((rows, length, width), dtype), BATCH_AXES, None, None)


@functools.partial(jax.jit, static_argnums=1)
def _repeat(cache, copies):
    return kv_cache.repeat(cache, copies)


@functools.partial(jax.jit, static_argnums=0)
def _encode(model, params, tiles):
    return model.apply(lora.variables(params), tiles, method=InternVL.encode)


@functools.partial(jax.jit, static_argnums=(0, 9, 10), donate_argnums=8)
def _prefill(model, params, tokens, visual, positions, slots, last, keys, cache, sampling, scaling):
    """Runs i32[B,T] tokens and draws one more for each key: (i32[keys], cache). The head runs at
    each row's last token alone.
    """
    variables = lora.variables(params)
    hidden, cache = model.apply(
        variables, tokens, visual, positions, slots, cache, scaling, method=InternVL.step
    )
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    logits = model.apply(variables, hidden, method=InternVL.logits)[:, 0]
    logits = jnp.repeat(logits, len(keys) // len(logits), axis=0)
    return constrain(
        sample(logits, _fold(keys, jnp.zeros(len(keys), jnp.int32)), sampling), None
    ), cache


@functools.partial(jax.jit, static_argnums=(0, 5, 6, 7), donate_argnums=2)
def _decode(model, params, carry, keys, count, stop_ids, sampling, scaling):
    """Up to TOKENS_PER_CALL tokens without the host: (i32[B,TOKENS_PER_CALL], carry).

    On a CPU the loop ends after `count` tokens or when every row is done. On an accelerator it
    always runs to the end: a loop whose length is known needs no word from the device between its
    steps, and the host cuts what is too much.
    """
    variables = lora.variables(params)

    def one(index, tokens, carry):
        token, position, slot, drawn, done, cache = carry
        step = (token[:, None], None, position[:, None], slot[:, None], cache, scaling)
        hidden, cache = model.apply(variables, *step, method=InternVL.step)
        logits = model.apply(variables, hidden, method=InternVL.logits)[:, 0]
        token = jnp.where(done, token, sample(logits, _fold(keys, drawn), sampling))
        # A finished row stands still: it writes its last token over and over into one slot.
        moved = jnp.where(done, 0, 1)
        done = done | _is_stop(token, stop_ids)
        return tokens.at[:, index].set(token), (
            token,
            position + UNITS * moved,
            slot + moved,
            drawn + moved,
            done,
            cache,
        )

    tokens = jnp.zeros((carry[0].shape[0], TOKENS_PER_CALL), jnp.int32)
    if _on_cpu():
        _, tokens, carry = jax.lax.while_loop(
            lambda loop: (loop[0] < count) & ~loop[2][4].all(),
            lambda loop: (loop[0] + 1, *one(*loop)),
            (0, tokens, carry),
        )
    else:
        tokens, carry = jax.lax.fori_loop(
            0, TOKENS_PER_CALL, lambda index, loop: one(index, *loop), (tokens, carry)
        )
    *rest, done, cache = carry
    return constrain(tokens, None, None), (*rest, constrain(done, None), cache)


@functools.partial(jax.jit, donate_argnums=0)
def _place(visual, features, rows, places):
    """Writes the features [n,P,D] of n tiles into visual [B,T,D], each at its row and from its
    place on.
    """
    columns = places[:, None] + jnp.arange(features.shape[1], dtype=jnp.int32)[None]
    return visual.at[rows[:, None], columns].set(features, unique_indices=True)


def tile_pieces(count: int) -> list[int]:
    """13 -> [8, 4, 1]"""
    pieces = []
    for size in TILE_BUCKETS:
        pieces += [size] * (count // size)
        count %= size
    return pieces


@functools.partial(jax.jit, static_argnums=1)
def _is_stop(tokens, stop_ids: tuple[int, ...]):
    return (tokens[:, None] == jnp.asarray((*stop_ids, NOT_FINITE), jnp.int32)[None]).any(axis=1)


def _fold(keys, numbers):
    return jax.vmap(jax.random.fold_in)(keys, numbers)


def _check_finite(tokens: np.ndarray, first: int) -> None:
    """tokens i32[B,n] drawn as the answers' tokens from number `first`."""
    rows, places = np.nonzero(tokens == NOT_FINITE)
    if len(rows):
        raise NotFiniteError(
            f"the model gives NaN or infinite logits for token {first + places.min()} of an answer; its weights are damaged, or the "
            f"dtype of the computation (float16?) is too narrow for it: try float32"
        )


def _until_stop(tokens, stop_ids) -> list[int]:
    stops = np.flatnonzero(np.isin(tokens, stop_ids))
    return tokens[: stops[0] + 1].tolist() if len(stops) else tokens.tolist()


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"
