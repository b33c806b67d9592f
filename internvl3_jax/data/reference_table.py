"""Looks up log-probabilities of pairs under MPO's reference model, which make_reference.py has
precomputed, by a hash of the pair.

A JSONL file: first {"reference": path, "hash": of its parameters, "dtype"}, then for each pair
{"key", "chosen", "rejected"}.
"""

import hashlib
import re

import numpy as np

from internvl3_jax.data.batch import Sample
from internvl3_jax.data.sources.files import read_bytes
from internvl3_jax.io.strict_json import Object, loads
from internvl3_jax.io.terminal import excerpt

LARGEST = 1e30  # absolute value of a log-probability, which is stored as float32
_KEYED = ("tokens", "targets", "positions", "answers", "tiles")


class ReferenceError(ValueError):
    """A pair or a file without the log-probabilities that are needed."""


def key_of(sample: Sample) -> str:
    """Hashes the fields of a pair on which the model's output depends."""
    digest = hashlib.sha256()
    for name in _KEYED:
        digest.update(np.ascontiguousarray(sample[name]).tobytes())
    return digest.hexdigest()[:16]


class ReferenceTable:
    """The file as two arrays, small enough for each worker process.

    Attributes:
      identity: A short text that changes with the file's content.
      hash, made_of: The hash of the reference model's parameters, and its path.
    """

    def __init__(self, path: str):
        self.path = path
        data = read_bytes(path)
        self.identity = f"sha256 {hashlib.sha256(data).hexdigest()[:32]}"
        lines = data.split(b"\n")
        while lines and not lines[-1].strip():
            lines.pop()
        try:
            header = Object(loads(lines[0] if lines else b"", f"{path} line 1"), f"{path} line 1")
            self.hash, self.made_of = header.get("hash", str), header.get("reference", str)
            rows = [
                _read_row(line, f"{path} line {number}") for number, line in enumerate(lines[1:], 2)
            ]
        except ValueError as error:
            raise ReferenceError(
                f"{error}; expected a complete file of internvl3_jax.training.make_reference"
            ) from error
        keys = np.array([row[0] for row in rows], np.uint64)
        values = np.array([row[1:] for row in rows], np.float32).reshape(-1, 2)
        order = np.argsort(keys)
        self.keys, self.values = keys[order], values[order]

    def added_to(self, sample: Sample) -> Sample:
        """Adds "reference" of `Batch` to a pair. ReferenceError if the table does not have it."""
        key = np.uint64(int(key_of(sample), 16))
        place = int(np.searchsorted(self.keys, key))
        if place == len(self.keys) or self.keys[place] != key:
            raise ReferenceError(
                f"{self.path} has no log-probabilities of this pair as it is now: it was made of "
                f"other rows, tokenizer or settings (tiles, deltas); make it again"
            )
        answers = sample["answers"]
        reference = np.zeros(len(answers), np.float32)
        for number, value in enumerate(self.values[place], 1):
            reference[np.argmax(answers == number)] = value
        return sample | {"reference": reference}


def _read_row(line: bytes, where: str) -> tuple[int, float, float]:
    """Returns (key, log-probability of the chosen answer, that of the rejected one)."""
    row = Object(loads(line, where), where)
    key = row.get("key", str, low=1, high=16)
    if not re.fullmatch("[0-9a-f]+", key):
        raise ReferenceError(f"{where}: key is {excerpt(key)}; expected 16 hex digits")
    return int(key, 16), *(
        float(row.get(name, float, low=-LARGEST, high=LARGEST)) for name in ("chosen", "rejected")
    )
