"""Our train step on one packed row of 16,384 tokens and 48 tiles: AdamW, float32 master weights."""

import functools
import time

import jax
import numpy as np

from benchmarks.gpu_parts.profiling import top_kernels
from benchmarks.gpu_parts.timing import jax_peak_gib, repeat
from internvl3_jax.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ProcessorConfig,
    TrainConfig,
)
from internvl3_jax.sizes import SIZES

DATASHEET_TFLOPS = 989.4  # an H100 or H200 in bfloat16, without sparsity
# What parallel/compiler_options.py changes.
XLA_DEFAULTS = {
    "xla_gpu_enable_triton_gemm": True,
    "xla_gpu_enable_dynamic_slice_fusion": True,
    "xla_gpu_enable_dus_accumulator_zero_init_elimination": False,
}


def cases(size: str, smoke: bool) -> dict:
    bench = Training(size, smoke)
    result = {"remat full": functools.partial(bench.step, "full", {})}
    if not smoke:
        result["remat attention"] = functools.partial(bench.step, "attention", {})
    result["kernels of step"] = bench.kernels
    if not smoke and size == "1b":
        result["remat dots"] = functools.partial(bench.step, "dots", {})
        result["remat dots, XLA's defaults"] = functools.partial(bench.step, "dots", XLA_DEFAULTS)
    return result


def samples(smoke: bool) -> list[tuple[int, int]]:
    """Returns (tiles, text tokens) of the samples of the row."""
    if smoke:
        return [(3, 24), (2, 24), (0, 16)]
    return [(13, 512), (13, 512), (13, 512), (9, 512), (0, 2048)]


def make_batch(config: ModelConfig, smoke: bool) -> dict[str, np.ndarray]:
    """Returns a `Batch` of one packed row without padding; all text after the images is trained."""
    rng, per, side = np.random.default_rng(0), config.tokens_per_tile, config.vision.image_size
    rows = {name: [] for name in ("tokens", "loss_weights", "segments", "positions")}
    for number, (tiles, text) in enumerate(samples(smoke), 1):
        length, visual = tiles * per + text, tiles * per
        tokens = rng.integers(0, 400, length, dtype=np.int32)
        tokens[2 : 2 + visual] = config.image_token_id
        weights = np.ones(length, np.float32)
        weights[: 2 + visual] = weights[-1] = 0
        rows["tokens"].append(tokens)
        rows["loss_weights"].append(weights)
        rows["segments"].append(np.full(length, number, np.int32))
        rows["positions"].append(256 * np.arange(length, dtype=np.int32))
    batch = {name: np.concatenate(values)[None] for name, values in rows.items()}
    count = sum(tiles for tiles, _ in samples(smoke))
    tiles = rng.integers(0, 256, (1, count, side, side, 3), dtype=np.uint8)
    return batch | {"targets": np.roll(batch["tokens"], -1, axis=1), "tiles": tiles}


def train_config(model: ModelConfig, batch: dict, remat: str) -> TrainConfig:
    data = DataConfig(
        rows=1,
        tokens_per_row=batch["tokens"].shape[1],
        tiles_per_row=batch["tiles"].shape[1],
        samples_per_row=64,
    )
    return TrainConfig(
        model=model,
        processor=ProcessorConfig(),
        data=data,
        optimizer=OptimizerConfig(),
        steps=1000,
        compute_dtype="bfloat16",
        remat_vision=remat,
        remat_language=remat,
    )


class Training:
    """The cases of one size. The state goes from one to the next."""

    def __init__(self, size: str, smoke: bool):
        from internvl3_jax.parallel.sharding import make_mesh
        from internvl3_jax.training.flops import batch_counts, train_flops

        self.smoke, self.config = smoke, SIZES["tiny" if smoke else size]
        self.batch = make_batch(self.config, smoke)
        self.counts = batch_counts(self.batch, self.config)
        self.flops = train_flops(self.config, self.counts)
        self.mesh = make_mesh(MeshConfig())
        self.state, self.compiled, self.losses = None, None, []

    @functools.cached_property
    def inputs(self) -> tuple:
        from internvl3_jax.parallel.sharding import batch_sharding

        batch = {
            name: jax.device_put(value, batch_sharding(self.mesh, name))
            for name, value in self.batch.items()
        }
        key = jax.device_put(jax.random.key(0), jax.NamedSharding(self.mesh, jax.P()))
        return batch, key

    def init(self):
        from internvl3_jax.fit.lowering import train_state_shapes
        from internvl3_jax.training.optimizer import make_optimizer
        from internvl3_jax.training.step import init_state, make_model, shardings_of

        config = train_config(self.config, self.batch, "full")
        model, optimizer = make_model(config), make_optimizer(config.optimizer, config.steps)
        shardings = shardings_of(train_state_shapes(config, model, optimizer), self.mesh)
        small = {name: value[:, :1] for name, value in self.batch.items()}
        init = jax.jit(lambda: init_state(model, optimizer, small, 0), out_shardings=shardings)
        return init()

    def once(self) -> None:
        batch, key = self.inputs
        self.state, metrics = self.compiled(self.state, batch, key, None)
        self.losses.append(float(metrics["loss"]))

    def step(self, remat: str, options: dict) -> dict:
        from internvl3_jax.fit.lowering import lower_train_step

        config, began = train_config(self.config, self.batch, remat), time.perf_counter()
        lowered = lower_train_step(config, self.mesh)
        on_gpu = jax.default_backend() == "gpu"
        self.compiled = lowered.compile(options if on_gpu and options else None)
        compile_s = time.perf_counter() - began
        memory, self.losses = self.compiled.memory_analysis(), []
        with jax.set_mesh(self.mesh):
            if self.state is None:
                self.state = self.init()
            values = repeat(self.once, 4.0, 4, self.smoke)
        tflop_s = self.flops / values["ms"] / 1e9
        return values | {
            "compile_s": compile_s,
            "tokens": self.counts["tokens"],
            "tokens_s": 1e3 * self.counts["tokens"] / values["ms"],
            "tflop_s": tflop_s,
            "mfu_of_datasheet": tflop_s / DATASHEET_TFLOPS,
            "losses": [*self.losses[:2], self.losses[-1]],
            "finite": bool(np.isfinite(self.losses).all()),
            "compiler_peak_gib": getattr(memory, "peak_memory_in_bytes", 0) / 2**30,
            "peak_gib_so_far": jax_peak_gib(),
        }

    def kernels(self) -> dict:
        if self.compiled is None:
            self.step("full", {})
        with jax.set_mesh(self.mesh):
            return top_kernels(self.once, 40)
