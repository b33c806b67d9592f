"""What the log says of the steps since its last row: losses, speed, how full the batches were,
where time went.
"""

import resource
import time

import jax
import numpy as np

from internvl3_jax.config import TrainConfig
from internvl3_jax.parallel.data_shards import DataShards, total
from internvl3_jax.training import flops
from internvl3_jax.training.hardware import chip_of
from internvl3_jax.training.optimizer import make_schedule


def peak_flops() -> float | None:
    """Of all devices together; None where it is not known, as on CPUs."""
    chip = chip_of(jax.devices()[0].device_kind)
    return chip.flops * jax.device_count() if chip else None


class MetricsAggregator:
    """Collects steps; `row` says what they were and starts again."""

    def __init__(
        self, config: TrainConfig, placement: DataShards, sources: list[str], vision_trained: bool
    ):
        self.config, self.placement, self.sources, self.vision_trained = (
            config,
            placement,
            sources,
            vision_trained,
        )
        self.schedule = make_schedule(
            config.optimizer, config.steps, config.optimizer.learning_rate
        )
        self._restart()

    def _restart(self) -> None:
        self.began, self.metrics, self.counts, self.waited = time.perf_counter(), [], [], 0.0

    def add(self, prepared, metrics: dict) -> None:
        """prepared: a data/batches.Prepared; metrics: of train_step, which may still be computing."""
        self.metrics.append(metrics)
        self.counts.append(
            flops.batch_counts(self.placement.counted(prepared.batch), self.config.model)
        )
        self.waited += prepared.waited

    def row(self, step: int) -> dict[str, float]:
        """Values of the log at `step`: means over the steps collected. Waits for them."""
        metrics = {
            name: np.stack([np.asarray(row[name]) for row in self.metrics])
            for name in self.metrics[0]
        }
        seconds, steps = time.perf_counter() - self.began, len(self.metrics)
        # Of all processes, which wait for each other here.
        sums = total(
            np.array([sum(row[name] for row in self.counts) for name in self.counts[0]], np.int64)
        )
        counts = dict(zip(self.counts[0], sums.tolist(), strict=True))
        values = {
            name: float(value.mean())
            for name, value in metrics.items()
            if name.startswith(("loss", "grad_norm", "reward"))
        }
        values |= {
            "learning_rate": float(self.schedule(step - 1)),
            "step_seconds": seconds / steps,
            "input_wait": self.waited / seconds,
            "tokens_per_second": counts["tokens"] / seconds,
            "tiles_per_second": counts["tiles"] / seconds,
            "token_fill": counts["tokens"] / counts["token_room"],
            "tile_fill": counts["tiles"] / max(1, counts["tile_room"]),
            "memory_gib": _memory() / 2**30,
        }
        if peak := peak_flops():
            needed = flops.train_flops(
                self.config.model, counts, self.vision_trained, bool(self.config.lora.rank)
            )
            values["mfu"] = needed / seconds / peak
        if len(self.sources) > 1:
            losses, weights = (
                metrics["source_loss"].sum(axis=0),
                metrics["source_weight"].sum(axis=0),
            )
            values |= {
                f"loss/{self.sources[i]}": float(losses[i] / weights[i])
                for i in np.flatnonzero(weights)
            }
        self._restart()
        return values


def _memory() -> int:
    """Most bytes that a device has held, or this process where devices do not tell."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return (
        stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
