"""Predicts memory and time of generation: its three programs, encode, prefill and decode."""

import dataclasses
import math
from collections.abc import Callable

import jax

from internvl3_jax.config import TrainConfig
from internvl3_jax.fit import report
from internvl3_jax.fit.compilation import Compiled, compile_for
from internvl3_jax.fit.lowering import (
    Requests,
    cache_shapes,
    generation_params,
    lower_generation,
)
from internvl3_jax.fit.per_device import stored
from internvl3_jax.fit.topology import Topology
from internvl3_jax.inference import programs
from internvl3_jax.parallel.sharding import AXES, BATCH_AXES, make_mesh, mesh_shape
from internvl3_jax.training import flops

GIB = 2**30
PROGRAMS = ("encode", "prefill", "decode")


@dataclasses.dataclass(frozen=True)
class Need:
    """Needs of generation on one device, by the analysis.

    Attributes:
      params: Bytes of the parameters.
      cache: Bytes of the key/value cache.
      beside: For each program the bytes of parameters and cache that it does not use.
      work: For each program the bytes of its temporaries.
      flops: FLOPs of one call of each program.
      read: Bytes that one call of each program reads.
    """

    params: int
    cache: int
    beside: dict[str, int]
    work: dict[str, int]
    flops: dict[str, float]
    read: dict[str, float]

    def peak(self, program: str) -> int:
        """Returns the bytes in use while a program runs.

        The cache counts for all: tiles of the next prompts may be encoded while it is in use.
        """
        return self.params + self.cache + self.work[program]

    def seconds(self, program: str, chip) -> float:
        """Returns the lower bound of the time of one call, without the network."""
        return max(self.flops[program] / chip.flops, self.read[program] / chip.memory_bytes)


def answer(
    config: TrainConfig,
    topology: Topology,
    requests: Requests,
    analytic: bool,
    show: Callable[[str], None],
) -> tuple[bool, dict]:
    """Predicts the three programs and shows the result.

    Args:
      analytic: Do not compile.
      show: Called with each line.

    Returns:
      Whether all programs fit, and a dict for JSON.
    """
    mesh = mesh_shape(config.mesh, topology.count)
    need = needed(config, topology, requests)
    show(report.heading(config, topology, mesh, "generation"))
    show(
        f"  {requests.rows} answers at a time: prompts of {requests.prompt:,} tokens "
        f"(padded to {requests.length:,}), {requests.new:,} new ones, {requests.slots:,} slots of "
        f"cache; {requests.tiles} tiles per call; {config.compute_dtype}{_quantized(requests)}"
    )
    show(
        f"\nmemory of one device, GiB\n  parameters {need.params / GIB:.2f}, "
        f"cache {need.cache / GIB:.2f}"
    )

    # One program after the other, since a compilation can take minutes.
    compiled, fits = {}, True
    if not analytic:
        lowered = lower_generation(config, make_mesh(config.mesh, topology.devices()), requests)
    for program in PROGRAMS:
        if not analytic:
            compiled[program] = compile_for(lowered[program], topology)
        show(_line(program, need, topology, requests, compiled.get(program)))
        fits &= _fits(program, need, topology, compiled.get(program))

    analysis = {program: need.peak(program) for program in PROGRAMS}
    seconds = {}
    if topology.chip:
        seconds = {program: need.seconds(program, topology.chip) for program in PROGRAMS}
    return fits, {
        "topology": topology.name,
        "devices": topology.count,
        "mesh": mesh,
        "requests": dataclasses.asdict(requests),
        "analysis": analysis
        | {"parameters": need.params, "cache": need.cache, "beside": need.beside},
        "floor_seconds": seconds,
        "compiler": {program: report.compiler_row(row) for program, row in compiled.items()},
    }


def needed(config: TrainConfig, topology: Topology, requests: Requests) -> Need:
    """Returns what generation needs on one device, by the analysis."""
    sizes = mesh_shape(config.mesh, topology.count)
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), AXES)
    tpu = topology.chip is not None and topology.chip.torus > 0

    def shard_bytes(tree) -> int:
        return sum(
            stored(leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize, tpu)
            for leaf in jax.tree.leaves(tree)
        )

    # Bytes that live through all programs.
    params = generation_params(config, mesh, requests)
    cache = shard_bytes(cache_shapes(config, mesh, requests))
    decoder = shard_bytes(params["language"])
    unread = shard_bytes(_experts(params["language"])) * _unchosen(config, requests.rows)
    tower = shard_bytes(params["vision"]) + shard_bytes(params["projector"])

    # Rows and tiles of a device; what does not divide is replicated.
    language, tensor = config.model.language, sizes["tensor"]
    row_shards = math.prod(sizes[axis] for axis in BATCH_AXES)
    rows = requests.rows // row_shards if requests.rows % row_shards == 0 else requests.rows
    tiles = requests.tiles
    if tiles % topology.count == 0:
        tiles = math.ceil(tiles / topology.count)

    # Temporaries: a layer's arrays, and the logits of one token per row.
    relaid = 0
    if tpu and sizes["fsdp"] * sizes["context"] > 1:
        relaid = shard_bytes(_relaid_kernels(params["language"])) // 2
    prefill_logits = rows * language.padded_vocab_size // tensor * 4
    decode_logits = rows * language.padded_vocab_size * 4
    # Decoding reads the cache up to the middle of an answer, on average.
    mean_cache = cache * (requests.prompt + requests.new / 2) / requests.slots
    return Need(
        params=shard_bytes(params),
        cache=cache,
        beside={"encode": decoder + cache, "prefill": tower, "decode": tower},
        work={
            "encode": _encode_work(config, tiles),
            "prefill": _layer_work(config, rows * requests.length, tensor)
            + prefill_logits
            + relaid,
            "decode": _layer_work(config, rows, tensor) + decode_logits,
        },
        flops=_flops(config, topology, requests),
        read={
            "encode": tower,
            "prefill": decoder,
            "decode": programs.TOKENS_PER_CALL * (decoder - unread + mean_cache),
        },
    )


def _experts(decoder: dict) -> list:
    """Returns the experts' kernels of all layers."""
    return [
        layer["experts"]
        for name, layer in decoder.items()
        if name.startswith("layer_") and "experts" in layer
    ]


def _unchosen(config: TrainConfig, rows: int) -> float:
    """Returns the share of experts that none of `rows` tokens chooses, where all are as likely."""
    language = config.model.language
    if not language.num_experts:
        return 0.0
    return (1 - language.experts_per_token / language.num_experts) ** rows


def _quantized(requests: Requests) -> str:
    weights, cache = requests.weights, requests.cache
    tower = " with the tower" if requests.quantize_tower else ""
    return (f", {weights} weights{tower}" if weights else "") + (f", {cache} cache" * bool(cache))


def _relaid_kernels(decoder: dict) -> list:
    """Returns the kernels that a TPU compiler copies to another layout after an all-gather.

    In compiled programs about half of them are copied before they are needed.
    """
    layers = [layer for name, layer in decoder.items() if name.startswith("layer_")]
    return [
        jax.tree.leaves(layer[name]["kernel"])
        for layer in layers
        for name in ("up", "down")
        if name in layer
    ]


def _flops(config: TrainConfig, topology: Topology, requests: Requests) -> dict[str, float]:
    """Returns the FLOPs of one call of each program on one device."""
    forward, devices = flops.forward_flops(config.model), topology.count
    prompt, context = requests.prompt, requests.prompt + requests.new / 2
    pairs = prompt * (prompt + 1) / 2
    prefill = prompt * forward.language_token + pairs * forward.language_pair + forward.head
    token = forward.language_token + context * forward.language_pair + forward.head
    return {
        "encode": requests.tiles * (forward.vision_tile + forward.projector_tile) / devices,
        "prefill": requests.rows * prefill / devices,
        "decode": programs.TOKENS_PER_CALL * requests.rows * token / devices,
    }


def _layer_work(config: TrainConfig, tokens: int, tensor: int) -> int:
    """Returns the bytes of a decoder layer's arrays.

    They are the stream, the visual features, attention's arrays and the halves of the MLP.
    """
    language = config.model.language
    width = language.hidden_size
    attention = (2 * language.num_heads + 2 * language.num_kv_heads) * language.head_dim // tensor
    mlp = 2 * language.intermediate_size // tensor
    if language.num_experts:  # the tokens that experts take, their halves and their outputs
        chosen = language.experts_per_token
        mlp = chosen * (2 * width + 3 * language.expert_size // tensor)
    values = tokens * (3 * width + attention + mlp)
    return values * _itemsize(config)


def _encode_work(config: TrainConfig, tiles: int) -> int:
    """Returns the bytes of a tower layer's arrays."""
    vision = config.model.vision
    tokens = tiles * (1 + vision.grid**2)
    return tokens * (6 * vision.hidden_size + 2 * vision.intermediate_size) * _itemsize(config)


def _itemsize(config: TrainConfig) -> int:
    return 2 if config.compute_dtype == "bfloat16" else 4


def _fits(program: str, need: Need, topology: Topology, compiled: Compiled | None) -> bool:
    if topology.chip is None:
        return True
    if compiled is None:
        return need.peak(program) <= topology.chip.usable
    peak = compiled.peak + need.beside[program]
    return not compiled.out_of_memory and peak <= compiled.available


def _line(
    program: str, need: Need, topology: Topology, requests: Requests, compiled: Compiled | None
) -> str:
    """Returns the lines of one program: its peak and, on an accelerator, its lower bounds."""
    # The peak.
    line = f"  {program:<8} peak by the analysis {need.peak(program) / GIB:.2f}"
    if compiled is not None:
        failed = ", failed to compile" if compiled.out_of_memory else ""
        line += (
            f", by the compiler {compiled.peak / GIB:.2f} + {need.beside[program] / GIB:.2f} that "
            f"it does not use{failed}"
        )
    if topology.chip is None:
        return line
    available = topology.chip.usable if compiled is None else compiled.available
    verdict = "fits" if _fits(program, need, topology, compiled) else "DOES NOT FIT"

    # The lower bounds.
    seconds, network = need.seconds(program, topology.chip), ""
    bound = seconds
    if compiled is not None and not compiled.out_of_memory:
        network_seconds = _network_seconds(compiled, topology)
        network = f", network {network_seconds * 1e3:.1f} ms"
        bound = max(seconds, network_seconds)
    token = bound / programs.TOKENS_PER_CALL
    rate = {
        "encode": f"{requests.tiles / bound:,.0f} tiles/s",
        "prefill": f"{requests.rows * requests.prompt / bound:,.0f} tokens/s",
        "decode": f"{requests.rows / token:,.0f} tokens/s in all, {token * 1e3:.2f} ms a token",
    }[program]
    return (
        f"{line} of {available / GIB:.2f}, {verdict}\n           lower bounds of a call: compute "
        f"and memory {seconds * 1e3:.1f} ms{network}; at most {rate}"
    )


def _network_seconds(compiled: Compiled, topology: Topology) -> float:
    """Returns the least time of a call's collectives.

    The only loop whose length the text may not tell is that over tokens.
    """
    return sum(
        topology.seconds(row.bytes * (programs.TOKENS_PER_CALL if row.unknown else 1), row.group)
        for row in compiled.collectives
    )
