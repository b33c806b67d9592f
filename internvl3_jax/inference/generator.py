"""Generation: images to features, prompts into the cache (prefill), then a decode loop.

Rows are right-padded: the tokens of a row are in cache slots 0, 1, 2 ... and a query attends only
to slots up to its own. So neither padding nor a longer neighbor changes what a row computes.
Positions are separate from slots, since they differ under V2PE.

B rows, T prompt tokens, S cache slots, D decoder width.
"""

import collections
import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from internvl3_jax.checkpoints import adapters
from internvl3_jax.config import UNITS, ModelConfig
from internvl3_jax.data.batch import Prompt
from internvl3_jax.inference import layout, programs, prompt_lookup
from internvl3_jax.inference.compile_clock import CompileClock
from internvl3_jax.inference.generation_config import GenerationConfig
from internvl3_jax.inference.programs import TOKENS_PER_CALL, DecodeState
from internvl3_jax.inference.prompt_batch import bucket, feature_columns, pack_prompts, tile_pieces
from internvl3_jax.inference.sampling import check_finite
from internvl3_jax.model import kv_cache, lora
from internvl3_jax.model.internvl import InternVL
from internvl3_jax.param_tree import own
from internvl3_jax.positions import next_position


class ContextError(ValueError):
    """A prompt that is too long for the model."""


class Generator:
    """Holds the parameters in generation layout on the device, and calls the compiled programs.

    Args:
      config: of the model.
      params: the canonical (stacked) tree. The decoder layers are copied into the unrolled layout.
        Kernels that are quantized, and parameters that are sharded over a mesh
        (`load(..., mesh=)`), stay so; the cache is sharded too.
      dtype: of computation, and of all parameters that are not quantized.
      cache_dtype: of the cache, which may be int8 (kv_cache.py); None: `dtype`.
      stop_ids: ids that end an answer.
      named_adapters: LoRA adapters that `use` can put on.
      donate: empty `params` leaf by leaf: where nothing else refers to its leaves, the parameters
        and one leaf are in memory, instead of the layers twice (`Checkpoint.take_params`).
    """

    def __init__(
        self,
        config: ModelConfig,
        params: dict,
        dtype: DTypeLike = jnp.float32,
        stop_ids: Sequence[int] = (),
        named_adapters: Mapping[str, adapters.Adapter] | None = None,
        cache_dtype: DTypeLike | None = None,
        donate: bool = False,
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.cache_dtype = jnp.dtype(cache_dtype or dtype)
        self.stop_ids = tuple(stop_ids)
        self.mesh = layout.mesh_of(params)
        self.fused = layout.is_fused(params, self.mesh)
        # On an accelerator the tower is scanned: it compiles faster, and the copies are cheap.
        self.model = InternVL(
            config, self.dtype, unrolled=True, unrolled_vision=programs.on_cpu(), fused=self.fused
        )
        unroll = functools.partial(
            layout.unroll, config=config, dtype=self.dtype, fused=self.fused, mesh=self.mesh
        )
        self.adapters = {
            name: unroll(own(adapter.parts(params)))
            for name, adapter in (named_adapters or {}).items()
        }
        self.base = unroll(params if donate else own(params))
        self.compile_clock = CompileClock()
        self.calls_ahead = 0 if programs.on_cpu() else 1
        self.use(None)

    def use(self, name: str | None) -> None:
        """Puts an adapter on the base; None takes it off. Nothing is loaded or copied.

        Raises:
          ValueError: there is no adapter of this name.
        """
        if name is not None and name not in self.adapters:
            raise ValueError(
                f"there is no adapter {name!r}; loaded are: {', '.join(self.adapters) or 'none'}"
            )
        self.params = self.base if name is None else self.base | self.adapters[name]
        self.vision_params = {
            key: self.params[key]
            for key in ("vision", "projector", "flash", lora.SUBTREE)
            if key in self.params
        }

    def mesh_context(self) -> contextlib.AbstractContextManager:
        """Returns the context in which the programs are called."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    @contextlib.contextmanager
    def calling(self, program: str, *key) -> Iterator[None]:
        """Surrounds the call of a program. key: what it is compiled for."""
        variant = tuple(self.params), lora.SUBTREE in self.params
        with self.mesh_context(), self.compile_clock.call(program, variant, *key):
            yield

    def check_context_length(
        self, prompt: Prompt, config: GenerationConfig, where: str = ""
    ) -> None:
        """Raises ContextError if the prompt and `config.max_new_tokens` exceed the positions that
        the model was trained for. where: what the message calls the prompt.
        """
        settings = self.config.language
        factor = settings.rope_factor if config.scaling == "dynamic" else 1
        limit = settings.max_position * factor
        last = next_position(prompt.positions) // UNITS + config.max_new_tokens
        if last > limit:
            raise ContextError(
                f"{where + ': ' if where else ''}the prompt of {len(prompt.tokens):,} tokens and "
                f"{config.max_new_tokens:,} new ones reach position {last:,}; the model knows "
                f"{int(limit):,}. Use fewer images, a lower max_tiles or max_total_tiles, a delta "
                "below 1 or a lower max_new_tokens"
            )

    def start(
        self,
        prompts: Sequence[Prompt],
        config: GenerationConfig,
        cache: kv_cache.Cache | None = None,
        keep: int = 0,
    ) -> DecodeState:
        """Encodes the images, runs the prompts and samples the first token of each row.

        With n times as many seeds as prompts each prompt is run once, and the state has n rows for
        it, one after the other, each with its own tokens and its own copy of the cache.

        Args:
          cache: of an earlier state of one row; it is donated. None: a new one.
          keep: how many slots of the cache already hold the beginning of the prompt.
        """
        copies, rest = divmod(len(config.seeds), len(prompts))
        if rest or not copies:
            raise ValueError(
                f"{len(config.seeds)} seeds for {len(prompts)} prompts; each needs the same "
                "number, one or more"
            )
        # 1) Pack the prompts and make room in the cache. The last call of an accelerator may
        # sample past the limit.
        packed = pack_prompts(prompts, keep)
        slots = bucket(keep + packed.length + config.max_new_tokens + TOKENS_PER_CALL)
        cache = self.cache_with_room(len(prompts), slots, cache)
        visual = self.features(prompts, packed.length, keep)
        # 2) Prefill.
        shape = (*packed.tokens.shape, kv_cache.num_slots(cache), len(config.seeds))
        key = (*shape, visual is None, config.sampling, config.scaling, keep == 0)
        with self.calling("prefill", *key):
            token, cache = programs.prefill(
                self.model,
                self.params,
                packed.tokens,
                visual,
                packed.positions,
                packed.slots,
                packed.last,
                programs.row_keys(np.asarray(config.seeds, np.uint32)),
                cache,
                config.sampling,
                config.scaling,
                keep == 0,
            )
            done = programs.is_stop(token, self.stop_ids)
        # 3) One row per seed.
        cache = self.repeat_cache(cache, copies)
        position = np.asarray([next_position(prompt.positions) for prompt in prompts], np.int32)
        position, slot = np.repeat([position, packed.last + 1 + keep], copies, axis=1)
        state = DecodeState(cache, token, position, slot, np.ones(len(slot), np.int32), done)
        if config.prompt_lookup and prompt_lookup.is_exact(self.config, position, config):
            state.lookup = prompt_lookup.start(prompts, copies, kv_cache.num_slots(cache), token)
        return state

    def hidden_states(
        self,
        prompts: Sequence[Prompt],
        keep: int,
        cache: kv_cache.Cache,
        scaling: str,
    ) -> tuple[Float[Array, "B T D"], kv_cache.Cache]:
        """Runs prompts from token `keep` on into the cache, which is donated and must have room.

        Returns:
          (the decoder's output at each token, the cache)
        """
        packed = pack_prompts(prompts, keep)
        visual = self.features(prompts, packed.length, keep)
        with self.mesh_context():
            return programs.hidden_states(
                self.model,
                self.params,
                packed.tokens,
                visual,
                packed.positions,
                packed.slots,
                cache,
                scaling,
                keep == 0,
            )

    def cache_with_room(
        self, rows: int, slots: int, cache: kv_cache.Cache | None = None
    ) -> kv_cache.Cache:
        """Returns an empty cache, or the given one, grown to at least `slots` slots."""
        if cache is not None:
            return kv_cache.grow(cache, slots) if kv_cache.num_slots(cache) < slots else cache
        with self.mesh_context():
            return programs.init_cache(self.config.language, rows, slots, self.cache_dtype)

    def repeat_cache(self, cache: kv_cache.Cache, copies: int) -> kv_cache.Cache:
        """Repeats each row `copies` times, one after the other."""
        if copies == 1:
            return cache
        with self.mesh_context():
            return programs.repeat_cache(cache, copies)

    def stream(self, state: DecodeState, config: GenerationConfig) -> Iterator[list[list[int]]]:
        """Yields the new ids of each row: the first token at once, then up to TOKENS_PER_CALL per
        step, until all rows have stopped or have `config.max_new_tokens` ids.

        A stop id ends its row and is yielded. `state` is updated in place.

        Raises:
          NotFiniteError: no token can be sampled.
        """
        with self.mesh_context():
            keys = programs.row_keys(np.asarray(config.seeds, np.uint32))
        token, stopped = np.asarray(state.token), np.asarray(state.done)
        check_finite(token[:, None], 1)
        yield [[int(first)] for first in token]
        if state.lookup is not None:
            run = functools.partial(self._run_lookup, state, config)
            yield from prompt_lookup.stream(run, stopped, config, self.stop_ids, self.calls_ahead)
            return
        started = sampled = 1
        queue = collections.deque()
        while sampled < config.max_new_tokens and not stopped.all():
            # An accelerator has the next call before the results of this one are read.
            while started < config.max_new_tokens and len(queue) <= self.calls_ahead:
                count = min(TOKENS_PER_CALL, config.max_new_tokens - started)
                queue.append((count, self._decode(state, keys, count, config)))
                started += count
            count, tokens = queue.popleft()
            tokens = np.asarray(tokens)[:, :count]
            check_finite(np.where(stopped[:, None], 0, tokens), sampled + 1)
            yield [
                [] if was_done else _until_stop(row, self.stop_ids)
                for row, was_done in zip(tokens, stopped, strict=True)
            ]
            sampled += count
            stopped = stopped | np.isin(tokens, self.stop_ids).any(axis=1)

    def _run_lookup(self, state: DecodeState, config: GenerationConfig):
        """Starts a call of `prompt_lookup.decode`, whose tokens and counts it returns."""
        key = (len(state.token), kv_cache.num_slots(state.cache), config.scaling)
        with self.calling("prompt lookup", *key):
            *sampled, new_state = prompt_lookup.decode(
                self.model, self.params, state, config.max_new_tokens, self.stop_ids, config.scaling
            )
        state.assign(new_state)
        return sampled

    def _decode(self, state: DecodeState, keys, count: int, config: GenerationConfig):
        """Starts the decoding of up to TOKENS_PER_CALL tokens per row; updates `state`."""
        key = (len(state.token), kv_cache.num_slots(state.cache), config.sampling, config.scaling)
        with self.calling("decode", *key):
            tokens, new_state = programs.decode(
                self.model,
                self.params,
                state,
                keys,
                count,
                self.stop_ids,
                config.sampling,
                config.scaling,
            )
        state.assign(new_state)
        return tokens

    def generate(self, prompts: Sequence[Prompt], config: GenerationConfig) -> list[list[int]]:
        """Returns the answer ids of each prompt, its stop id included if one was sampled."""
        answers = [[] for _ in prompts]
        for pieces in self.stream(self.start(prompts, config), config):
            for answer, piece in zip(answers, pieces, strict=True):
                answer.extend(piece)
        return answers

    def features(
        self, prompts: Sequence[Prompt], length: int, keep: int
    ) -> Float[Array, "B T D"] | None:
        """Returns the features of the images from token `keep` on, at the columns of their tokens;
        None if there are no images.

        The tiles of all rows are encoded as one sequence, so that a batch of small images runs in
        large pieces too.
        """
        tiles, rows, columns = feature_columns(prompts, keep, self.config.tokens_per_tile)
        if not tiles:
            return None
        # One image's tiles are not copied.
        tiles = tiles[0] if len(tiles) == 1 else np.concatenate(tiles)
        shape = (len(prompts), length, self.config.language.hidden_size)
        with self.mesh_context():
            visual = programs.zero_features(*shape, self.dtype)
        start = 0
        for count in tile_pieces(len(tiles), programs.on_cpu()):
            piece = slice(start, start + count)
            with self.calling("vision tower", count, len(prompts), length):
                features = programs.encode_tiles(self.model, self.vision_params, tiles[piece])
                visual = programs.write_features(visual, features, rows[piece], columns[piece])
            start += count
        return visual


def _until_stop(tokens: Int[np.ndarray, " n"], stop_ids: tuple[int, ...]) -> list[int]:
    stops = np.flatnonzero(np.isin(tokens, stop_ids))
    return tokens[: stops[0] + 1].tolist() if len(stops) else tokens.tolist()
