"""Selects the rows of a mixture: repeats and head slices, excluded samples, weights.

Everything is arithmetic on row numbers; no list of rows is made.
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
    """The rows that one pass over a source takes, as (source number, row) for grain."""

    def __init__(self, source: int, rows: int, repeat: float, excluded: Sequence[int] = ()):
        """Selects rows.

        Args:
          rows: Number of rows of the source.
          repeat: Share from the head, or number of repeats with a head slice for the fraction.
          excluded: Rows to leave out.
        """
        self.source, self.rows = source, rows
        total = math.floor(rows * repeat + 1e-9)  # 0.7 * 10 is not 7 in binary
        removed = sorted(place for row in set(excluded) for place in range(row, total, rows))
        # The number of remaining rows before each removed one, which are then found by a search.
        self.before = np.asarray(removed, np.int64) - np.arange(len(removed))
        self.length = total - len(removed)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[int, int]:
        place = index + int(np.searchsorted(self.before, index, side="right"))
        return self.source, place % self.rows


def read_drop_list(path: str, names: Sequence[str], lengths: Sequence[int]) -> dict[int, set[int]]:
    """Reads the rows to exclude, by source number; none for the path "".

    A line is source, row and reason with tabs between.

    Raises:
      ValueError: A line has another form, or its source or row does not exist.
    """
    dropped: dict[int, set[int]] = {}
    for number, name, row, _ in drop_lines(path) if path else ():
        if name not in names:
            raise ValueError(
                f"{one_line(path)} line {number}: there is no source {excerpt(name)}; a line is "
                f"source, row and reason with tabs between{suggestion(name, names)}"
            )
        source = names.index(name)
        if row >= lengths[source]:
            raise ValueError(
                f"{one_line(path)} line {number}: {name} has no row {str(row)!r}; it has "
                f"{lengths[source]:,}, counted from 0"
            )
        dropped.setdefault(source, set()).add(row)
    return dropped


def drop_lines(path: str) -> Iterator[tuple[int, str, int, str]]:
    """Yields (line number, source, row, reason) of a drop list; ValueError for another line."""
    text = decode(read_bytes(os.path.expanduser(path), max_bytes=MAX_DROP_LIST), one_line(path))
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip(" \r") or line.startswith("#"):
            continue
        name, row, reason = [*line.rstrip("\r").split("\t", 2), "", ""][:3]
        if not re.fullmatch("[0-9]{1,18}", row.strip()):
            raise ValueError(
                f"{one_line(path)} line {number}: {one_line(name[:100])} has no row "
                f"{excerpt(row)}; a line is source, row and reason with tabs between, rows counted "
                f"from 0"
            )
        yield number, name, int(row), reason


def mixture_weights(config: DataConfig, sources: Sequence, lengths: Sequence[int]) -> list[float]:
    """Returns the share of each source in the mixture; they sum to 1.

    Sources without any image or video together get `config.text_fraction` of the samples if that
    is not negative.

    lengths: Samples in one pass over each source.
    """
    if config.source_weights == "given":
        missing = [source.name for source in sources if source.weight is None]
        if missing:
            raise ValueError(
                f"data.source_weights is given, but the meta JSON has no weight for {', '.join(missing)}"
            )
        weights = [float(source.weight) for source in sources]
    elif config.source_weights in ("length", "sqrt"):
        weights = [
            length if config.source_weights == "length" else math.sqrt(length) for length in lengths
        ]
    else:
        raise ValueError(
            f"data.source_weights is {config.source_weights!r}; it must be length, sqrt or given"
        )
    if config.text_fraction >= 0:
        weights = _share_language(
            config.text_fraction, weights, [not source.has_images for source in sources]
        )
    if sum(weights) <= 0:
        raise ValueError(f"{config.source}: every source has weight 0")
    return [weight / sum(weights) for weight in weights]


def _share_language(share: float, weights: list[float], is_text: list[bool]) -> list[float]:
    if share > 1:
        raise ValueError(f"data.text_fraction is {share}; it is a share of the samples, at most 1")
    totals = {
        kind: sum(weight for weight, text in zip(weights, is_text, strict=True) if text == kind)
        for kind in (True, False)
    }
    shares = {True: share, False: 1 - share}
    for kind, name in ((True, "of text only"), (False, "with images")):
        if shares[kind] > 0 and totals[kind] <= 0:
            raise ValueError(f"data.text_fraction is {share}, but no source {name} has a weight")
    return [
        weight * shares[text] / (totals[text] or 1)
        for weight, text in zip(weights, is_text, strict=True)
    ]
