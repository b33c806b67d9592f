"""What one device does in a train step: floating-point operations, bytes to and from its memory,
bytes over the network; and the time that these take at the data sheet's rates.

Times are floors: every unit busy all the time at its peak. Reality is above them.

FLOPs that the model needs are those of flops.py (three forward passes, attention over the pairs
that are seen), for rows that are full, with one sample a row and every token that is no picture
trained: the most that a batch of this size can need. FLOPs that are computed add what remat
recomputes and what attention's kernel computes twice.
"""

import dataclasses
import math

from internvl3_jax.config import TrainConfig
from internvl3_jax.fit.compiled import Collectives
from internvl3_jax.fit.memory import Memory
from internvl3_jax.fit.share import PerDevice
from internvl3_jax.fit.topology import Topology
from internvl3_jax.training import flops

# Products in attention's backward pass for two in the forward pass: the TPU kernel makes the scores
# anew for queries and for keys.
_BACKWARD = {True: 7, False: 5}
_BLOCK = 512  # of the TPU kernel; those on the diagonal are computed whole


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Of one device in one step."""

    needed: float  # FLOPs, by flops.py
    computed: dict[str, float]  # FLOPs, by part of the model
    memory_bytes: dict[str, float]
    network: dict[str, "Traffic"]


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that a device receives from the others of its group, which are `stride` devices apart."""

    bytes: float
    group: int
    stride: int = 1
    # whether the next product needs them, so that they cannot travel while the devices compute
    awaited: bool = False


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one step, each of them as if the device did nothing else."""

    compute: float
    memory: float
    network: float
    awaited: float  # of network; by the analysis
    ideal: float  # what the model needs at the peak rate: MFU 1

    @property
    def floor(self) -> float:
        return max(self.compute, self.memory, self.network)

    @property
    def one_after_the_other(self) -> float:
        """With nothing overlapped."""
        return self.compute + self.memory + self.network

    @property
    def limit(self) -> str:
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))

    @property
    def mfu(self) -> float:
        """The highest that can be reached."""
        return self.ideal / self.floor


def full_batch(config: TrainConfig) -> dict[str, int]:
    """flops.batch_counts of the fullest batch: one sample a row, all tokens trained that are no
    picture's.
    """
    data, tokens = config.data, config.data.tokens_per_row
    visual = min(tokens, data.tiles_per_row * config.model.tokens_per_tile)
    return {
        "tokens": data.rows * tokens,
        "trained_tokens": data.rows * (tokens - visual),
        "tiles": data.rows * data.tiles_per_row,
        "pairs": data.rows * tokens * (tokens + 1) // 2,
    }


def train_work(share: PerDevice, memory: Memory) -> StepCost:
    counts, devices = full_batch(share.config), share.topology.count
    needed = (
        flops.train_flops(
            share.config.model, counts, share.learns("vision/"), bool(share.config.lora.rank)
        )
        / devices
    )
    computed = _tower(share, counts) | _decoder(share, counts) | _reference(share, counts)
    return StepCost(
        needed,
        {name: value / devices for name, value in computed.items()},
        _memory_traffic(share, memory),
        _gathers(share) | _exchanges(share),
    )


def times(
    work: StepCost, topology: Topology, collectives: list[Collectives] | None = None
) -> Times:
    """collectives: of the compiled program; they take the place of the analysis' own traffic."""
    if collectives is None:
        traffic = work.network.values()
    else:
        traffic = [Traffic(row.bytes, row.group) for row in collectives]

    def seconds(parts) -> float:
        return sum(topology.seconds(part.bytes, part.group, part.stride) for part in parts)

    return Times(
        compute=sum(work.computed.values()) / topology.chip.flops,
        memory=sum(work.memory_bytes.values()) / topology.chip.memory_bytes,
        network=seconds(traffic),
        awaited=seconds(part for part in work.network.values() if part.awaited),
        ideal=work.needed / topology.chip.flops,
    )


# --- floating-point operations, of all devices ---------------------------------------------------


def _tower(share: PerDevice, counts: dict[str, int]) -> dict[str, float]:
    vision, policy = share.config.model.vision, share.config.remat_vision
    length, width, ff = 1 + vision.grid**2, vision.hidden_size, vision.intermediate_size
    kernel = -(-length // 384) * 384 if share.tpu and length >= 256 else length
    products = {"qkv": 3 * width**2, "rest": width**2 + 2 * width * ff}
    dense = 2 * length * sum(products.values())
    attention = 4 * kernel**2 * width
    embedding = 2 * (length - 1) * 3 * vision.patch_size**2 * width
    forward = flops.forward_flops(share.config.model)
    layers = vision.num_layers * counts["tiles"]
    passes = (
        3
        if share.trains("projector/")
        else 2
        if share.learns("projector/") or share.learns("vision/")
        else 1
    )
    result = {"projector": passes * counts["tiles"] * forward.projector_tile}
    if not share.learns("vision/"):
        return result | {
            "tower": layers * dense + counts["tiles"] * embedding,
            "tower, attention": layers * attention,
        }
    again = {"none": 0, "dots": 0, "attention": 2 * length * products["rest"]}.get(policy, dense)
    scores_again = 1 if policy in ("dots", "full", "offload") else 0
    return result | {
        "tower": layers * (3 if share.trains("vision/layers/") else 2) * dense
        + counts["tiles"] * 2 * embedding,
        "tower's adapters": 6 * length * counts["tiles"] * share.adapters("vision/"),
        "tower, recomputed": layers * (again + scores_again * attention),
        "tower, attention": layers * attention * (1 + _BACKWARD[share.tpu] / 2),
    }


def _reference(share: PerDevice, counts: dict[str, int]) -> dict[str, float]:
    """MPO's other model, or the base without adapters: one pass forward; and the head once more for
    either model.
    """
    config = share.config
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


def _decoder(share: PerDevice, counts: dict[str, int]) -> dict[str, float]:
    language, policy = share.config.model.language, share.config.remat_language
    width, ff = language.hidden_size, language.intermediate_size
    heads, keys = language.num_heads * language.head_dim, language.num_kv_heads * language.head_dim
    matrices = {
        "qkv": width * (heads + 2 * keys),
        "o": width * heads,
        "up": 2 * width * ff,
        "down": width * ff,
    }
    dense = 2 * counts["tokens"] * sum(matrices.values())
    # The product with "down" is the last of a layer: the backward pass does not need it.
    again = {
        "none": 0,
        "dots": 0,
        "attention": 2 * counts["tokens"] * (matrices["o"] + matrices["up"]),
    }.get(policy, dense - 2 * counts["tokens"] * matrices["down"])
    tokens = share.config.data.tokens_per_row
    blocks = (tokens + min(_BLOCK, tokens)) / (tokens + 1) if share.tpu else 1
    attention = 4 * counts["pairs"] * blocks * heads
    scores_again = 1 if policy in ("dots", "full", "offload") else 0
    passes = 3 if share.trains("language/layers/") else 2
    head = "language/embedding" if language.tie_embeddings else "language/head"
    return {
        "decoder": language.num_layers * passes * dense,
        "decoder, recomputed": language.num_layers * (again + scores_again * attention),
        "decoder, attention": language.num_layers * attention * (1 + _BACKWARD[share.tpu] / 2),
        "decoder's adapters": 6 * counts["tokens"] * share.adapters("language/"),
        "head": (3 if share.trains(head) else 2)
        * counts["trained_tokens"]
        * 2
        * width
        * language.padded_vocab_size,
    }


# --- bytes ---------------------------------------------------------------------------------------


def _memory_traffic(share: PerDevice, memory: Memory) -> dict[str, float]:
    """What must be read and written at least: the optimizer's update, and for each micro-batch the
    matrices as often as they are used and what is saved once each way.
    """
    config = share.config
    used = (
        _used_bytes(share, "language/layers/")
        + _used_bytes(share, "vision/layers/")
        + _used_bytes(share, "projector/")
    )
    gradients = sum(4 * math.prod(leaf.shape) for leaf in share.leaves.values() if leaf.trained)
    return {
        "update": 2 * (memory.params + memory.opt_state) + 2 * gradients,
        # written when gathered, read forward, again and backward
        "matrices": 4.0 * used * config.micro_batches,
        "saved": 2.0 * sum(memory.saved.values()) * config.micro_batches,
    }


def _used_bytes(share: PerDevice, start: str, each: float | None = None) -> float:
    """All matrices under a path as one device uses them, or with so many bytes for each element."""
    split = share.tensor if start.startswith("language/") else 1
    return share.elements(start) / split * (_array_bytes(share, 1) if each is None else each)


def _gathers(share: PerDevice) -> dict[str, Traffic]:
    """Matrices to where they are used, and their gradients back; over the axes that they are split
    over.
    """
    config, micro, mesh = share.config, share.config.micro_batches, share.mesh
    language = config.model.language
    everywhere = share.shards * share.tensor
    tower = _used_bytes(share, "vision/", share.kernel_bytes) * (1 - 1 / everywhere)
    projector = _used_bytes(share, "projector/") * (1 - 1 / everywhere)
    decoder = _used_bytes(share, "language/layers/", share.kernel_bytes) * (1 - 1 / share.shards)
    head = _array_bytes(
        share, language.hidden_size * language.padded_vocab_size // share.tensor
    ) * (1 - 1 / share.shards)
    back, trained = share.learns("vision/"), share.trains("vision/")
    copies = mesh["slice"] * mesh["data"]
    local = sum(4 * math.prod(leaf.shape) for leaf in share.leaves.values() if leaf.trained)
    # The head's gradient is summed in float32.
    sums = decoder * share.trains("language/layers/") + head * (
        4 / _array_bytes(share, 1)
    ) * share.trains("language/head")
    inside = mesh["tensor"] * mesh["context"]
    stride = mesh["tensor"] if mesh["context"] == 1 else 1
    twice = {
        group: 2 if share.topology.gathers_by_sums(group) else 1
        for group in (share.shards, everywhere)
    }
    gathered = (decoder * 2 * micro + head) * twice[share.shards]
    others = (tower * (1 + back) + projector * 2) * micro * twice[everywhere]
    return {
        "decoder, gathered": Traffic(gathered, share.shards, stride),
        "tower and projector, gathered": Traffic(others, everywhere),
        "decoder's gradients": Traffic(sums * micro, share.shards, stride),
        "tower's and projector's gradients": Traffic(
            (tower * trained + projector * share.trains("projector/")) * micro, everywhere
        ),
        "gradients of copies": Traffic(
            2 * local * (1 - 1 / copies) * micro, copies, mesh["fsdp"] * inside
        ),
    }


def _exchanges(share: PerDevice) -> dict[str, Traffic]:
    """Activations over tensor and context."""
    language, config = share.config.model.language, share.config
    tensor, context, micro = share.tensor, share.mesh["context"], config.micro_batches
    stream = _array_bytes(share, share.tokens * language.hidden_size)
    recomputed = 0 if config.remat_language in ("none", "dots") else 1
    sums = 2 * (2 + 2 + recomputed) * stream * (1 - 1 / tensor)
    keys = (
        2
        * _array_bytes(share, share.tokens * language.num_kv_heads * language.head_dim)
        / tensor
        * (context - 1)
    )
    passes = 2 if config.remat_language in ("none", "attention") else 3
    members = tensor * context
    features = _array_bytes(
        share, share.tiles * config.model.tokens_per_tile * language.hidden_size
    ) * (members - 1)
    return {
        "activations": Traffic(language.num_layers * sums * micro, tensor, context, awaited=True),
        "keys and values": Traffic(
            language.num_layers * keys * (passes + 1) * micro, context, awaited=True
        ),
        "tiles to rows": Traffic(2 * features * micro, members, awaited=True),
        "embeddings": Traffic(2 * stream * micro * (1 - 1 / share.shards), share.shards),
    }


def _array_bytes(share: PerDevice, count: float) -> float:
    """Of so many values in the compute dtype."""
    return count * (2 if share.config.compute_dtype == "bfloat16" else 4)
