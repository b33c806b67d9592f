"""Checkpoints with quantized weights as the result of a conversion."""

import dataclasses
import pathlib

import numpy as np

from internvl3_jax.checkpoints import storage
from internvl3_jax.checkpoints.hf.assemble import ConversionError
from internvl3_jax.checkpoints.hf.mapping import active_rows
from internvl3_jax.checkpoints.hf.values import listing
from internvl3_jax.model.weights import format_in, quantize_leaf


@dataclasses.dataclass(frozen=True)
class Quantization:
    """Settings of a conversion to fewer bits.

    Attributes:
      weights: "int8", "fp8" or "nf4".
      tower: Whether those of the vision tower and the projector are, too.
    """

    weights: str
    tower: bool = False

    def parts(self, path: str, leaf: np.ndarray) -> dict[str, np.ndarray]:
        """Returns path -> array of what is stored for a leaf: the leaf itself, or its two parts."""
        quantized = quantize_leaf(path, leaf, self.weights, self.tower)
        if quantized is leaf:
            return {path: leaf}
        return {f"{path}/{name}": np.asarray(part) for name, part in quantized.items()}

    def verify(self, model, directory: pathlib.Path) -> None:
        """Quantizes the source again; ConversionError names what the written checkpoint has not."""
        differing = []
        infos = storage.leaf_infos(directory / "params")
        reader = storage.TreeReader(directory / "params", list(infos))
        for row in active_rows(model.config):
            for path, part in self.parts(row.target, model.leaf(row)).items():
                if path not in infos or not same_bits(part, reader.read(path)):
                    differing.append(path)
        if differing or format_in(infos) != self.weights:
            raise ConversionError(
                listing("that differ from the source, quantized again", differing or ["all"])
            )


def same_bits(some: np.ndarray, other: np.ndarray) -> bool:
    """Returns whether two arrays have the same shape, dtype and bits."""
    return (
        some.shape == other.shape
        and some.dtype == other.dtype
        and np.ascontiguousarray(some).tobytes() == np.ascontiguousarray(other).tobytes()
    )
