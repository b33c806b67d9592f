"""Our inference with random weights: tower, prefill, first token, decoding, and their kernels.

It calls the `Generator` behind `Chat` and infer.py, so the host's share is part of every time.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_parts.profiling import top_kernels
from benchmarks.gpu_parts.timing import jax_peak_gib, random_params, repeat
from internvl3_jax.config import UNITS
from internvl3_jax.data.batch import Prompt
from internvl3_jax.inference import programs, prompt_lookup
from internvl3_jax.inference.generation_config import GenerationConfig
from internvl3_jax.inference.generator import Generator
from internvl3_jax.inference.programs import TOKENS_PER_CALL, DecodeState
from internvl3_jax.inference.prompt_batch import bucket
from internvl3_jax.inference.sampling import Sampling
from internvl3_jax.model import kv_cache
from internvl3_jax.model.internvl import abstract_params
from internvl3_jax.sizes import SIZES
from internvl3_jax.training.flops import forward_flops

NEW_TOKENS = 256


def cases(size: str, smoke: bool) -> dict:
    bench = Inference(size, smoke)
    batches = (2, 3) if smoke else (8, 64)
    return {
        "decode batch 1": functools.partial(bench.decode, 1),
        "vision tower": bench.encode,
        "prefill batch 1": functools.partial(bench.prefill, 1),
        "first token": bench.first_token,
        f"decode batch {batches[1]}": functools.partial(bench.decode, batches[1]),
        "kernels of decode": lambda: top_kernels(bench.decode_call(1)),
        "kernels of prefill": lambda: top_kernels(bench.prefill_call(1, images=False)),
        "kernels of tower": lambda: top_kernels(bench.encode_call()),
        f"decode batch {batches[0]}": functools.partial(bench.decode, batches[0]),
        "prompt lookup batch 1": bench.lookup,
        f"prefill batch {batches[0]}": functools.partial(bench.prefill, batches[0]),
        f"prefill batch {batches[1]}": functools.partial(bench.prefill, batches[1]),
    }


class Inference:
    """The cases of one size; the weights are made at the first."""

    def __init__(self, size: str, smoke: bool):
        if smoke:
            programs.on_cpu = lambda: False  # the accelerator's loops
        self.smoke = smoke
        self.config = SIZES["tiny" if smoke else size]
        self.tiles, text = (3, 40) if smoke else (13, 512)
        self.length = self.tiles * self.config.tokens_per_tile + text
        self.dtype = jnp.bfloat16
        self.flops = forward_flops(self.config)
        self.repeat = functools.partial(repeat, smoke=smoke)

    @functools.cached_property
    def generator(self) -> Generator:
        shapes = abstract_params(self.config, self.dtype)
        params = random_params(shapes)
        return Generator(self.config, params, self.dtype)

    def settings(self, rows: int, new: int = NEW_TOKENS) -> GenerationConfig:
        scaling = self.config.language.rope_scaling
        return GenerationConfig(new, Sampling(), tuple(range(rows)), scaling)

    def prompt(self, images: bool, seed: int = 0) -> Prompt:
        rng, config = np.random.default_rng(seed), self.config
        tokens = rng.integers(0, 400, self.length, dtype=np.int32)
        positions = UNITS * np.arange(self.length, dtype=np.int32)
        if not images:
            return Prompt(tokens, positions, [], [])
        visual, side = self.tiles * config.tokens_per_tile, config.vision.image_size
        tokens[2 : 2 + visual] = config.image_token_id
        tiles = rng.integers(0, 256, (self.tiles, side, side, 3), dtype=np.uint8)
        return Prompt(tokens, positions, [(2, visual)], [tiles])

    def measured(self, call) -> dict:
        """Times a call, and its first one apart."""
        clock = self.generator.compile_clock
        before, began = clock.seconds, time.perf_counter()
        call()
        first = time.perf_counter() - began
        times = self.repeat(call)
        return times | {
            "first_call_s": first,
            "compile_s": clock.seconds - before,
            "peak_gib_so_far": jax_peak_gib(),
        }

    def encode_call(self):
        prompt, length = self.prompt(images=True), bucket(self.length)

        def call():
            self.generator.features([prompt], length, 0).block_until_ready()

        return call

    def encode(self) -> dict:
        values = self.measured(self.encode_call())
        flops = self.tiles * (self.flops.vision_tile + self.flops.projector_tile)
        per_tile = values["ms"] / self.tiles
        return values | _rate(flops, values) | {"tiles": self.tiles, "ms_per_tile": per_tile}

    def prefill_call(self, rows: int, images: bool):
        prompts = [self.prompt(images, seed) for seed in range(rows)]
        settings = self.settings(rows)

        def call():
            self.generator.start(prompts, settings).token.block_until_ready()

        return call

    def prefill(self, rows: int) -> dict:
        values = self.measured(self.prefill_call(rows, images=False))
        return values | _rate(rows * self._prompt_flops(), values) | self._sizes(rows)

    def first_token(self) -> dict:
        values = self.measured(self.prefill_call(1, images=True))
        tower = self.tiles * (self.flops.vision_tile + self.flops.projector_tile)
        return values | _rate(tower + self._prompt_flops(), values) | self._sizes(1)

    def decoding(self, rows: int) -> DecodeState:
        """Returns a state with a full cache of random values.

        Filling it by a prefill of 64 prompts may not fit.
        """
        slots = bucket(bucket(self.length) + NEW_TOKENS + TOKENS_PER_CALL)
        generator = self.generator  # made outside of the trace
        shapes = jax.eval_shape(lambda: generator.cache_with_room(rows, slots))
        return self.begin(random_params(shapes), rows)

    def begin(self, cache, rows: int) -> DecodeState:
        full = functools.partial(np.full, rows, dtype=np.int32)
        return DecodeState(
            cache,
            jnp.asarray(full(7)),
            jnp.asarray(full(UNITS * self.length)),
            jnp.asarray(full(self.length)),
            jnp.asarray(full(1)),
            jnp.zeros(rows, bool),
        )

    def decode_call(self, rows: int, calls: int = 1):
        """Returns a function that decodes `calls` times TOKENS_PER_CALL tokens from a full cache."""
        holder = [self.decoding(rows).cache]
        settings = self.settings(rows, 1 + calls * TOKENS_PER_CALL)

        def call():
            state = self.begin(holder[0], rows)
            for _ in self.generator.stream(state, settings):
                pass
            holder[0] = state.cache

        return call

    def decode(self, rows: int) -> dict:
        calls = 1 if self.smoke else 4
        values = self.measured(self.decode_call(rows, calls))
        step = values["ms"] / calls / TOKENS_PER_CALL
        gigabytes = self._decode_bytes(rows) / 1e9
        return (
            values
            | self._sizes(rows)
            | {
                "ms_per_token": step,
                "tokens_s": 1e3 * rows / step,
                "needed_gb": gigabytes,
                "tb_s": gigabytes / step,
            }
        )

    def lookup(self) -> dict:
        """Times a run of prompt lookup, which checks GUESSES tokens with the last one."""
        holder, generator = [self.decoding(1).cache], self.generator

        def call():
            state = self.begin(holder[0], 1)
            slots = kv_cache.num_slots(state.cache)
            state.lookup = prompt_lookup.Lookup(
                jnp.zeros((1, slots), jnp.int32), jnp.zeros(1, jnp.int32)
            )
            scaling = self.config.language.rope_scaling
            inputs = (generator.model, generator.params, state, NEW_TOKENS, (), scaling)
            tokens, _, state = prompt_lookup.decode(*inputs)
            tokens.block_until_ready()
            holder[0] = state.cache

        values = self.measured(call)
        step = values["ms"] / prompt_lookup.RUNS_PER_CALL
        return values | self._sizes(1) | {"ms_per_run": step, "guesses": prompt_lookup.GUESSES}

    def _decode_bytes(self, rows: int) -> int:
        """Bytes that a step must read: the decoder but for the embedding, and the valid cache."""
        language, params = self.config.language, self.generator.params["language"]
        weights = sum(
            leaf.nbytes
            for path, leaf in jax.tree.leaves_with_path(params)
            if language.tie_embeddings or "embedding" not in jax.tree_util.keystr(path)
        )
        token = 2 * 2 * language.num_layers * language.num_kv_heads * language.head_dim
        return weights + rows * token * self.length

    def _prompt_flops(self) -> float:
        pairs = self.length * (self.length + 1) / 2
        per_token = self.length * self.flops.language_token
        return per_token + pairs * self.flops.language_pair + self.flops.head

    def _sizes(self, rows: int) -> dict:
        return {"rows": rows, "tokens": self.length}


def _rate(flops: float, values: dict) -> dict:
    return {"tflop_s": flops / values["ms"] / 1e9}
