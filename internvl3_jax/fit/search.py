"""Finds the fastest settings that fit: every mesh, remat policy and number of micro-batches.

Settings are ranked by the analysis.
"""

import dataclasses
import itertools
from collections.abc import Iterator

from internvl3_jax.config import TrainConfig
from internvl3_jax.fit.advice import flags_text, with_flags
from internvl3_jax.fit.memory import Memory, estimate
from internvl3_jax.fit.per_device import PerDevice, per_device
from internvl3_jax.fit.step_cost import Times, times, train_cost
from internvl3_jax.fit.topology import Topology
from internvl3_jax.model.ops.remat import ON_DEVICE

MARGIN = 0.95  # of the memory; the error of the analysis is below the rest
_TENSOR, _CONTEXT = (1, 2, 4, 8), (1, 2, 4, 8, 16)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A setting: config fields by dotted name, and what the analysis predicts for them."""

    flags: dict[str, object]
    memory: Memory
    times: Times

    @property
    def seconds(self) -> float:
        """Returns the estimated step time, by which settings are ranked.

        The largest lower bound, a tenth of the others (which mostly overlap with it), and all of
        the blocking communication.
        """
        times = self.times
        parts = (times.compute, times.memory, times.network - times.blocking)
        return max(parts) + 0.1 * (sum(parts) - max(parts)) + times.blocking

    @property
    def text(self) -> str:
        return flags_text(self.flags)


def search(
    config: TrainConfig, topology: Topology, policies: tuple[str, ...] = ON_DEVICE
) -> tuple[list[Setting], int, Setting | None]:
    """Searches all settings.

    Returns:
      The settings that fit by the analysis, the fastest first; the number of settings tried; of
      those that do not fit, the one that needs the least memory.
    """
    fitting, tried, smallest = [], 0, None
    for flags, device in _settings(config, topology, policies):
        tried += 1
        memory = estimate(device)
        setting = Setting(flags, memory, times(train_cost(device, memory), topology))
        if memory.peak <= MARGIN * topology.chip.usable:
            fitting.append(setting)
        elif smallest is None or memory.peak < smallest.memory.peak:
            smallest = setting
    fitting.sort(key=lambda setting: (setting.seconds, setting.memory.peak))
    return fitting, tried, smallest


def _settings(
    config: TrainConfig, topology: Topology, policies: tuple[str, ...]
) -> Iterator[tuple[dict[str, object], PerDevice]]:
    """Yields the flags of each setting that divides, and what a device has under it."""
    for mesh in _meshes(topology.count):
        rows = config.data.rows // (mesh["mesh.data"] * mesh["mesh.fsdp"])
        try:
            device = per_device(with_flags(config, mesh | {"micro_batches": 1}), topology)
        except ValueError:
            continue
        # A frozen tower saves nothing, whatever its policy.
        vision_policies = policies if device.trains("vision/") else (config.remat_vision,)
        counts = [count for count in range(1, rows + 1) if rows % count == 0]
        for vision, language, micro in itertools.product(vision_policies, policies, counts):
            flags = {"remat_vision": vision, "remat_language": language, "micro_batches": micro}
            yield (
                mesh | flags,
                dataclasses.replace(device, config=dataclasses.replace(device.config, **flags)),
            )


def _meshes(devices: int) -> Iterator[dict[str, int]]:
    """Yields meshes of all devices: powers of two on data, tensor and context, the rest on fsdp."""
    for tensor, context in itertools.product(_TENSOR, _CONTEXT):
        left = devices // (tensor * context)
        for data in (2**power for power in range(left.bit_length())):
            if left * tensor * context == devices and left % data == 0:
                yield {
                    "mesh.data": data,
                    "mesh.fsdp": left // data,
                    "mesh.tensor": tensor,
                    "mesh.context": context,
                }
