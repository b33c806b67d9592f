"""Trees of parameters: paths as text, or chosen by the regular expressions of a config, and stacked
layers as separate ones.
"""

import difflib
import re
from collections.abc import Iterable

import jax


def path_name(path) -> str:
    """Returns a path of `jax.tree_util` as text, such as "0/mu/vision/layers/fc1/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def own(tree: dict) -> dict:
    """Returns a tree with dicts of its own and the same leaves, for functions that empty it."""
    return {name: own(node) if isinstance(node, dict) else node for name, node in tree.items()}


def unstack(layers: dict, count: int) -> list[dict]:
    """Copies stacked leaves [L, ...] to a tree per layer, and empties `layers`.

    Each leaf is taken out of `layers` when it is copied, so that it is freed before the next one if
    nothing else refers to it: memory holds one leaf twice.
    """
    trees = [{} for _ in range(count)]
    for name in list(layers):
        node = layers.pop(name)
        if isinstance(node, dict):
            parts = unstack(node, count)
        else:
            parts = jax.block_until_ready([node[index] for index in range(count)])
        for tree, part in zip(trees, parts, strict=True):
            tree[name] = part
        del node
    return trees


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
