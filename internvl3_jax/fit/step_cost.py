"""Lower bounds of a train step's time: one device's FLOPs, memory traffic and network traffic.

Times are lower bounds: they assume that each unit runs all the time at the rate of its data sheet.

The FLOPs that the model needs are those of training/flops.py: three forward passes, attention over
visible pairs. They are for full rows of one sample each, in which every text token is trained, the
most that a batch of this size can need. The computed FLOPs add what remat recomputes, and what the
attention kernel computes twice.
"""

import dataclasses

from internvl3_jax.config import TrainConfig
from internvl3_jax.fit.hlo import Collectives
from internvl3_jax.fit.memory import Memory
from internvl3_jax.fit.per_device import PerDevice
from internvl3_jax.fit.topology import Topology
from internvl3_jax.fit.traffic import Traffic, exchanges, gathers, memory_traffic
from internvl3_jax.model.ops.remat import recomputes_attention
from internvl3_jax.training import flops

# Products in the backward pass of attention, per two in the forward pass, by whether it is a TPU.
# The TPU kernel recomputes the scores once for queries and once for keys.
_BACKWARD = {True: 7, False: 5}
_BLOCK = 512  # of the TPU kernel, which computes all of a block on the diagonal


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Cost of one step on one device.

    Attributes:
      needed: FLOPs that the model needs.
      computed: FLOPs that are computed, by part of the model.
      memory_bytes: Memory traffic, by kind.
      network: Network traffic, by kind.
    """

    needed: float
    computed: dict[str, float]
    memory_bytes: dict[str, float]
    network: dict[str, Traffic]


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one step, each as if the device did nothing else.

    Attributes:
      compute: FLOPs at the peak rate.
      memory: Memory traffic at the bandwidth.
      network: Network traffic at the bandwidth.
      blocking: The part of `network` that cannot overlap, by the analysis.
      ideal: The FLOPs that the model needs at the peak rate (MFU 1).
    """

    compute: float
    memory: float
    network: float
    blocking: float
    ideal: float

    @property
    def lower_bound(self) -> float:
        return max(self.compute, self.memory, self.network)

    @property
    def serial(self) -> float:
        """Returns the time if nothing overlaps."""
        return self.compute + self.memory + self.network

    @property
    def limit(self) -> str:
        """Returns what sets the lower bound: "compute", "memory" or "network"."""
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))

    @property
    def mfu(self) -> float:
        """Returns an upper bound of the model FLOPs utilization."""
        return self.ideal / self.lower_bound


def full_batch(config: TrainConfig, samples: int = 1) -> dict[str, int]:
    """Returns `flops.batch_counts` of full rows of `samples` equal samples, all text trained.

    With one sample it is the batch that needs most.
    """
    data, tokens = config.data, config.data.tokens_per_row
    visual = min(tokens, data.tiles_per_row * config.model.tokens_per_tile)
    return {
        "tokens": data.rows * tokens,
        "trained_tokens": data.rows * (tokens - visual),
        "tiles": data.rows * data.tiles_per_row,
        "pairs": data.rows * tokens * (tokens // samples + 1) // 2,
    }


def train_cost(device: PerDevice, memory: Memory, samples: int = 1) -> StepCost:
    """Returns the cost of a train step.

    Args:
      memory: That of `memory.estimate`.
      samples: Of each row.
    """
    counts, devices = full_batch(device.config, samples), device.topology.count
    needed = (
        flops.train_flops(
            device.config.model, counts, device.learns("vision/"), bool(device.config.lora.rank)
        )
        / devices
    )
    computed = _tower(device, counts) | _decoder(device, counts) | _reference(device, counts)
    return StepCost(
        needed,
        {name: value / devices for name, value in computed.items()},
        memory_traffic(device, memory),
        gathers(device) | exchanges(device),
    )


def times(
    cost: StepCost, topology: Topology, collectives: list[Collectives] | None = None
) -> Times:
    """Returns the times of a step at the rates of the topology's data sheet.

    Args:
      collectives: Of the compiled program, instead of the analysis' network traffic.
    """
    if collectives is None:
        traffic = cost.network.values()
    else:
        traffic = [Traffic(row.bytes, row.group) for row in collectives]

    def seconds(transfers) -> float:
        return sum(topology.seconds(row.bytes, row.group, row.stride) for row in transfers)

    return Times(
        compute=sum(cost.computed.values()) / topology.chip.flops,
        memory=sum(cost.memory_bytes.values()) / topology.chip.memory_bytes,
        network=seconds(traffic),
        blocking=seconds(row for row in cost.network.values() if row.blocking),
        ideal=cost.needed / topology.chip.flops,
    )


# --- floating-point operations, of all devices ---------------------------------------------------


def _tower(device: PerDevice, counts: dict[str, int]) -> dict[str, float]:
    """Returns the FLOPs of the tower and the projector."""
    # FLOPs of a layer and a tile. The TPU kernel pads the tokens to whole blocks.
    vision, policy = device.config.model.vision, device.config.remat_vision
    length, width, ff = 1 + vision.grid**2, vision.hidden_size, vision.intermediate_size
    padded = -(-length // 384) * 384 if device.tpu and length >= 256 else length
    products = {"qkv": 3 * width**2, "proj": width**2, "fc1": width * ff, "fc2": width * ff}
    dense = 2 * length * sum(products.values())
    attention = 4 * padded**2 * width
    embedding = 2 * (length - 1) * 3 * vision.patch_size**2 * width
    forward = flops.forward_flops(device.config.model)
    layers = vision.num_layers * counts["tiles"]

    # Forward, gradient of the input, gradient of the kernel: as far as they are needed.
    if device.trains("projector/"):
        passes = 3
    else:
        passes = 2 if device.learns("projector/") or device.learns("vision/") else 1
    result = {"projector": passes * counts["tiles"] * forward.projector_tile}
    if not device.learns("vision/"):
        return result | {
            "tower": layers * dense + counts["tiles"] * embedding,
            "tower, attention": layers * attention,
        }

    # "fc2" is the last product of a layer; the backward pass does not need its output.
    recomputed = {
        "none": 0,
        "dots": 0,
        "attention": 2 * length * (products["proj"] + products["fc1"]),
    }.get(policy, dense - 2 * length * products["fc2"])
    scores_again = 1 if recomputes_attention(policy, device.tpu) else 0
    return result | {
        "tower": layers * (3 if device.trains("vision/layers/") else 2) * dense
        + counts["tiles"] * 2 * embedding,
        "tower's adapters": 6 * length * counts["tiles"] * device.adapters("vision/"),
        "tower, recomputed": layers * (recomputed + scores_again * attention),
        "tower, attention": layers * attention * (1 + _BACKWARD[device.tpu] / 2),
    }


def _reference(device: PerDevice, counts: dict[str, int]) -> dict[str, float]:
    """Returns the FLOPs of MPO's reference model (or the base without adapters).

    One forward pass, and the head once more for either model.
    """
    config = device.config
    if config.loss.kind != "mpo":
        return {}
    forward = flops.forward_flops(config.model)
    passes = 0 if config.data.ref_logps_file else 1
    body = (
        counts["tiles"] * (forward.vision_tile + forward.projector_tile)
        + counts["tokens"] * forward.language_token
    )
    body += counts["pairs"] * forward.language_pair
    return {"reference": passes * body + (1 + passes) * counts["trained_tokens"] * forward.head}


def _used_adapters(device: PerDevice) -> float:
    """Returns the elements of the decoder's adapters that a token uses."""
    language = device.config.model.language
    unused = device.adapters("language/layers/experts/")
    if language.num_experts:
        unused *= 1 - language.experts_per_token / language.num_experts
    return device.adapters("language/") - unused


def _decoder(device: PerDevice, counts: dict[str, int]) -> dict[str, float]:
    """Returns the FLOPs of the decoder and the head."""
    language, policy = device.config.model.language, device.config.remat_language
    width, ff = language.hidden_size, language.intermediate_size
    if language.num_experts:
        ff = language.experts_per_token * language.expert_size
    heads, keys = language.num_heads * language.head_dim, language.num_kv_heads * language.head_dim
    kernels = {
        "qkv": width * (heads + 2 * keys),
        "o": width * heads,
        "up": 2 * width * ff,
        "down": width * ff,
    }
    dense = 2 * counts["tokens"] * sum(kernels.values())
    # The product with "down" is the last of a layer; the backward pass does not need its output.
    recomputed = {
        "none": 0,
        "dots": 0,
        "attention": 2 * counts["tokens"] * (kernels["o"] + kernels["up"]),
    }.get(policy, dense - 2 * counts["tokens"] * kernels["down"])
    tokens = device.config.data.tokens_per_row
    blocks = (tokens + min(_BLOCK, tokens)) / (tokens + 1) if device.tpu else 1
    attention = 4 * counts["pairs"] * blocks * heads
    scores_again = 1 if recomputes_attention(policy, device.tpu) else 0
    passes = 3 if device.trains("language/layers/") else 2
    head = "language/embedding" if language.tie_embeddings else "language/head"
    return {
        "decoder": language.num_layers * passes * dense,
        "decoder, recomputed": language.num_layers * (recomputed + scores_again * attention),
        "decoder, attention": language.num_layers * attention * (1 + _BACKWARD[device.tpu] / 2),
        "decoder's adapters": 6 * counts["tokens"] * _used_adapters(device),
        "head": (3 if device.trains(head) else 2)
        * counts["trained_tokens"]
        * 2
        * width
        * language.padded_vocab_size,
    }
