"""The engine with random weights: the time of its warm-up, answers of mixed lengths against fixed
batches, and the latency of one answer.
"""

import dataclasses
import functools
import time

import jax.numpy as jnp

from benchmarks import engine as trace
from benchmarks.gpu_parts.timing import jax_peak_gib, random_params
from internvl3_jax.inference import programs
from internvl3_jax.inference.engine import programs as engine_programs
from internvl3_jax.inference.engine.engine import Engine
from internvl3_jax.inference.engine.request import Request
from internvl3_jax.inference.generator import Generator
from internvl3_jax.model.internvl import abstract_params
from internvl3_jax.sizes import SIZES


def cases(size: str, smoke: bool) -> dict:
    bench = EngineBench(size, smoke)
    return {
        "warm-up": bench.warm_up,
        "mixed answers": bench.mixed,
        "one answer": bench.one,
    }


class EngineBench:
    """The cases of one size; weights and engine are made at the first."""

    def __init__(self, size: str, smoke: bool):
        if smoke:
            programs.on_cpu = engine_programs.on_cpu = lambda: False  # the accelerator's loops
        self.config = SIZES["tiny" if smoke else size]
        self.rows, self.count, self.longest = (2, 3, 6) if smoke else (32, 128, 512)

    @functools.cached_property
    def generator(self) -> Generator:
        params = random_params(abstract_params(self.config, jnp.bfloat16))
        return Generator(self.config, params, jnp.bfloat16)

    @functools.cached_property
    def requests(self) -> list[Request]:
        return trace.make_requests(self.config, self.count, self.longest, images=True)

    @functools.cached_property
    def engine(self) -> Engine:
        longest = max(len(one.prompt.tokens) + one.max_new_tokens for one in self.requests)
        return Engine(self.generator, self.rows, max_length=longest)

    def warm_up(self) -> dict:
        began = time.perf_counter()
        self.engine.warm_up()
        sizes = self.engine._device.sizes
        return {
            "seconds": time.perf_counter() - began,
            "prompt_programs": len(sizes.programs()),
            "block_programs": 2 * len(sizes.read_slots),
            "peak_gib_so_far": jax_peak_gib(),
        }

    def mixed(self) -> dict:
        sides = {
            "engine": lambda: trace.by_engine(self.engine, self.requests),
            "fixed": lambda: trace.fixed_batches(self.generator, self.requests, self.rows),
        }
        tokens = sum(request.max_new_tokens for request in self.requests)
        values = {"rows": self.rows, "requests": self.count, "tokens": tokens}
        for name, side in sides.items():
            side()  # compiles what is left
            began = time.perf_counter()
            side()
            values[f"{name}_tokens_per_s"] = tokens / (time.perf_counter() - began)
        ratio = values["engine_tokens_per_s"] / values["fixed_tokens_per_s"]
        return values | {"ratio": ratio, "peak_gib_so_far": jax_peak_gib()}

    def one(self) -> dict:
        """Times one request alone in all rows: its first token, and each further one."""
        request = dataclasses.replace(self.requests[1], max_new_tokens=self.longest)
        self._times(request)  # compiles what is left
        began, first, *_, last = self._times(request)
        return {
            "first_token_ms": 1e3 * (first - began),
            "ms": 1e3 * (last - first) / (self.longest - 1),
            "rows": self.rows,
        }

    def _times(self, request: Request) -> list[float]:
        """Returns when a request was submitted, and when each of its pieces came."""
        self.engine.forget()
        times = [time.perf_counter()]
        self.engine.submit(request, lambda piece: times.append(time.perf_counter()))
        self.engine.run()
        return times
