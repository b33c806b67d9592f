"""The tensors of a Flash model's router and second projector, by leaf.

Only the original layout has them: transformers has no Flash model.
"""

from collections.abc import Iterator
from typing import NamedTuple


class Linear(NamedTuple):
    """A linear layer, or with one axis a LayerNorm. Axes are those of mapping.py."""

    leaf: str
    shape: str
    name: str


_NUMBERS = range(1, 5)
_MODULES = (
    Linear("projector/norm", "G", "mlp2.0"),
    Linear("projector/fc1", "G 2D", "mlp2.1"),
    Linear("projector/fc2", "2D 2D", "mlp2.4"),
    Linear("projector/fc3", "2D D", "mlp2.7"),
    *(
        part
        for n in _NUMBERS
        for part in (
            Linear(f"pooling/attn{n}/out", "C C", f"pooling_before_gating.attn{n}.out_proj"),
            Linear(f"pooling/norm{n}", "C", f"pooling_before_gating.norm{n}"),
            Linear(f"gating/block_{n - 1}/fc1", "C 4C", f"gating.block{n}.0"),
            Linear(f"gating/block_{n - 1}/fc2", "4C C", f"gating.block{n}.3"),
            Linear(f"gating/block_{n - 1}/norm", "C", f"gating.block{n}.5"),
        )
    ),
    Linear("gating/norm", "C", "gating.gate.0"),
    Linear("gating/gate", "C 2", "gating.gate.1"),
)


def flash_leaves() -> Iterator[tuple[str, str, str, str]]:
    """Yields (leaf, shape, name of the transform, name in the original layout)."""
    yield "flash/pooling/query", "1 C", "VECTOR", "pooling_before_gating.query_token"
    for n in _NUMBERS:
        leaf, name = f"flash/pooling/attn{n}/qkv", f"pooling_before_gating.attn{n}.in_proj"
        yield f"{leaf}/kernel", "C 3C", "LINEAR", f"{name}_weight"
        yield f"{leaf}/bias", "3C", "VECTOR", f"{name}_bias"
    for module in _MODULES:
        leaf, width = f"flash/{module.leaf}", module.shape.split()[-1]
        if width == module.shape:
            yield f"{leaf}/scale", width, "VECTOR", f"{module.name}.weight"
        else:
            yield f"{leaf}/kernel", module.shape, "LINEAR", f"{module.name}.weight"
        yield f"{leaf}/bias", width, "VECTOR", f"{module.name}.bias"
