"""The fastest setting that fits: every mesh, remat and number of micro-batches, ranked by the
analysis.
"""

import dataclasses
import itertools
from collections.abc import Iterator

from internvl3_jax.config import TrainConfig
from internvl3_jax.fit.advice import flags_text, with_flags
from internvl3_jax.fit.memory import Memory, estimate
from internvl3_jax.fit.share import PerDevice, share_of
from internvl3_jax.fit.topology import Topology
from internvl3_jax.fit.work import Times, times, train_work
from internvl3_jax.model.ops.remat import ON_DEVICE

MARGIN = 0.95  # of the memory; the analysis is that good
_TENSOR, _CONTEXT = (1, 2, 4, 8), (1, 2, 4, 8, 16)


@dataclasses.dataclass(frozen=True)
class Setting:
    flags: dict[str, object]
    memory: Memory
    times: Times

    @property
    def seconds(self) -> float:
        """What settings are ranked by: the largest floor, and what overlapping leaves of the
        others. What a product waits for counts whole, the rest by a tenth.
        """
        times = self.times
        parts = (times.compute, times.memory, times.network - times.awaited)
        return max(parts) + 0.1 * (sum(parts) - max(parts)) + times.awaited

    @property
    def text(self) -> str:
        return flags_text(self.flags)


def search(
    config: TrainConfig, topology: Topology, policies: tuple[str, ...] = ON_DEVICE
) -> tuple[list[Setting], int, Setting | None]:
    """(settings that fit by the analysis, the fastest first; how many were tried; the smallest of
    those that do not fit).
    """
    fitting, tried, smallest = [], 0, None
    for flags, share in _settings(config, topology, policies):
        tried += 1
        memory = estimate(share)
        setting = Setting(flags, memory, times(train_work(share, memory), topology))
        if memory.peak <= MARGIN * topology.chip.usable:
            fitting.append(setting)
        elif smallest is None or memory.peak < smallest.memory.peak:
            smallest = setting
    return (
        sorted(fitting, key=lambda setting: (setting.seconds, setting.memory.peak)),
        tried,
        smallest,
    )


def _settings(
    config: TrainConfig, topology: Topology, policies: tuple[str, ...]
) -> Iterator[tuple[dict[str, object], PerDevice]]:
    for mesh in _meshes(topology.count):
        rows = config.data.rows // (mesh["mesh.data"] * mesh["mesh.fsdp"])
        try:
            share = share_of(with_flags(config, mesh | {"micro_batches": 1}), topology)
        except ValueError:
            continue
        # Of a tower that is not trained nothing is kept.
        of_tower = policies if share.trains("vision/") else (config.remat_vision,)
        parts = [count for count in range(1, rows + 1) if rows % count == 0]
        for vision, language, micro in itertools.product(of_tower, policies, parts):
            flags = {"remat_vision": vision, "remat_language": language, "micro_batches": micro}
            yield (
                mesh | flags,
                dataclasses.replace(share, config=dataclasses.replace(share.config, **flags)),
            )


def _meshes(devices: int) -> Iterator[dict[str, int]]:
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
