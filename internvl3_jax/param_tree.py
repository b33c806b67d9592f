"""Trees of parameters: paths as text, or chosen by the regular expressions of a config, and stacked
layers as separate ones.
"""

import difflib
import re
from collections.abc import Iterable

import jax
import numpy as np


def path_name(path) -> str:
    """Returns a path of `jax.tree_util` as text, such as "0/mu/vision/layers/fc1/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def own(tree: dict) -> dict:
    """Returns a tree with dicts of its own and the same leaves, for functions that empty it."""
    return {name: own(node) if isinstance(node, dict) else node for name, node in tree.items()}


def unstack(layers: dict, count: int) -> list[dict]:
    """Turns stacked leaves [L, ...] into a tree per layer, and empties `layers`.

    Layers in the memory of a CPU are parts of the stacked leaf and need no memory of their own.
    Elsewhere they are copies. Each leaf is taken out of `layers` when it is copied, so that it is
    freed before the next one if nothing else refers to it: memory holds one leaf twice.
    """
    trees = [{} for _ in range(count)]
    for name in list(layers):
        node = layers.pop(name)
        if isinstance(node, dict):
            parts = unstack(node, count)
        else:
            parts = jax.block_until_ready([_layer(node, index) for index in range(count)])
        for tree, part in zip(trees, parts, strict=True):
            tree[name] = part
        del node
    return trees


def _layer(leaf: jax.Array, index: int) -> jax.Array:
    """Returns a layer of a stacked leaf, without a copy if the leaf is in the memory of one CPU."""
    is_array = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
    if not is_array or [device.platform for device in leaf.devices()] != ["cpu"]:
        return leaf[index]
    # device_put takes NumPy's memory as it is; where a small layer is not aligned, it copies.
    return jax.device_put(np.asarray(leaf)[index], leaf.sharding if leaf.committed else None)


def match_paths(
    pattern: str, paths: Iterable[str], field: str, kind: str = "parameter"
) -> list[str]:
    """Returns the paths that `pattern` matches in full.

    Args:
      field: The field of the configuration that holds the pattern, for messages.
      kind: What the paths are of, for messages.

    Raises:
      ValueError: The pattern is not a regular expression, or matches no path.
    """
    try:
        matches = [path for path in paths if re.fullmatch(pattern, path)]
    except re.error as error:
        raise ValueError(f"{field}: {pattern!r} is not a regular expression: {error}") from error
    if not matches:
        literal = re.sub(r"[\\^$.*+?(){}\[\]|]", "", pattern)
        similar = difflib.get_close_matches(literal, paths, n=3, cutoff=0.0)
        raise ValueError(
            f"{field}: {pattern!r} matches no full path of a {kind}; similar paths: "
            f"{', '.join(similar)}"
        )
    return matches
