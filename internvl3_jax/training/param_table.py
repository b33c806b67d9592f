"""Table of a model's components (size, learning rate, memory), and a hash of frozen parameters."""

import dataclasses
import math

import jax
import numpy as np

from internvl3_jax.checkpoints.param_hash import tree_hash
from internvl3_jax.config import OptimizerConfig
from internvl3_jax.param_tree import path_name
from internvl3_jax.training.optimizer import (
    is_stacked_matrix,
    make_optimizer,
    relative_rates,
    split_params,
)

# Component -> how the paths of its parameters begin. The longest of several matches counts.
COMPONENTS = {
    "vision": "vision/",
    "projector": "projector/",
    "flash projector": "flash/projector/",
    "router": "flash/",
    "embedding": "language/embedding",
    "language layers": "language/",
    "head": "language/head/",
    "vision adapters": "lora/vision/",
    "projector adapters": "lora/projector/",
    "language adapters": "lora/language/",
}


@dataclasses.dataclass(frozen=True)
class Component:
    """A row of the table.

    Attributes:
      name: The component, or "all".
      parameters: Number of parameters, rows that pad the vocabulary included. A quantized kernel
        counts the parameters that it had before.
      trained: How many of them the optimizer updates.
      rates: Lowest and highest learning rate at the schedule's peak; 0 where all is frozen.
      dtypes: Dtypes of the stored leaves.
      param_bytes: Bytes of the parameters.
      state_bytes: Bytes of their optimizer state.
    """

    name: str
    parameters: int
    trained: int
    rates: tuple[float, float]
    dtypes: tuple[str, ...]
    param_bytes: int
    state_bytes: int


def component_table(params: dict, config: OptimizerConfig) -> list[Component]:
    """Returns one row for each component that the model has, and a row "all" with their sums.

    Args:
      params: The parameter tree; its leaves may be ShapeDtypeStructs.
    """
    leaves = _leaves(params)
    trained, _ = split_params(params, config.freeze)
    rates = dict(_leaves(relative_rates(trained, config)))

    # Bytes of optimizer state of each parameter. The last part of a state leaf's path is that of
    # its parameter; optax puts fields, indices and labels ("muon") before it. Counters have none.
    optimizer = make_optimizer(dataclasses.replace(config, schedule="cosine", warmup_steps=0), 1)
    state_bytes: dict[str, int] = {}
    for state_path, leaf in _leaves(jax.eval_shape(optimizer.init, params)):
        names = state_path.split("/")
        suffixes = ("/".join(names[start:]) for start in range(len(names)))
        path = next((suffix for suffix in suffixes if suffix in rates), "")
        state_bytes[path] = state_bytes.get(path, 0) + _bytes(leaf)

    def row(name: str, belongs) -> Component:
        own = [(path, leaf) for path, leaf in leaves if belongs(path)]
        peaks = [_peak(leaf, config) * rates[path] for path, leaf in own if path in rates]
        peaks = peaks or [np.zeros(1)]
        return Component(
            name,
            parameters=sum(_count(path, leaf) for path, leaf in own),
            trained=sum(_count(path, leaf) for path, leaf in own if path in rates),
            rates=(
                float(min(peak.min() for peak in peaks)),
                float(max(peak.max() for peak in peaks)),
            ),
            dtypes=tuple(sorted({str(leaf.dtype) for _, leaf in own})),
            param_bytes=sum(_bytes(leaf) for _, leaf in own),
            state_bytes=sum(size for path, size in state_bytes.items() if belongs(path)),
        )

    rows = [row(name, lambda path, name=name: _component(path) == name) for name in COMPONENTS]
    return [component for component in rows if component.parameters] + [row("all", lambda _: True)]


def format_table(rows: list[Component]) -> str:
    """Returns the table as aligned text, a line for each row and one for the heading."""
    cells = [
        (
            "component",
            "parameters",
            "trained",
            "learning rate",
            "dtype",
            "params MiB",
            "optimizer MiB",
        )
    ]
    for row in rows:
        low, high = (f"{rate:.3g}" for rate in row.rates)
        rate = "-" if not row.trained else low if low == high else f"{low} to {high}"
        sizes = (f"{size / 2**20:,.1f}" for size in (row.param_bytes, row.state_bytes))
        cells.append(
            (
                row.name,
                f"{row.parameters:,}",
                f"{row.trained:,}",
                rate,
                ", ".join(row.dtypes),
                *sizes,
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in cells]
    return "\n".join("  ".join(line) for line in lines)


def frozen_hash(params: dict, freeze: tuple[str, ...]) -> str:
    """Returns `param_hash.tree_hash` of the leaves that `freeze` matches."""
    return tree_hash(dict(_leaves(split_params(params, freeze)[1])))


def _component(path: str) -> str:
    """Returns the component of a parameter's path, or "" if it has none."""
    starts = {start: name for name, start in COMPONENTS.items() if path.startswith(start)}
    return starts[max(starts, key=len)] if starts else ""


def _count(path: str, leaf) -> int:
    """Parameters that a leaf holds: NF4 packs two into a byte, and scales are none."""
    name = path.rpartition("/")[2]
    return 0 if name == "scales" else 2 * leaf.size if name == "nf4" else leaf.size


def _peak(leaf, config: OptimizerConfig) -> float:
    return (
        config.muon_learning_rate
        if config.name == "muon" and is_stacked_matrix(leaf)
        else config.learning_rate
    )


def _leaves(tree):
    return [(path_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]


def _bytes(leaf) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize
