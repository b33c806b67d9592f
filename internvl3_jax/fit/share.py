"""What one device has of a training run: its part of the batch, of the parameters and of the
optimizer's state.
"""

import dataclasses
import functools
import math

import jax

from internvl3_jax.config import TrainConfig
from internvl3_jax.fit.program import batch_shapes, reference_shapes, train_state_shapes
from internvl3_jax.fit.topology import Topology
from internvl3_jax.parallel.sharding import (
    AXES,
    BATCH_AXES,
    ROW_AXES,
    batch_sharding,
    check_batch,
    mesh_shape,
)
from internvl3_jax.training.optimizer import make_optimizer, split_params
from internvl3_jax.training.step import make_model, shardings_of


@dataclasses.dataclass(frozen=True)
class PerDevice:
    """Counts are of one micro-batch. A row that is split over the context axis counts as its part."""

    config: TrainConfig
    topology: Topology
    mesh: dict[str, int]
    params: int  # bytes, as the other sizes
    opt_state: int
    batch: int
    leaves: dict[str, "Leaf"]  # of the parameters, by path
    reference: int = 0  # bytes of MPO's reference model

    @property
    def rows(self) -> int:
        return (
            self.config.data.rows
            // math.prod(self.mesh[axis] for axis in BATCH_AXES)
            // self.config.micro_batches
        )

    @property
    def tokens(self) -> int:
        return self.rows * self.config.data.tokens_per_row // self.mesh["context"]

    @property
    def tiles(self) -> float:
        return (
            self.rows
            * self.config.data.tiles_per_row
            / math.prod(self.mesh[axis] for axis in ROW_AXES)
        )

    @property
    def tpu(self) -> bool:
        return self.topology.chip is not None and self.topology.chip.torus > 0

    @property
    def tensor(self) -> int:
        return self.mesh["tensor"]

    @property
    def shards(self) -> int:
        """Devices that the parameters' width is split over."""
        return self.mesh["fsdp"] * self.mesh["context"]

    def trains(self, start: str) -> bool:
        """Whether any parameter under a path is trained, its adapters not counted."""
        return any(leaf.trained for path, leaf in self.leaves.items() if path.startswith(start))

    def learns(self, start: str) -> bool:
        """Whether anything under a path is trained, and be it by adapters: the backward pass goes
        through it.
        """
        return self.trains(start) or self.trains(f"lora/{start}")

    def elements(self, start: str) -> int:
        """Of the linear layers' matrices under a path, quantized or not."""
        sizes = {"/kernel": 1, "/kernel/int8": 1, "/kernel/nf4": 2}
        found = ((path, leaf) for path, leaf in self.leaves.items() if path.startswith(start))
        return sum(
            leaf.whole * size
            for path, leaf in found
            for end, size in sizes.items()
            if path.endswith(end)
        )

    def adapters(self, start: str) -> int:
        """Elements of the adapters of what is under a path."""
        return sum(
            leaf.whole for path, leaf in self.leaves.items() if path.startswith(f"lora/{start}")
        )

    @property
    def kernel_bytes(self) -> float:
        """Of an element of the layers' matrices, as it is stored and travels."""
        return {"none": 2 if self.config.compute_dtype == "bfloat16" else 4, "int8": 1, "nf4": 0.5}[
            self.config.lora.quantize
        ]

    def gradients(self, start: str) -> int:
        """Bytes of the gradients under a path, adapters' among them: float32, split as the
        parameters.
        """
        return self._gradients[start]

    @functools.cached_property
    def _gradients(self) -> dict[str, int]:
        sizes = [
            (path.removeprefix("lora/"), stored(leaf.shape, 4, self.tpu))
            for path, leaf in self.leaves.items()
            if leaf.trained
        ]
        starts = ("", "vision/", "projector/", "language/")
        return {
            start: sum(size for path, size in sizes if path.startswith(start)) for start in starts
        }


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter: its shape on one device, and the elements of the whole of it."""

    shape: tuple[int, ...]
    whole: int
    trained: bool


def share_of(config: TrainConfig, topology: Topology) -> PerDevice:
    """ValueError where the model or the batch does not split over the mesh."""
    sizes = mesh_shape(config.mesh, topology.count)
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), AXES)
    state = _state(_Key(config))
    places = shardings_of(state, mesh)
    tpu = topology.chip is not None and topology.chip.torus > 0

    def bytes_of(leaves, places):
        return sum(
            stored(place.shard_shape(leaf.shape), leaf.dtype.itemsize, tpu)
            for leaf, place in zip(jax.tree.leaves(leaves), jax.tree.leaves(places), strict=True)
        )

    batch = batch_shapes(config)
    share = PerDevice(
        config,
        topology,
        sizes,
        params=bytes_of(state.params, places.params),
        opt_state=bytes_of(state.opt_state, places.opt_state),
        batch=0,
        leaves=_leaves(config, state.params, places.params),
    )
    check(share)
    reference = reference_shapes(config, mesh)
    if reference is not None:
        share = dataclasses.replace(
            share,
            reference=bytes_of(reference, jax.tree.map(lambda leaf: leaf.sharding, reference)),
        )
    return dataclasses.replace(
        share, batch=bytes_of(batch, {name: batch_sharding(mesh, name) for name in batch})
    )


def check(share: PerDevice) -> None:
    """ValueError where the batch does not split over the mesh into micro-batches."""
    mesh, data = jax.sharding.AbstractMesh(tuple(share.mesh.values()), AXES), share.config.data
    check_batch(
        mesh, data.rows, share.config.micro_batches, data.tokens_per_row, data.tiles_per_row
    )


def _leaves(config: TrainConfig, params, places) -> dict[str, Leaf]:
    trained = {
        _path(path)
        for path, _ in jax.tree.leaves_with_path(split_params(params, config.optimizer.freeze)[0])
    }
    pairs = zip(jax.tree.leaves_with_path(params), jax.tree.leaves(places), strict=True)
    return {
        _path(path): Leaf(place.shard_shape(leaf.shape), leaf.size, _path(path) in trained)
        for (path, leaf), place in pairs
    }


def _path(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


class _Key:
    """What the state's shapes depend on."""

    def __init__(self, config: TrainConfig):
        self.config = config
        optimizer = config.optimizer
        self.key = (
            config.model,
            config.lora,
            config.loss,
            config.param_dtype,
            optimizer.name,
            optimizer.moment_dtype,
            optimizer.freeze,
            optimizer.beta1,
        )

    def __hash__(self):
        return hash(self.key)

    def __eq__(self, other):
        return self.key == other.key


@functools.lru_cache(maxsize=64)
def _state(key: _Key):
    config = key.config
    one = dataclasses.replace(config.data, rows=1, tokens_per_row=1, tiles_per_row=1)
    config = dataclasses.replace(config, data=one)
    return train_state_shapes(
        config, make_model(config), make_optimizer(config.optimizer, config.steps)
    )


def stored(shape: tuple[int, ...], itemsize: int, tpu: bool) -> int:
    """Bytes of an array in memory. A TPU keeps two dimensions in tiles of 8 x 128 values of 32
    bits, and fills them up; of an argument it takes those two with which the least is added.
    """
    size = math.prod(shape) * itemsize
    if not tpu or len(shape) < 2:
        return size
    last = shape[-3:]
    pairs = ((a, b) for a in range(len(last)) for b in range(len(last)) if a != b)
    return min(
        tiled((*_without(last, a, b), last[a], last[b]), itemsize) for a, b in pairs
    ) * math.prod(shape[:-3])


def tiled(shape: tuple[int, ...], itemsize: int) -> int:
    """Bytes with the last two dimensions in tiles."""
    *rest, sublanes, lanes = shape
    packed = max(1, 4 // itemsize)
    # few rows take smaller tiles
    rows = min(8, max(packed, 2 ** math.ceil(math.log2(max(1, sublanes)))))
    return math.prod(rest) * (-(-sublanes // rows) * rows) * (-(-lanes // 128) * 128) * itemsize


def _without(shape: tuple[int, ...], *indices: int) -> tuple[int, ...]:
    return tuple(size for index, size in enumerate(shape) if index not in indices)
