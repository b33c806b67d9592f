"""The answer for generation: the three programs of generate.py, each with its memory and floors."""

import dataclasses
import math
from collections.abc import Callable

import jax

from internvl3_jax.config import TrainConfig
from internvl3_jax.fit import report
from internvl3_jax.fit.build import Built, build
from internvl3_jax.fit.program import Requests, cache_shapes, generation_params, lower_generation
from internvl3_jax.fit.share import stored
from internvl3_jax.fit.topology import Topology
from internvl3_jax.inference import programs
from internvl3_jax.parallel.sharding import AXES, BATCH_AXES, make_mesh, mesh_shape
from internvl3_jax.training import flops

GIB = 2**30
PROGRAMS = ("encode", "prefill", "decode")


@dataclasses.dataclass(frozen=True)
class Need:
    """Of one device. Bytes; FLOPs of one call."""

    params: int
    cache: int
    beside: dict[str, int]  # of these what lies there while a program runs that does not use it
    work: dict[str, int]  # of each program, besides
    flops: dict[str, float]
    read: dict[str, float]  # bytes that a call must read

    def peak(self, program: str) -> int:
        # The cache is there while the tiles of the next prompts are encoded.
        return self.params + self.cache + self.work[program]

    def seconds(self, program: str, chip) -> float:
        return max(self.flops[program] / chip.flops, self.read[program] / chip.memory_bytes)


def answer(
    config: TrainConfig,
    topology: Topology,
    requests: Requests,
    analytic: bool,
    show: Callable[[str], None],
) -> tuple[bool, dict]:
    """Shows the answer: (whether all three programs fit, a row of a table)."""
    sizes = mesh_shape(config.mesh, topology.count)
    need = needed(config, topology, requests)
    show(report.heading(config, topology, sizes, "generation"))
    show(
        f"  {requests.rows} answers at a time: prompts of {requests.prompt:,} tokens (padded to {requests.length:,}), {requests.new:,} new "
        f"ones, {requests.slots:,} slots of cache; {requests.tiles} tiles at a time; {config.compute_dtype}"
    )
    show(
        f"\nmemory of one device, GiB\n  parameters {need.params / GIB:.2f}, cache {need.cache / GIB:.2f}"
    )
    built, fits = {}, True
    if not analytic:
        lowered = lower_generation(config, make_mesh(config.mesh, topology.devices()), requests)
    for program in PROGRAMS:
        if not analytic:
            built[program] = build(lowered[program], topology)
        show(_line(program, need, topology, requests, built.get(program)))
        fits &= _fits(program, need, topology, built.get(program))
    row = {
        "topology": topology.name,
        "devices": topology.count,
        "mesh": sizes,
        "requests": dataclasses.asdict(requests),
        "analysis": {program: need.peak(program) for program in PROGRAMS}
        | {"parameters": need.params, "cache": need.cache, "beside": need.beside},
        "floor_seconds": {program: need.seconds(program, topology.chip) for program in PROGRAMS}
        if topology.chip
        else {},
        "compiler": {program: report.compiler_row(found) for program, found in built.items()},
    }
    return fits, row


def needed(config: TrainConfig, topology: Topology, requests: Requests) -> Need:
    """By the analysis."""
    sizes = mesh_shape(config.mesh, topology.count)
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), AXES)
    tpu = topology.chip is not None and topology.chip.torus > 0
    params, cache = generation_params(config, mesh), cache_shapes(config, mesh, requests)

    def size_of(tree) -> int:
        leaves = jax.tree.leaves(tree)
        return sum(
            stored(leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize, tpu)
            for leaf in leaves
        )

    language, tensor = config.model.language, sizes["tensor"]
    parts = math.prod(sizes[axis] for axis in BATCH_AXES)
    rows = requests.rows // parts if requests.rows % parts == 0 else requests.rows
    tiles = (
        math.ceil(requests.tiles / topology.count)
        if requests.tiles % topology.count == 0
        else requests.tiles
    )
    decoder = size_of(params["language"])
    tower = size_of(params["vision"]) + size_of(params["projector"])
    return Need(
        params=size_of(params),
        cache=size_of(cache),
        beside={"encode": decoder + size_of(cache), "prefill": tower, "decode": tower},
        work={
            "encode": _encode_work(config, tiles),
            "prefill": _layer_work(config, rows * requests.length, tensor)
            + rows * language.padded_vocab_size // tensor * 4
            + (
                size_of(_turned(params["language"]))
                if tpu and sizes["fsdp"] * sizes["context"] > 1
                else 0
            )
            // 2,
            "decode": _layer_work(config, rows, tensor) + rows * language.padded_vocab_size * 4,
        },
        flops=_flops(config, topology, requests),
        read={
            "encode": tower,
            "prefill": decoder,
            # The context of an answer half way.
            "decode": programs.TOKENS_PER_CALL
            * (decoder + size_of(cache) * (requests.prompt + requests.new / 2) / requests.slots),
        },
    )


def _turned(decoder: dict) -> list:
    """Matrices that a TPU's compiler brings into another layout where they come from other devices,
    about half of them before they are needed: seen in the compiled texts.
    """
    layers = [layer for name, layer in decoder.items() if name.startswith("layer_")]
    return [layer[name]["kernel"] for layer in layers for name in ("up", "down") if name in layer]


def _flops(config: TrainConfig, topology: Topology, requests: Requests) -> dict[str, float]:
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
    """Arrays of one layer: the stream, what pictures put into it, queries, keys, values, the MLP's
    halves.
    """
    language = config.model.language
    width = language.hidden_size
    attention = (2 * language.num_heads + 2 * language.num_kv_heads) * language.head_dim // tensor
    return (
        tokens * (3 * width + attention + 2 * language.intermediate_size // tensor) * _size(config)
    )


def _encode_work(config: TrainConfig, tiles: int) -> int:
    vision = config.model.vision
    tokens = tiles * (1 + vision.grid**2)
    return tokens * (6 * vision.hidden_size + 2 * vision.intermediate_size) * _size(config)


def _size(config: TrainConfig) -> int:
    return 2 if config.compute_dtype == "bfloat16" else 4


def _fits(program: str, need: Need, topology: Topology, built: Built | None) -> bool:
    if topology.chip is None:
        return True
    if built is None:
        return need.peak(program) <= topology.chip.usable
    return not built.refused and built.peak + need.beside[program] <= built.available


def _line(
    program: str, need: Need, topology: Topology, requests: Requests, built: Built | None
) -> str:
    line = f"  {program:<8} peak by the analysis {need.peak(program) / GIB:.2f}"
    if built is not None:
        refused = ", refused" if built.refused else ""
        line += f", by the compiler {built.peak / GIB:.2f} + {need.beside[program] / GIB:.2f} beside it{refused}"
    if topology.chip is None:
        return line
    available = topology.chip.usable if built is None else built.available
    verdict = "fits" if _fits(program, need, topology, built) else "DOES NOT FIT"
    compiled = built is not None and not built.refused
    seconds = max(
        need.seconds(program, topology.chip), _network(built, topology) if compiled else 0.0
    )
    token = seconds / programs.TOKENS_PER_CALL
    what = {
        "encode": f"{requests.tiles / seconds:,.0f} tiles/s",
        "prefill": f"{requests.rows * requests.prompt / seconds:,.0f} tokens/s",
        "decode": f"{requests.rows / token:,.0f} tokens/s in all, {token * 1e3:.2f} ms a token",
    }[program]
    moved = f", network {_network(built, topology) * 1e3:.1f} ms" if compiled else ""
    return (
        f"{line} of {available / GIB:.2f}, {verdict}\n           floors of a call: compute and memory "
        f"{need.seconds(program, topology.chip) * 1e3:.1f} ms{moved}; at most {what}"
    )


def _network(built: Built, topology: Topology) -> float:
    """Seconds of a call's collectives. The one loop whose rounds the text may not tell is that over
    tokens.
    """
    return sum(
        topology.seconds(row.bytes * (programs.TOKENS_PER_CALL if row.unknown else 1), row.group)
        for row in built.collectives
    )
