"""Damages a saved step, and reads parameters by path."""

import numpy as np

from internvl3_jax.checkpoints import storage


def leaves(params) -> dict:
    return {path: np.asarray(leaf) for path, leaf in storage.by_path(params).items()}


def flip(path) -> bytes:
    """Changes one bit in the middle of a file; returns what it was."""
    whole = path.read_bytes()
    content = bytearray(whole)
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content)
    return whole


def largest(directory):
    return max(
        (path for path in directory.rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )
