"""Paths of parameters: as text, and chosen by the regular expressions of a config."""

import difflib
import re
from collections.abc import Iterable

import jax


def path_name(path) -> str:
    """Returns a path of `jax.tree_util` as text, such as "0/mu/vision/layers/fc1/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


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
