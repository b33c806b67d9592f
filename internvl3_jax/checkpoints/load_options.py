"""The arguments of `checkpoint.load` that every kind of directory takes, checked."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from internvl3_jax.checkpoints.adapters import describe
from internvl3_jax.checkpoints.hf.assemble import DTYPES
from internvl3_jax.checkpoints.manifest import Manifest
from internvl3_jax.checkpoints.verification import check_finite, spans_all_processes, undamaged
from internvl3_jax.io.checkpoint_paths import is_checkpoint, is_peft, resolve_checkpoint
from internvl3_jax.io.terminal import excerpt
from internvl3_jax.model import weights


@dataclasses.dataclass
class Reading:
    """Options with which `load` reads a directory; the fields are its arguments."""

    dtype: object
    mesh: jax.sharding.Mesh | None
    accept_fingerprint: bool
    prepare: Callable | None
    verify: str
    allow_nonfinite: bool

    def undamaged(self, directory: pathlib.Path):
        together = spans_all_processes(self.mesh)
        return undamaged(directory, self.verify, self.accept_fingerprint, together=together)

    def checked(self, directory: pathlib.Path) -> Callable:
        """Returns `prepare` with a check that parameters are finite."""
        prepare = self.prepare or (lambda path, leaf: leaf)
        if self.allow_nonfinite:
            return prepare

        def check(path, leaf):
            check_finite({path: leaf}, str(directory))
            return prepare(path, leaf)

        return check


class Quantizing:
    """The `prepare` that quantizes weights for inference while they are read.

    Args:
      weights: The format, one of `quantize.FORMATS`.
      tower: Whether kernels of the vision tower and the projector are quantized, too.
      base_dtype: In which dtype to describe the weights first, for adapters that name their base;
        None: there are none.
      prepare: What else is done to each leaf, before.

    Attributes:
      described: `adapters.describe` of what was read, None if nothing was described.
    """

    def __init__(self, weights: str, tower: bool, base_dtype: str | None, prepare: Callable | None):
        self.weights, self.tower, self.base_dtype = weights, tower, base_dtype
        self.prepare = prepare or (lambda path, leaf: leaf)
        self.described: dict[str, str] | None = None if base_dtype is None else {}

    def __call__(self, path: str, leaf):
        if self.described is not None:
            description = describe([(path, leaf)], self.base_dtype)
            self.described = None if description is None else self.described | description
        return weights.quantize_leaf(path, self.prepare(path, leaf), self.weights, self.tower)


def check_dtype(dtype) -> None:
    """Raises ValueError unless `load` can read parameters in a dtype; None is the stored one."""
    try:
        known = dtype is None or jnp.dtype(dtype).name in DTYPES
    except TypeError:
        known = False
    if not known:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")


def check_weights(chosen: str | None, tower: bool, mesh: jax.sharding.Mesh | None) -> None:
    """Raises ValueError or ImportError unless `load` can quantize weights to what was chosen."""
    if chosen is not None:
        weights.check(chosen, mesh)
    elif tower:
        raise ValueError("quantize_tower is set and weights is not; choose weights, such as int8")


def named_adapters(adapters) -> dict:
    """Returns name -> directory of what `load` takes as adapters; ValueError for anything else."""
    if isinstance(adapters, str | os.PathLike):
        return {pathlib.Path(adapters).name: adapters}
    if not (adapters is None or isinstance(adapters, Mapping)):
        raise ValueError(
            f"adapters is {excerpt(adapters)}; give name -> directory, such as {{'a': 'runs/a'}}"
        )
    return dict(adapters or {})


def base_dtype_of(adapters: Mapping[str, str | os.PathLike]) -> str | None:
    """Returns the dtype in which the first LoRA run among adapters describes its base."""
    for path in adapters.values():
        if "://" not in os.fspath(path) and is_peft(pathlib.Path(os.path.expanduser(path))):
            continue
        directory = resolve_checkpoint(path, "none")
        if is_checkpoint(directory) and (base := Manifest.read(directory).base):
            return base.dtype
    return None
