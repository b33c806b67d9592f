"""Values of a row of the log: losses, speed, fill of the batches, and time spent waiting.

loss, loss/SOURCE, loss_preference, ...   means over the steps since the row before
grad_norm, grad_norm_vision, ...          before clipping
reward_margin, reward_accuracy, ...       under MPO
router_accuracy, router_threshold, ...    under "router"
expert_load/NUMBER, expert_load_max, ...  share of the tokens that chose an expert; 1 is even
learning_rate                             of the row's step
step_seconds                              wall time of a step without evaluations, in seconds
input_wait                                share of it that the step waited for data
tokens_per_second, tiles_per_second       over all devices; padding does not count
token_fill, tile_fill                     share of the rows' budgets that is used
memory_gib                                peak memory of a device or, on CPUs, the process
mfu                                       model FLOPs utilization, where the peak is known
"""

import resource
import time

import jax
import numpy as np

from internvl3_jax.config import TrainConfig
from internvl3_jax.parallel.data_shards import DataShards, total
from internvl3_jax.training import balance, flops
from internvl3_jax.training.hardware import chip_of
from internvl3_jax.training.optimizer import make_schedule


def peak_flops() -> float | None:
    """Returns the peak FLOP/s of all devices together; None where it is unknown, as on CPUs."""
    chip = chip_of(jax.devices()[0].device_kind)
    return chip.flops * jax.device_count() if chip else None


class MetricsAggregator:
    """Collects the metrics of steps until `row` returns their means."""

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
        self.peak = peak_flops()
        self.restart()

    def restart(self, has_batch: bool = False) -> None:
        """Forgets all steps and starts the clock.

        Args:
          has_batch: Whether the next step's batch is there already, as after the compilation. The
            wait for it then does not count.
        """
        self.has_batch = has_batch
        self.started_at = time.perf_counter()
        self.metrics, self.counts, self.waited = [], [], 0.0

    def exclude(self, seconds: float) -> None:
        """Leaves time out of the steps' time, such as that of an evaluation."""
        self.started_at += seconds

    def add(self, prepared, metrics: dict) -> None:
        """Adds a step.

        Args:
          prepared: The step's `HostBatch`.
          metrics: Metrics of `train_step`, which may still be computing.
        """
        self.metrics.append(metrics)
        self.counts.append(
            flops.batch_counts(self.placement.counted(prepared.batch), self.config.model)
        )
        self.waited += 0.0 if self.has_batch else prepared.waited
        self.has_batch = False

    def row(self, step: int) -> dict[str, float]:
        """Returns the values at `step` and restarts; waits for the collected steps."""
        metrics = {
            name: np.stack([np.asarray(row[name]) for row in self.metrics])
            for name in self.metrics[0]
        }
        seconds, steps = time.perf_counter() - self.started_at, len(self.metrics)
        # Sums over all processes, which wait for each other here.
        sums = total(
            np.array([sum(row[name] for row in self.counts) for name in self.counts[0]], np.int64)
        )
        counts = dict(zip(self.counts[0], sums.tolist(), strict=True))
        values = {
            name: float(value.mean())
            for name, value in metrics.items()
            if name.startswith(("loss", "grad_norm", "reward", "router"))
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
        if self.peak:
            needed = flops.train_flops(
                self.config.model, counts, self.vision_trained, bool(self.config.lora.rank)
            )
            values["mfu"] = needed / seconds / self.peak
        if "expert_choices" in metrics:
            values |= balance.loads(metrics["expert_choices"].sum(axis=0))
        if len(self.sources) > 1:
            losses, weights = (
                metrics["source_loss"].sum(axis=0),
                metrics["source_weight"].sum(axis=0),
            )
            values |= {
                f"loss/{self.sources[i]}": float(losses[i] / weights[i])
                for i in np.flatnonzero(weights)
            }
        self.restart()
        return values


def _memory() -> int:
    """Returns the peak bytes of a device, or of this process where devices do not report it."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return (
        stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
