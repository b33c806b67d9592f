"""Suggests single changes for a run that does not fit, with the memory that each saves."""

import dataclasses
import math

from internvl3_jax.config import TrainConfig
from internvl3_jax.fit.memory import Memory, estimate
from internvl3_jax.fit.per_device import per_device
from internvl3_jax.fit.topology import Topology
from internvl3_jax.parallel.sharding import BATCH_AXES, mesh_shape

_MIN_SAVING = 0.01  # of the peak; smaller savings are not listed


@dataclasses.dataclass(frozen=True)
class Change:
    """A change of the config.

    Attributes:
      flags: Dotted name of a field -> its value.
      peak: Bytes of a device with the change.
    """

    flags: dict[str, object]
    peak: int

    @property
    def text(self) -> str:
        return flags_text(self.flags)


def flags_text(flags: dict[str, object]) -> str:
    """Returns the flags as text for the command line."""
    return " ".join(f"--config.{name}={value}" for name, value in flags.items())


def changes(config: TrainConfig, topology: Topology, before: Memory) -> list[Change]:
    """Returns the changes that reduce the peak, the largest reduction first."""
    useful = []
    for flags in _candidates(config, topology):
        try:
            peak = estimate(per_device(with_flags(config, flags), topology)).peak
        except ValueError:
            continue  # does not divide over the mesh
        if peak < before.peak * (1 - _MIN_SAVING):
            useful.append(Change(flags, peak))
    return sorted(useful, key=lambda change: change.peak)


def _candidates(config: TrainConfig, topology: Topology):
    """Yields flags of changes that can reduce the peak."""
    # Recompute or offload more, quantize the base.
    for name in ("remat_vision", "remat_language"):
        if getattr(config, name) not in ("full", "offload"):
            yield {name: "full"}
    if config.remat_vision != "offload" or config.remat_language != "offload":
        yield {"remat_vision": "offload", "remat_language": "offload"}
    if not config.offload_optimizer:
        yield {"offload_optimizer": True}
    if config.lora.rank and config.lora.quantize == "none":
        yield {"lora.quantize": "nf4"}

    # More micro-batches, and other meshes.
    mesh = mesh_shape(config.mesh, topology.count)
    rows = config.data.rows // math.prod(mesh[axis] for axis in BATCH_AXES) // config.micro_batches
    if rows > 1:
        yield {"micro_batches": config.micro_batches * rows}
    if mesh["data"] > 1:
        yield {"mesh.data": 1, "mesh.fsdp": mesh["fsdp"] * mesh["data"]}
    for axis in ("tensor", "context"):
        for factor in (2, 4):
            if mesh["fsdp"] % factor == 0:
                # As fsdp shrinks, each device has more rows: keep those of a micro-batch the same.
                yield {
                    f"mesh.{axis}": mesh[axis] * factor,
                    "mesh.fsdp": mesh["fsdp"] // factor,
                    "micro_batches": config.micro_batches * factor,
                }

    # A smaller optimizer state, loss chunk or row.
    if config.optimizer.name == "adamw" and config.optimizer.moment_dtype == "float32":
        yield {"optimizer.moment_dtype": "bfloat16"}
    if config.optimizer.name != "adafactor":
        yield {"optimizer.name": "adafactor", "optimizer.moment_dtype": "bfloat16"}
    if config.loss_chunk > 256:
        yield {"loss_chunk": 256}
    for divisor in (2, 4):
        yield {
            "data.tokens_per_row": config.data.tokens_per_row // divisor,
            "data.tiles_per_row": config.data.tiles_per_row // divisor,
        }


def with_flags(config: TrainConfig, flags: dict[str, object]) -> TrainConfig:
    """Returns a copy of the config with fields set by their dotted names."""
    for name, value in flags.items():
        config = _with(config, name.split("."), value)
    return config


def _with(config, path: list[str], value):
    inner = value if len(path) == 1 else _with(getattr(config, path[0]), path[1:], value)
    return dataclasses.replace(config, **{path[0]: inner})
