"""Regular expressions of a configuration that choose parameters or layers by their whole paths."""

import difflib
import re
from collections.abc import Iterable


def matching(pattern: str, paths: Iterable[str], field: str, what: str = "parameter") -> list[str]:
    """The paths that match as a whole. ValueError naming the configuration's `field` if the pattern
    is none, or matches no `what`.
    """
    try:
        found = [path for path in paths if re.fullmatch(pattern, path)]
    except re.error as error:
        raise ValueError(f"{field}: {pattern!r} is no regular expression: {error}") from error
    if not found:
        near = difflib.get_close_matches(
            re.sub(r"[\\^$.*+?(){}\[\]|]", "", pattern), paths, n=3, cutoff=0.0
        )
        raise ValueError(
            f"{field}: {pattern!r} matches no {what}'s whole path; near ones: {', '.join(near)}"
        )
    return found
