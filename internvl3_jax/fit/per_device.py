"""One device's shards of a training run: of the batch, the parameters and the optimizer state."""

import dataclasses
import functools
import math

import jax

from internvl3_jax.config import TrainConfig
from internvl3_jax.fit.lowering import batch_shapes, reference_shapes, train_state_shapes
from internvl3_jax.fit.topology import Topology
from internvl3_jax.parallel.sharding import (
    AXES,
    BATCH_AXES,
    ROW_AXES,
    batch_sharding,
    check_batch,
    mesh_shape,
)
from internvl3_jax.param_tree import path_name
from internvl3_jax.training.optimizer import make_optimizer, split_params
from internvl3_jax.training.step import make_model, shardings_of


@dataclasses.dataclass(frozen=True)
class PerDevice:
    """One device's part of a training run.

    Attributes:
      mesh: Size of each axis.
      params: Bytes of the parameters.
      opt_state: Bytes of the optimizer state.
      batch: Bytes of the batch.
      leaves: The parameters, by path.
      reference: Bytes of MPO's reference model.
    """

    config: TrainConfig
    topology: Topology
    mesh: dict[str, int]
    params: int
    opt_state: int
    batch: int
    leaves: dict[str, "Leaf"]
    reference: int = 0

    @property
    def rows(self) -> int:
        """Rows of a micro-batch; a row sharded over context counts as one."""
        row_shards = math.prod(self.mesh[axis] for axis in BATCH_AXES)
        return self.config.data.rows // row_shards // self.config.micro_batches

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.rows * self.config.data.tokens_per_row // self.mesh["context"]

    @property
    def tiles(self) -> float:
        """Tiles of a micro-batch."""
        tile_shards = math.prod(self.mesh[axis] for axis in ROW_AXES)
        return self.rows * self.config.data.tiles_per_row / tile_shards

    @property
    def tpu(self) -> bool:
        return self.topology.chip is not None and self.topology.chip.torus > 0

    @property
    def tensor(self) -> int:
        return self.mesh["tensor"]

    @property
    def shards(self) -> int:
        """Devices that the width of the parameters is sharded over."""
        return self.mesh["fsdp"] * self.mesh["context"]

    def trains(self, prefix: str) -> bool:
        """Returns whether a parameter below a path is trained; adapters do not count."""
        return any(leaf.trained for path, leaf in self.leaves.items() if path.startswith(prefix))

    def learns(self, prefix: str) -> bool:
        """Returns whether the backward pass goes through a path, for parameters or adapters."""
        return self.trains(prefix) or self.trains(f"lora/{prefix}")

    def elements(self, prefix: str) -> int:
        """Returns the elements of the full kernels below a path, quantized or not."""
        sizes = {"/kernel": 1, "/kernel/int8": 1, "/kernel/nf4": 2}
        return sum(
            leaf.elements * size
            for path, leaf in self.leaves.items()
            for suffix, size in sizes.items()
            if path.startswith(prefix) and path.endswith(suffix)
        )

    def adapters(self, prefix: str) -> int:
        """Returns the elements of the full adapters of the layers below a path."""
        return sum(
            leaf.elements for path, leaf in self.leaves.items() if path.startswith(f"lora/{prefix}")
        )

    @property
    def kernel_bytes(self) -> float:
        """Bytes of an element of the layers' kernels, as stored and communicated."""
        return {"none": 2 if self.config.compute_dtype == "bfloat16" else 4, "int8": 1, "nf4": 0.5}[
            self.config.lora.quantize
        ]

    def gradients(self, prefix: str) -> int:
        """Returns the bytes of the gradients below a path, those of adapters included.

        They are float32 and sharded like the parameters.
        """
        return self._gradients[prefix]

    @functools.cached_property
    def _gradients(self) -> dict[str, int]:
        sizes = [
            (path.removeprefix("lora/"), stored(leaf.shape, 4, self.tpu))
            for path, leaf in self.leaves.items()
            if leaf.trained
        ]
        prefixes = ("", "vision/", "projector/", "language/")
        return {
            prefix: sum(size for path, size in sizes if path.startswith(prefix))
            for prefix in prefixes
        }


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter.

    Attributes:
      shape: Of the device's shard.
      elements: Of the full parameter.
      trained: Whether the optimizer updates it.
    """

    shape: tuple[int, ...]
    elements: int
    trained: bool


def per_device(config: TrainConfig, topology: Topology) -> PerDevice:
    """Returns what each device has of a run.

    Raises:
      ValueError: The model or the batch does not divide over the mesh.
    """
    sizes = mesh_shape(config.mesh, topology.count)
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), AXES)
    state = _state(_Key(config))
    shardings = shardings_of(state, mesh)
    tpu = topology.chip is not None and topology.chip.torus > 0

    def shard_bytes(tree, shardings):
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
        return sum(
            stored(sharding.shard_shape(leaf.shape), leaf.dtype.itemsize, tpu)
            for leaf, sharding in pairs
        )

    # The parameters and the optimizer state, then what depends on them dividing.
    device = PerDevice(
        config,
        topology,
        sizes,
        params=shard_bytes(state.params, shardings.params),
        opt_state=shard_bytes(state.opt_state, shardings.opt_state),
        batch=0,
        leaves=_leaves(config, state.params, shardings.params),
    )
    check(device)
    batch = batch_shapes(config)
    batch_shardings = {name: batch_sharding(mesh, name) for name in batch}
    device = dataclasses.replace(device, batch=shard_bytes(batch, batch_shardings))
    reference = reference_shapes(config, mesh)
    if reference is None:
        return device
    reference_shardings = jax.tree.map(lambda leaf: leaf.sharding, reference)
    return dataclasses.replace(device, reference=shard_bytes(reference, reference_shardings))


def check(device: PerDevice) -> None:
    """Raises ValueError if the batch does not divide over the mesh into micro-batches."""
    mesh, data = jax.sharding.AbstractMesh(tuple(device.mesh.values()), AXES), device.config.data
    check_batch(
        mesh, data.rows, device.config.micro_batches, data.tokens_per_row, data.tiles_per_row
    )


def _leaves(config: TrainConfig, params, shardings) -> dict[str, Leaf]:
    trainable = split_params(params, config.optimizer.freeze)[0]
    trained = {path_name(path) for path, _ in jax.tree.leaves_with_path(trainable)}
    leaves = {}
    pairs = zip(jax.tree.leaves_with_path(params), jax.tree.leaves(shardings), strict=True)
    for (path, leaf), sharding in pairs:
        name = path_name(path)
        leaves[name] = Leaf(sharding.shard_shape(leaf.shape), leaf.size, name in trained)
    return leaves


class _Key:
    """A config, compared by the fields that the shapes of the state depend on."""

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
    """Returns the shapes of the train state, cached: a search asks for the same ones often."""
    config = key.config
    smallest = dataclasses.replace(config.data, rows=1, tokens_per_row=1, tiles_per_row=1)
    config = dataclasses.replace(config, data=smallest)
    return train_state_shapes(
        config, make_model(config), make_optimizer(config.optimizer, config.steps)
    )


def stored(shape: tuple[int, ...], itemsize: int, tpu: bool) -> int:
    """Returns the bytes of a program's argument in memory.

    A TPU pads two dimensions to tiles of 8 x 128 values of 32 bits. For arguments its compiler
    chooses the two dimensions that need the least padding.
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
    """Returns the bytes of an array whose last two dimensions are in a TPU's tiles."""
    *rest, sublanes, lanes = shape
    packed = max(1, 4 // itemsize)
    # Few rows take smaller tiles.
    rows = min(8, max(packed, 2 ** math.ceil(math.log2(max(1, sublanes)))))
    return math.prod(rest) * (-(-sublanes // rows) * rows) * (-(-lanes // 128) * 128) * itemsize


def _without(shape: tuple[int, ...], *indices: int) -> tuple[int, ...]:
    return tuple(size for index, size in enumerate(shape) if index not in indices)
