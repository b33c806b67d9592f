"""Packs samples into rows under a token budget and a tile budget. A sample is never split.

Samples wait in a buffer. A row begins with the one that has waited longest, so that none waits
forever. It is then filled with the waiting sample that fits and uses the rest of both budgets best:
the largest dot product of its size with the remaining room, both in units of a full row (Panigrahy
et al. 2011, "Heuristics for Vector Bin Packing"). benchmarks/packing.py compares this rule with
others.

The stream resumes exactly: its state has the numbers of the waiting samples, which are made again.
"""

from collections.abc import Callable, Sequence

import grain.python as grain
import numpy as np

from internvl3_jax.data.batch import Batch, Sample
from internvl3_jax.data.pairs import NO_END

_FIELDS = {
    "tokens": np.int32,
    "targets": np.int32,
    "loss_weights": np.float32,
    "positions": np.int32,
}
_PAIR_FIELDS = {"segments": np.int32, "answers": np.int32, "features": np.int32}
_OPTIONAL_FIELDS = {"last_query": np.int32, "reference": np.float32}


def choose(sizes: np.ndarray, budgets: np.ndarray) -> list[int]:
    """Chooses the waiting samples that form the next row; returns their indices, 0 first.

    Args:
      sizes: i64[n,2], tokens and tiles of each sample, in order of arrival.
      budgets: i64[2], tokens and tiles of a row.
    """
    chosen, room = [0], budgets - sizes[0]
    free = np.ones(len(sizes), bool)
    free[0] = False
    while True:
        fits = free & (sizes <= room).all(axis=1)
        if not fits.any():
            return chosen
        share = (sizes / np.maximum(budgets, 1)) @ (room / np.maximum(budgets, 1))
        best = int(np.argmax(np.where(fits, share, -1.0)))
        chosen.append(best)
        free[best] = False
        room = room - sizes[best]


def join(samples: Sequence[Sample], tokens: int, tiles: int) -> Batch:
    """Joins samples to one row [T] of a Batch, padded with zeros."""
    pairs = "answers" in samples[0]
    fields = (
        _FIELDS
        | (_PAIR_FIELDS if pairs else {})
        | {name: dtype for name, dtype in _OPTIONAL_FIELDS.items() if name in samples[0]}
    )
    row = {name: np.zeros(tokens, dtype) for name, dtype in fields.items()}
    row |= {"segments": np.zeros(tokens, np.int32), "sources": np.zeros(tokens, np.int32)}
    row["tiles"] = np.zeros((tiles, *samples[0]["tiles"].shape[1:]), np.uint8)
    token = tile = segment = feature = 0
    for number, sample in enumerate(samples):
        place = slice(token, token + len(sample["tokens"]))
        for name in fields:
            row[name][place] = sample[name]
        row["sources"][place] = sample.get("source", 0)
        if pairs:
            _renumber(
                {name: row[name][place] for name in fields}, segment, 2 * number, feature, token
            )
            feature += int(sample["features"].max()) + 1 if len(sample["tiles"]) else 0
        else:
            row["segments"][place] = segment + 1
        row["tiles"][tile : tile + len(sample["tiles"])] = sample["tiles"]
        token, tile, segment = (
            place.stop,
            tile + len(sample["tiles"]),
            int(row["segments"][place].max(initial=0)),
        )
    return row


def _renumber(
    pair: dict[str, np.ndarray], segment: int, answer: int, feature: int, token: int
) -> None:
    """Offsets the numbers of a pair by what comes before it in the row."""
    pair["segments"] += segment
    pair["answers"][pair["answers"] > 0] += answer
    pair["features"] += feature
    if "last_query" in pair:
        pair["last_query"][pair["last_query"] < NO_END] += token


class Packer(grain.DatasetIterator):
    """Packs an iterator of samples into rows (`Batch` without the batch axis).

    Each item is (row, origins); origins are the (source, row) of its samples.

    Attributes:
      skipped: The newest error markers (see pipeline.py).
      skipped_count: Number of error markers so far.
    """

    def __init__(
        self,
        samples: grain.DatasetIterator,
        make: Callable[[int], Sample],
        tokens: int,
        tiles: int,
        size: int,
        most: int | None = None,
    ):
        """Starts with an empty buffer.

        Args:
          make: Makes a sample by its "index", to fill the buffer when resuming.
          tokens, tiles: Budgets of a row.
          size: Samples in the buffer.
          most: Samples in a row; None is no limit.
        """
        super().__init__(samples)
        if size < 1:
            raise ValueError(f"data.packing_buffer is {size}; at least one sample must wait")
        self.make, self.budgets, self.size, self.most = (
            make,
            np.array([tokens, tiles]),
            size,
            most,
        )
        self.waiting: list[Sample] = []
        self.skipped: list[dict] = []
        self.skipped_count = 0

    def __next__(self) -> tuple[Batch, list[tuple[int, int]]]:
        self._fill()
        if not self.waiting:
            raise StopIteration
        sizes = np.array([(len(sample["tokens"]), len(sample["tiles"])) for sample in self.waiting])
        chosen = choose(sizes, self.budgets)[: self.most]
        samples = [self.waiting[index] for index in chosen]
        self.waiting = [
            sample for index, sample in enumerate(self.waiting) if index not in set(chosen)
        ]
        return join(samples, *map(int, self.budgets)), [
            (int(s.get("source", 0)), int(s.get("row", 0))) for s in samples
        ]

    def _fill(self) -> None:
        while len(self.waiting) < self.size:
            try:
                sample = next(self._parent)
            except StopIteration:
                return
            if "error" in sample:
                self.skipped_count += 1
                self.skipped = [*self.skipped[-9:], sample]
                continue
            self._check(sample)
            self.waiting.append(sample)

    def _check(self, sample: Sample) -> None:
        for name, limit in zip(("tokens", "tiles"), self.budgets, strict=True):
            if len(sample[name]) > limit:
                where = f"source {sample.get('source', 0)} row {sample.get('row', 0)}"
                raise ValueError(
                    f"{where} has {len(sample[name])} {name}, a row holds {limit}: raise "
                    f"data.{name}_per_row"
                )

    def get_state(self) -> dict:
        # As text, since grain expects a state's arrays to keep their shapes.
        waiting = " ".join(str(int(sample["index"])) for sample in self.waiting)
        return {
            "samples": self._parent.get_state(),
            "waiting": waiting,
            "skipped": self.skipped_count,
        }

    def set_state(self, state: dict) -> None:
        self._parent.set_state(state["samples"])
        self.waiting = [self.make(int(index)) for index in state["waiting"].split()]
        self.skipped_count, self.skipped = state["skipped"], []
