"""What to change where a run does not fit: each change by itself, and what the analysis says that
it saves.
"""

import dataclasses
import math

from internvl3_jax.config import TrainConfig
from internvl3_jax.fit.memory import Memory, estimate
from internvl3_jax.fit.share import share_of
from internvl3_jax.fit.topology import Topology
from internvl3_jax.parallel.sharding import BATCH_AXES, mesh_shape

_LEAST = 0.01  # of the peak; less is not worth a line


@dataclasses.dataclass(frozen=True)
class Change:
    flags: dict[str, object]  # field -> value
    peak: int  # bytes of a device after it

    @property
    def text(self) -> str:
        return flags_text(self.flags)


def flags_text(flags: dict[str, object]) -> str:
    """As on the command line."""
    return " ".join(f"--config.{name}={value}" for name, value in flags.items())


def changes(config: TrainConfig, topology: Topology, before: Memory) -> list[Change]:
    """Those that make it smaller, the most first."""
    found = []
    for flags in _candidates(config, topology):
        try:
            peak = estimate(share_of(with_flags(config, flags), topology)).peak
        except ValueError:
            continue  # does not split over the mesh
        if peak < before.peak * (1 - _LEAST):
            found.append(Change(flags, peak))
    return sorted(found, key=lambda change: change.peak)


def _candidates(config: TrainConfig, topology: Topology):
    for name in ("remat_vision", "remat_language"):
        if getattr(config, name) not in ("full", "offload"):
            yield {name: "full"}
    if config.remat_vision != "offload" or config.remat_language != "offload":
        yield {"remat_vision": "offload", "remat_language": "offload"}
    if not config.offload_optimizer:
        yield {"offload_optimizer": True}
    if config.lora.rank and config.lora.quantize == "none":
        yield {"lora.quantize": "nf4"}
    mesh = mesh_shape(config.mesh, topology.count)
    rows = config.data.rows // math.prod(mesh[axis] for axis in BATCH_AXES) // config.micro_batches
    if rows > 1:
        yield {"micro_batches": config.micro_batches * rows}
    if mesh["data"] > 1:
        yield {"mesh.data": 1, "mesh.fsdp": mesh["fsdp"] * mesh["data"]}
    for axis in ("tensor", "context"):
        for factor in (2, 4):
            if mesh["fsdp"] % factor == 0:
                grown = mesh["fsdp"] // factor
                micro = config.micro_batches
                # The rows of a device grow as the axes of rows shrink; as many parts keep it at the
                # rows that it has now.
                yield {
                    f"mesh.{axis}": mesh[axis] * factor,
                    "mesh.fsdp": grown,
                    "micro_batches": micro * factor,
                }
    if config.optimizer.name == "adamw" and config.optimizer.moment_dtype == "float32":
        yield {"optimizer.moment_dtype": "bfloat16"}
    if config.optimizer.name != "adafactor":
        yield {"optimizer.name": "adafactor", "optimizer.moment_dtype": "bfloat16"}
    if config.loss_chunk > 256:
        yield {"loss_chunk": 256}
    for part in (2, 4):
        yield {
            "data.tokens_per_row": config.data.tokens_per_row // part,
            "data.tiles_per_row": config.data.tiles_per_row // part,
        }


def with_flags(config: TrainConfig, flags: dict[str, object]) -> TrainConfig:
    """A copy of the configuration with fields set, by their dotted names."""
    for name, value in flags.items():
        config = _with(config, name.split("."), value)
    return config


def _with(config, path: list[str], value):
    inner = value if len(path) == 1 else _with(getattr(config, path[0]), path[1:], value)
    return dataclasses.replace(config, **{path[0]: inner})
