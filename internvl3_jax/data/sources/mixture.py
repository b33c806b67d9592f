"""Which rows of which source a mixture takes, and how many: repeats and head slices, samples left
out, weights.

Everything is arithmetic on numbers; no list of rows is ever made.
"""

import math
import os
import re
from collections.abc import Iterator, Sequence

import numpy as np

from internvl3_jax.config import DataConfig
from internvl3_jax.data.sources.files import read_bytes
from internvl3_jax.io.strict_json import decode, suggestion
from internvl3_jax.io.terminal import excerpt, one_line

MAX_DROP_LIST = 1 << 30  # bytes


class Selection:
    """Rows that one pass over a source takes, as a source of (source number, row) for grain."""

    def __init__(self, source: int, rows: int, repeat: float, left_out: Sequence[int] = ()):
        """rows: of the file; repeat: share from the head, or number of repeats with a head slice
        for the rest; left_out: rows.
        """
        self.source, self.rows = source, rows
        total = math.floor(rows * repeat + 1e-9)  # 0.7 * 10 is not 7 in binary
        gone = sorted(place for row in set(left_out) for place in range(row, total, rows))
        # Of each place that is gone, how many that remain come before it: adding it back to a
        # number is then a search.
        self.before = np.asarray(gone, np.int64) - np.arange(len(gone))
        self.length = total - len(gone)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[int, int]:
        place = index + int(np.searchsorted(self.before, index, side="right"))
        return self.source, place % self.rows


def read_drop_list(path: str, names: Sequence[str], lengths: Sequence[int]) -> dict[int, set[int]]:
    """Source number -> rows to leave out, from lines of source, row and reason with tabs between.
    "" is no list.

    Raises:
      ValueError: naming a line that is none, or whose source or row does not exist.
    """
    dropped: dict[int, set[int]] = {}
    for number, name, row, _ in drop_lines(path) if path else ():
        if name not in names:
            raise ValueError(
                f"{one_line(path)} line {number}: there is no source {excerpt(name)}; a line is source, row and reason with tabs "
                f"between{suggestion(name, names)}"
            )
        source = names.index(name)
        if row >= lengths[source]:
            raise ValueError(
                f"{one_line(path)} line {number}: {name} has no row {str(row)!r}; it has {lengths[source]:,}, counted from 0"
            )
        dropped.setdefault(source, set()).add(row)
    return dropped


def drop_lines(path: str) -> Iterator[tuple[int, str, int, str]]:
    """(line number, source, row, reason) of each line of a drop list. ValueError names a line that
    is none.
    """
    text = decode(read_bytes(os.path.expanduser(path), max_bytes=MAX_DROP_LIST), one_line(path))
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip(" \r") or line.startswith("#"):
            continue
        name, row, reason = [*line.rstrip("\r").split("\t", 2), "", ""][:3]
        if not re.fullmatch("[0-9]{1,18}", row.strip()):
            raise ValueError(
                f"{one_line(path)} line {number}: {one_line(name[:100])} has no row {excerpt(row)}; a line is source, row and reason with "
                f"tabs between, rows counted from 0"
            )
        yield number, name, int(row), reason


def mixture_weights(config: DataConfig, sources: Sequence, lengths: Sequence[int]) -> list[float]:
    """Share of each source in the mixture; they sum to 1.

    lengths: samples in one pass over each. Sources without any image or video share
        `config.language_share` of the samples if that is not negative; one with some of each counts
        among the others.
    """
    if config.weights == "given":
        missing = [source.name for source in sources if source.weight is None]
        if missing:
            raise ValueError(
                f"data.weights is given, but the meta JSON has no weight for {', '.join(missing)}"
            )
        weights = [float(source.weight) for source in sources]
    elif config.weights in ("length", "sqrt"):
        weights = [
            length if config.weights == "length" else math.sqrt(length) for length in lengths
        ]
    else:
        raise ValueError(f"data.weights is {config.weights!r}; it must be length, sqrt or given")
    if config.language_share >= 0:
        weights = _share_language(
            config.language_share, weights, [not source.has_images for source in sources]
        )
    if sum(weights) <= 0:
        raise ValueError(f"{config.source}: every source has weight 0")
    return [weight / sum(weights) for weight in weights]


def _share_language(share: float, weights: list[float], is_text: list[bool]) -> list[float]:
    if share > 1:
        raise ValueError(f"data.language_share is {share}; it is a share of the samples, at most 1")
    parts = {
        kind: sum(weight for weight, text in zip(weights, is_text, strict=True) if text == kind)
        for kind in (True, False)
    }
    for kind, wanted, name in ((True, share, "of text only"), (False, 1 - share, "with images")):
        if wanted > 0 and parts[kind] <= 0:
            raise ValueError(f"data.language_share is {share}, but no source {name} has a weight")
    wanted = {True: share, False: 1 - share}
    return [
        weight * wanted[text] / (parts[text] or 1)
        for weight, text in zip(weights, is_text, strict=True)
    ]
