"""What of a model is trained, how fast and at what cost in memory; and a proof that the rest has
not changed.
"""

import dataclasses
import math

import jax
import numpy as np

from internvl3_jax.checkpoints.param_hash import tree_hash
from internvl3_jax.config import OptimizerConfig
from internvl3_jax.training.optimizer import (
    is_stacked_matrix,
    make_optimizer,
    path_name,
    relative_rates,
    split_params,
)

# What a path starts with; of several, the longest.
COMPONENTS = {
    "vision": "vision/",
    "projector": "projector/",
    "embedding": "language/embedding",
    "language layers": "language/",
    "head": "language/head/",
    "vision adapters": "lora/vision/",
    "projector adapters": "lora/projector/",
    "language adapters": "lora/language/",
}


@dataclasses.dataclass(frozen=True)
class Component:
    """A row of the table. Counts include the rows that pad the vocabulary."""

    name: str
    parameters: int
    trained: int  # of them
    # lowest and highest learning rate at the peak; 0 where all is frozen
    rates: tuple[float, float]
    dtypes: tuple[str, ...]
    param_bytes: int
    state_bytes: int  # of the optimizer


def component_table(params: dict, config: OptimizerConfig) -> list[Component]:
    """One row for each component of the model that is there, and their sum. `params` may be
    ShapeDtypeStructs.
    """
    trained, _ = split_params(params, config.freeze)
    rates = dict(_leaves(relative_rates(trained, config)))
    optimizer = make_optimizer(dataclasses.replace(config, schedule="cosine", warmup_steps=0), 1)
    # A state's leaf lies under the path of its parameter, whatever the optimizer puts before it.
    state = jax.tree.leaves_with_path(jax.eval_shape(optimizer.init, params))
    state = [
        ("/".join(str(key.key) for key in path if hasattr(key, "key")), leaf)
        for path, leaf in state
    ]

    def row(name: str, belongs) -> Component:
        leaves = [(path, leaf) for path, leaf in _leaves(params) if belongs(path)]
        peaks = [_peak(leaf, config) * rates[path] for path, leaf in leaves if path in rates] or [
            np.zeros(1)
        ]
        return Component(
            name,
            parameters=sum(leaf.size for _, leaf in leaves),
            trained=sum(leaf.size for path, leaf in leaves if path in rates),
            rates=(
                float(min(peak.min() for peak in peaks)),
                float(max(peak.max() for peak in peaks)),
            ),
            dtypes=tuple(sorted({str(leaf.dtype) for _, leaf in leaves})),
            param_bytes=sum(_bytes(leaf) for _, leaf in leaves),
            state_bytes=sum(_bytes(leaf) for path, leaf in state if belongs(path)),
        )

    rows = [row(name, lambda path, name=name: _component(path) == name) for name in COMPONENTS]
    return [found for found in rows if found.parameters] + [row("all", lambda path: True)]


def format_table(rows: list[Component]) -> str:
    """The table as text."""
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
    """`checksum.tree_hash` of the frozen leaves."""
    return tree_hash(dict(_leaves(split_params(params, freeze)[1])))


def _component(path: str) -> str:
    """The component with the longest beginning of the path; "" for the optimizer's counters."""
    starts = {start: name for name, start in COMPONENTS.items() if path.startswith(start)}
    return starts[max(starts, key=len)] if starts else ""


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
