"""Log-probabilities of pairs under MPO's reference model, computed beforehand (make_reference.py) and looked up by what the pair is.

A JSONL file: first {"reference": path, "hash": of its parameters, "dtype"}, then for each pair {"key", "chosen", "rejected"}.
"""

import hashlib
import json

import numpy as np

from internvl3_jax.data.batch import Sample
from internvl3_jax.data.files import read_bytes

_KEYED = ("tokens", "targets", "positions", "answers", "tiles")


class ReferenceError(ValueError):
    """A pair, or a file, without the log-probabilities that are needed."""


def key_of(sample: Sample) -> str:
    """What the model computes of the pair depends on these bytes alone."""
    digest = hashlib.sha256()
    for name in _KEYED:
        digest.update(np.ascontiguousarray(sample[name]).tobytes())
    return digest.hexdigest()[:16]


class ReferenceTable:
    """The file as two arrays, so that each worker process can hold it."""

    def __init__(self, path: str):
        self.path = path
        try:
            header, *rows = map(json.loads, read_bytes(path).decode().splitlines())
            self.hash, self.made_of = header["hash"], header["reference"]
            keys = np.array([int(row["key"], 16) for row in rows], np.uint64)
            values = np.array([(row["chosen"], row["rejected"]) for row in rows], np.float32).reshape(-1, 2)
        except (ValueError, KeyError, TypeError) as error:
            raise ReferenceError(f"{path}: is no file of internvl3_jax.make_reference, or is damaged: {error!r}") from error
        order = np.argsort(keys)
        self.keys, self.values = keys[order], values[order]

    def added_to(self, sample: Sample) -> Sample:
        """The pair with "reference", as `Batch` has it. ReferenceError if the table does not know it."""
        key = np.uint64(int(key_of(sample), 16))
        place = int(np.searchsorted(self.keys, key))
        if place == len(self.keys) or self.keys[place] != key:
            raise ReferenceError(
                f"{self.path} has no log-probabilities of this pair as it is now: it was made of other rows, tokenizer or settings "
                f"(tiles, deltas); make it again"
            )
        answers = sample["answers"]
        reference = np.zeros(len(answers), np.float32)
        for number, value in enumerate(self.values[place], 1):
            reference[np.argmax(answers == number)] = value
        return sample | {"reference": reference}
