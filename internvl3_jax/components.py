"""What of a model is trained, how fast and at what cost in memory; and a proof that the rest has not changed."""

import dataclasses
import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np

from internvl3_jax.config import OptimizerConfig
from internvl3_jax.optimizer import is_stacked_matrix, make_optimizer, path_name, relative_rates, split_params
from internvl3_jax.sharding import constrain

# What a path starts with; of several, the longest.
COMPONENTS = {
    "vision": "vision/",
    "projector": "projector/",
    "embedding": "language/embedding",
    "language layers": "language/",
    "head": "language/head/",
}


@dataclasses.dataclass(frozen=True)
class Component:
    """A row of the table. Counts include the rows that pad the vocabulary."""

    name: str
    parameters: int
    trained: int  # of them
    rates: tuple[float, float]  # lowest and highest learning rate at the peak; 0 where all is frozen
    dtypes: tuple[str, ...]
    param_bytes: int
    state_bytes: int  # of the optimizer


def component_table(params: dict, config: OptimizerConfig) -> list[Component]:
    """One row for each component of the model that is there, and their sum. `params` may be ShapeDtypeStructs."""
    trained, _ = split_params(params, config.freeze)
    rates = dict(_leaves(relative_rates(trained, config)))
    optimizer = make_optimizer(dataclasses.replace(config, schedule="cosine", warmup_steps=0), 1)
    # A state's leaf lies under the path of its parameter, whatever the optimizer puts before it.
    state = jax.tree.leaves_with_path(jax.eval_shape(optimizer.init, params))
    state = [("/".join(str(key.key) for key in path if hasattr(key, "key")), leaf) for path, leaf in state]

    def row(name: str, belongs) -> Component:
        leaves = [(path, leaf) for path, leaf in _leaves(params) if belongs(path)]
        peaks = [_peak(leaf, config) * rates[path] for path, leaf in leaves if path in rates] or [np.zeros(1)]
        return Component(
            name,
            parameters=sum(leaf.size for _, leaf in leaves),
            trained=sum(leaf.size for path, leaf in leaves if path in rates),
            rates=(float(min(peak.min() for peak in peaks)), float(max(peak.max() for peak in peaks))),
            dtypes=tuple(sorted({str(leaf.dtype) for _, leaf in leaves})),
            param_bytes=sum(_bytes(leaf) for _, leaf in leaves),
            state_bytes=sum(_bytes(leaf) for path, leaf in state if belongs(path)),
        )

    rows = [row(name, lambda path, name=name: _component(path) == name) for name in COMPONENTS]
    return [found for found in rows if found.parameters] + [row("all", lambda path: True)]


def format_table(rows: list[Component]) -> str:
    """The table as text."""
    cells = [("component", "parameters", "trained", "learning rate", "dtype", "params MiB", "optimizer MiB")]
    for row in rows:
        low, high = (f"{rate:.3g}" for rate in row.rates)
        rate = "-" if not row.trained else low if low == high else f"{low} to {high}"
        sizes = (f"{size / 2**20:,.1f}" for size in (row.param_bytes, row.state_bytes))
        cells.append((row.name, f"{row.parameters:,}", f"{row.trained:,}", rate, ", ".join(row.dtypes), *sizes))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in cells]
    return "\n".join("  ".join(line) for line in lines)


def frozen_hash(params: dict, freeze: tuple[str, ...]) -> str:
    """Hash of the frozen leaves' bits, names and shapes: 16 hexadecimal digits, the same for every sharding.

    Any change inside one element changes it for certain: what enters a sum modulo 2^32 is a bijection of the element's bits, another
    one at each place. Changes of several elements go unnoticed about once in 2^64 times. One pass over the leaves where they are; two
    words of each come to the host.
    """
    frozen = dict(_leaves(split_params(params, freeze)[1]))
    sums = jax.device_get(_checksums(frozen))
    text = "\n".join(f"{path} {frozen[path].dtype} {frozen[path].shape} {sums[path].tolist()}" for path in sorted(frozen))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@jax.jit
def _checksums(leaves: dict) -> dict:
    return jax.tree.map(_checksum, leaves)


def _checksum(leaf):
    """u32[2]: two sums of the elements' bits, scattered in a way that depends on their place."""
    word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf, word).astype(jnp.uint32)
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, length in enumerate(leaf.shape):
        place = place * jnp.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    first = _mix(bits ^ _mix(place + 1))
    sums = jnp.stack([first.sum(dtype=jnp.uint32), _mix(first ^ jnp.uint32(0x9E3779B9)).sum(dtype=jnp.uint32)])
    return constrain(sums, None)  # on every device, so that every process can read it


def _mix(x):
    """A bijection of u32 that scatters neighbours (multiply and shift, as MurmurHash3's last step does)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def _component(path: str) -> str:
    """The component with the longest beginning of the path; "" for the optimizer's counters."""
    starts = {start: name for name, start in COMPONENTS.items() if path.startswith(start)}
    return starts[max(starts, key=len)] if starts else ""


def _peak(leaf, config: OptimizerConfig) -> float:
    return config.muon_learning_rate if config.name == "muon" and is_stacked_matrix(leaf) else config.learning_rate


def _leaves(tree):
    return [(path_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]


def _bytes(leaf) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize
