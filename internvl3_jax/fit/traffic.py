"""Traffic of a train step on one device: to and from its memory, and over the network."""

import dataclasses
import math

from internvl3_jax.fit.memory import Memory
from internvl3_jax.fit.per_device import PerDevice


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Data that a device receives from the other devices of its group.

    Attributes:
      bytes: Bytes received.
      group: Devices of the group.
      stride: Distance between members of the group, in devices.
      blocking: The next product needs the data, so computation cannot overlap with it.
    """

    bytes: float
    group: int
    stride: int = 1
    blocking: bool = False


def memory_traffic(device: PerDevice, memory: Memory) -> dict[str, float]:
    """Returns the least memory traffic of a step.

    The update reads and writes its state. Each micro-batch uses the kernels several times, and
    writes and reads what is saved.
    """
    config = device.config
    used = (
        _used_bytes(device, "language/layers/")
        + _used_bytes(device, "vision/layers/")
        + _used_bytes(device, "projector/")
    )
    gradients = sum(4 * math.prod(leaf.shape) for leaf in device.leaves.values() if leaf.trained)
    return {
        "update": 2 * (memory.params + memory.opt_state) + 2 * gradients,
        # Written when all-gathered; read forward, when recomputed, and backward.
        "kernels": 4.0 * used * config.micro_batches,
        "saved": 2.0 * sum(memory.saved.values()) * config.micro_batches,
    }


def _used_bytes(device: PerDevice, prefix: str, element_bytes: float | None = None) -> float:
    """Returns the bytes of all kernels below a path as a device uses them.

    element_bytes: None is those of the compute dtype.
    """
    tensor = device.tensor if prefix.startswith("language/") else 1
    if element_bytes is None:
        element_bytes = _array_bytes(device, 1)
    return device.elements(prefix) / tensor * element_bytes


def gathers(device: PerDevice) -> dict[str, Traffic]:
    """Returns the traffic of all-gathered kernels and reduce-scattered gradients."""
    config, micro, mesh = device.config, device.config.micro_batches, device.mesh
    language = config.model.language

    # Bytes of the kernels that a device lacks. Those of tower and projector are sharded over
    # tensor as well.
    everywhere = device.shards * device.tensor
    tower = _used_bytes(device, "vision/", device.kernel_bytes) * (1 - 1 / everywhere)
    projector = _used_bytes(device, "projector/") * (1 - 1 / everywhere)
    decoder = _used_bytes(device, "language/layers/", device.kernel_bytes) * (1 - 1 / device.shards)
    head = _array_bytes(
        device, language.hidden_size * language.padded_vocab_size // device.tensor
    ) * (1 - 1 / device.shards)

    # Bytes of the gradients.
    back, trained = device.learns("vision/"), device.trains("vision/")
    copies = mesh["slice"] * mesh["data"]
    local = sum(4 * math.prod(leaf.shape) for leaf in device.leaves.values() if leaf.trained)
    # That of the head is summed in float32.
    sums = decoder * device.trains("language/layers/") + head * (
        4 / _array_bytes(device, 1)
    ) * device.trains("language/head")

    # Some compilers all-gather by summing, which doubles the traffic.
    inside = mesh["tensor"] * mesh["context"]
    stride = mesh["tensor"] if mesh["context"] == 1 else 1
    factor = {
        group: 2 if device.topology.gathers_by_sums(group) else 1
        for group in (device.shards, everywhere)
    }
    gathered = (decoder * 2 * micro + head) * factor[device.shards]
    others = (tower * (1 + back) + projector * 2) * micro * factor[everywhere]
    return {
        "decoder, gathered": Traffic(gathered, device.shards, stride),
        "tower and projector, gathered": Traffic(others, everywhere),
        "decoder's gradients": Traffic(sums * micro, device.shards, stride),
        "tower's and projector's gradients": Traffic(
            (tower * trained + projector * device.trains("projector/")) * micro, everywhere
        ),
        "gradients of copies": Traffic(
            2 * local * (1 - 1 / copies) * micro, copies, mesh["fsdp"] * inside
        ),
    }


def exchanges(device: PerDevice) -> dict[str, Traffic]:
    """Returns the traffic of activations over tensor and context."""
    language, config = device.config.model.language, device.config
    tensor, context, micro = device.tensor, device.mesh["context"], config.micro_batches
    stream = _array_bytes(device, device.tokens * language.hidden_size)
    recomputed = 0 if config.remat_language in ("none", "dots") else 1
    sums = 2 * (2 + 2 + recomputed) * stream * (1 - 1 / tensor)
    keys = (
        2
        * _array_bytes(device, device.tokens * language.num_kv_heads * language.head_dim)
        / tensor
        * (context - 1)
    )
    passes = 2 if config.remat_language in ("none", "attention") else 3  # of attention
    members = tensor * context
    features = _array_bytes(
        device, device.tiles * config.model.tokens_per_tile * language.hidden_size
    ) * (members - 1)
    return {
        "activations": Traffic(language.num_layers * sums * micro, tensor, context, blocking=True),
        "keys and values": Traffic(
            language.num_layers * keys * (passes + 1) * micro, context, blocking=True
        ),
        "tiles to rows": Traffic(2 * features * micro, members, blocking=True),
        "embeddings": Traffic(2 * stream * micro * (1 - 1 / device.shards), device.shards),
    }


def _array_bytes(device: PerDevice, count: float) -> float:
    """Returns the bytes of `count` values in the compute dtype."""
    return count * (2 if device.config.compute_dtype == "bfloat16" else 4)
