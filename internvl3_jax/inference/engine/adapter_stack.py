"""All LoRA adapters of the decoder in one tree, from which each row takes its own.

N adapters and the base, R the highest rank; lower ranks are filled up with zeros, which add
nothing.
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from internvl3_jax.model import lora


def stacked(trees: Sequence[Mapping]) -> dict:
    """Stacks adapters in the generation layout: a [N+1,in,R] and b [N+1,R,out] of each layer.

    Number 0 is the base, which has zeros. A layer that an adapter lacks has zeros, too.
    """
    flat = [lora.flat_adapters(tree) for tree in trees]
    paths = sorted({path for tree in flat for path in tree})
    rank = max((adapter["a"].shape[-1] for tree in flat for adapter in tree.values()), default=0)

    def stack(path):
        some = next(tree[path] for tree in flat if path in tree)
        none = {name: jnp.zeros_like(leaf) for name, leaf in some.items()}
        parts = [_padded(tree.get(path, none), rank) for tree in [{path: none}, *flat]]
        return {name: jnp.stack([part[name] for part in parts]) for name in ("a", "b")}

    return lora.nested_adapters({path: stack(path) for path in paths})


def _padded(adapter: Mapping, rank: int) -> dict:
    missing = rank - adapter["a"].shape[-1]
    return {
        "a": jnp.pad(adapter["a"], ((0, 0), (0, missing))),
        "b": jnp.pad(adapter["b"], ((0, missing), (0, 0))),
    }
