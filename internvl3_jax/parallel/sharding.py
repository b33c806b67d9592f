"""The mesh of devices, and the one table of rules that shards parameters over it.

Optimizer state follows its parameters; batches have a rule of their own.

Axes of the mesh, and what is sharded over each:

    slice    rows of the batch, across TPU slices, where the network is slowest; gradients are
             summed over it once a step
    data     rows; parameters are replicated
    fsdp     rows, and parameters, gradients and optimizer state (Zhao et al. 2023); a layer is
             all-gathered while it is computed
    tensor   heads, MLP columns and vocabulary of the decoder (Shoeybi et al. 2019)
    context  tokens of a row; parameters are sharded over it too, as over fsdp

The vision tower is data parallel over all of them: every device computes its own tiles, whatever
the decoder does.

The axes are `Auto`: rules say how arrays enter and leave a step, `constrain` (collectives.py) marks
a few intermediates, and the compiler adds the collectives.
"""

import math
import re
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import mesh_utils

from internvl3_jax.config import MeshConfig
from internvl3_jax.param_tree import path_name

AXES = ("slice", "data", "fsdp", "tensor", "context")
BATCH_AXES = ("slice", "data", "fsdp")  # the rows of a batch
ROW_AXES = ("context", "tensor")  # the tiles of a row
TILE_AXES = BATCH_AXES + ROW_AXES  # the tiles of all rows, concatenated
# Parameters, along their width. fsdp comes last, so that one all-to-all can remove it from the
# width (language.Decoder.embed).
SHARDED_AXES = ("context", "fsdp")

# Path of a parameter -> the mesh axes of its last dimensions. Where context and fsdp together do
# not divide a dimension, fsdp alone must. Leading dimensions (layers, experts) are not sharded. Vectors
# are replicated: all of them together are smaller than one matrix.
WIDTH = SHARDED_AXES
_MATRICES = (
    (r"vision/layers?(_\d+)?/(qkv|proj|fc1)", (WIDTH, "tensor")),
    (r"vision/layers?(_\d+)?/fc2", ("tensor", WIDTH)),
    (r"projector/(fc1|fc2)", (WIDTH, "tensor")),
    (r"flash/projector/(fc1|fc2|fc3)", (WIDTH, "tensor")),
    (r"flash/pooling/attn\d/(qkv|out)", (WIDTH, "tensor")),
    (r"flash/gating/block_\d/(fc1|fc2)", (WIDTH, "tensor")),
    (r"flash/gating/gate", (WIDTH, None)),
    (r"language/layers?(_\d+)?/(q|k|v|qkv|gate|up|gate_up)", (WIDTH, "tensor")),
    (r"language/layers?(_\d+)?/(o|down)", ("tensor", WIDTH)),
    (r"language/layers?(_\d+)?/experts/router", (WIDTH, None)),
    (r"language/layers?(_\d+)?/experts/(gate|up|gate_up)", (WIDTH, "tensor")),
    (r"language/layers?(_\d+)?/experts/down", ("tensor", WIDTH)),
)
RULES: tuple[tuple[str, tuple], ...] = (
    (r"vision/(class_embedding|position_embedding)", ()),
    (r"vision/patch_embedding/kernel", (None, WIDTH)),
    (r"language/embedding", ("tensor", WIDTH)),
    (r"language/head/kernel(/int8|/fp8)?", (WIDTH, "tensor")),
    (r"language/head/kernel/scales", (None, "tensor")),
    (r"flash/pooling/query", ()),
    (r"(vision|projector|flash|language)/(.*/)?(bias|scale|layer_scale1|layer_scale2)", ()),
    # A linear layer: its kernel, the quantized kernel (ops/quantize.py), and the two factors of its
    # adapter (lora.py).
    *(
        (rf"{layer}/kernel(/int8|/fp8|/nf4)?", (rows, columns))
        for layer, (rows, columns) in _MATRICES
    ),
    *((rf"{layer}/kernel/scales", (None, columns)) for layer, (_, columns) in _MATRICES),
    *((rf"lora/{layer}/a", (rows, None)) for layer, (rows, _) in _MATRICES),
    *((rf"lora/{layer}/b", (None, columns)) for layer, (_, columns) in _MATRICES),
)


def make_mesh(config: MeshConfig, devices=None) -> jax.sharding.Mesh:
    """Returns the mesh of `devices`, laid out along the topology of a TPU.

    Args:
      devices: None takes all devices.

    Raises:
      ValueError: The axes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(config, len(devices))
    if shape["slice"] > 1 and _slices(devices) > 1:
        # Slices (on GPUs: what the runtime calls a slice) on the first axis, the devices of a slice
        # on the others.
        inner = tuple(shape[axis] for axis in AXES[1:])
        grid = mesh_utils.create_hybrid_device_mesh(
            (1, *inner), (shape["slice"], 1, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        # jax.make_mesh splits axes of the torus on v5e only; common meshes of v5p and v6e need it,
        # too.
        grid = mesh_utils.create_device_mesh(
            tuple(shape.values()), devices, allow_split_physical_axes=True
        )
    return jax.sharding.Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def mesh_shape(config: MeshConfig, devices: int) -> dict[str, int]:
    """Returns the size of each axis; the one axis that is -1 takes the remaining devices.

    Raises:
      ValueError: The sizes are invalid or do not multiply to `devices`.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    wrong = [axis for axis, size in sizes.items() if size == 0 or size < -1]
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if wrong or len(open_axes) > 1:
        raise ValueError(
            f"mesh {sizes}: sizes are positive, and at most one is -1, which takes the remaining "
            "devices"
        )
    product = math.prod(size for size in sizes.values() if size != -1)
    if devices % product or (not open_axes and product != devices):
        wanted = f"{'a multiple of ' if open_axes else ''}{product}"
        raise ValueError(
            f"mesh {sizes} is for {wanted} devices; there are {devices}; change config.mesh"
        )
    return {axis: devices // product if size == -1 else size for axis, size in sizes.items()}


def _slices(devices) -> int:
    return len({getattr(device, "slice_index", 0) for device in devices})


# --- parameters ----------------------------------------------------------------------------------


def spec(path: str, shape: tuple[int, ...], mesh) -> jax.P:
    """Returns the PartitionSpec of the parameter at `path`.

    Args:
      mesh: A Mesh or AbstractMesh; only its axis sizes are used.

    Raises:
      ValueError: Not exactly one rule matches, or a dimension does not divide.
    """
    matching = [axes for pattern, axes in RULES if re.fullmatch(pattern, path)]
    if len(matching) != 1:
        raise ValueError(
            f"{path}: {len(matching)} sharding rules match it; there must be one; edit RULES in "
            "internvl3_jax/parallel/sharding.py"
        )
    axes = matching[0]
    dimensions = shape[len(shape) - len(axes) :]
    fitted = [_fit(path, size, axis, mesh) for size, axis in zip(dimensions, axes, strict=True)]
    return jax.P(*(None,) * (len(shape) - len(axes)), *fitted) if axes else jax.P()


def _fit(path: str, size: int, axes, mesh):
    """Returns the axes, or only the last of them if all together do not divide the dimension."""
    if axes is None:
        return None
    axes = (axes,) if isinstance(axes, str) else axes
    for chosen in (axes, axes[-1:]):
        if size % math.prod(mesh.shape[axis] for axis in chosen) == 0:
            return chosen
    members = mesh.shape[axes[-1]]
    largest = max(
        count for count in range(1, members + 1) if members % count == 0 and size % count == 0
    )
    other = " and give the rest to mesh.data" if axes[-1] == "fsdp" else ""
    raise ValueError(
        f"{path}: {size} does not split over mesh.{axes[-1]} = {members}; take {largest}{other}"
    )


def param_shardings(params, mesh):
    """Returns the NamedShardings of a parameter tree (arrays or ShapeDtypeStructs).

    Raises:
      ValueError: As `spec`.
    """

    def sharding(path, leaf):
        return jax.NamedSharding(mesh, spec(path_name(path), leaf.shape, mesh))

    return jax.tree.map_with_path(sharding, params)


def state_shardings(state, params, mesh):
    """Returns the NamedShardings of an optimizer state.

    A leaf whose path ends in that of a parameter, and which has its shape, is sharded like it. The
    rest (counters, factored moments) is replicated.
    """
    shapes = {path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}

    def sharding(path, leaf):
        match = re.search(r"(?:^|/)((?:lora/)?(?:vision|projector|language)/.*)", path_name(path))
        like_param = match is not None and shapes.get(match[1]) == leaf.shape
        return jax.NamedSharding(mesh, spec(match[1], leaf.shape, mesh) if like_param else jax.P())

    return jax.tree.map_with_path(sharding, state)


def abstract(tree, shardings):
    """Returns the tree as ShapeDtypeStructs with `shardings`, a tree of the same structure."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


# --- batches -------------------------------------------------------------------------------------


def batch_sharding(mesh, name: str) -> jax.NamedSharding:
    """Returns the sharding of a field of a `Batch` (data/batch.py).

    Rows are sharded over BATCH_AXES; tokens over context, tiles over context and tensor.
    """
    return jax.NamedSharding(mesh, jax.P(BATCH_AXES, ROW_AXES if name == "tiles" else "context"))


def check_batch(mesh, rows: int, micro_batches: int, tokens: int, tiles: int) -> None:
    """Raises ValueError naming the size of the batch that does not divide over the mesh.

    Args:
      rows: Rows of the global batch.
      tokens: Tokens per row.
      tiles: Tiles per row.
    """
    row_shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    tile_shards = math.prod(mesh.shape[axis] for axis in ROW_AXES)
    if rows % (row_shards * micro_batches):
        per_axis = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in BATCH_AXES)
        raise ValueError(
            f"data.rows is {rows}; it must be a multiple of {row_shards * micro_batches}: "
            f"{micro_batches} micro-batches over {per_axis}"
        )
    if tokens % mesh.shape["context"]:
        raise ValueError(
            f"data.tokens_per_row is {tokens}; it must be a multiple of mesh.context "
            f"({mesh.shape['context']})"
        )
    if tiles % tile_shards:
        raise ValueError(
            f"data.tiles_per_row is {tiles}; it must be a multiple of mesh.context x mesh.tensor "
            f"({tile_shards})"
        )


def local_rows(mesh, rows: int, process: int | None = None) -> list[int]:
    """Returns the rows of the global batch that a process's devices compute, in order.

    Several processes may share rows.

    Args:
      process: Index of the process; None is this one.
    """
    process = jax.process_index() if process is None else process
    indices = jax.NamedSharding(mesh, jax.P(BATCH_AXES)).devices_indices_map((rows,))
    local = [index[0] for device, index in indices.items() if device.process_index == process]
    return sorted({row for span in local for row in range(*span.indices(rows))})


def global_batch(
    mesh, rows: int, local: Mapping[str, np.ndarray], local_indices: list[int]
) -> dict[str, jax.Array]:
    """Makes global arrays from this process's rows.

    Args:
      rows: Rows of the global batch.
      local: Field -> array [len(local_indices), ...] of this process's rows.
      local_indices: The rows' indices in the global batch, all of `local_rows` among them.
    """
    position = {row: index for index, row in enumerate(local_indices)}

    def make_array(name, array):
        def shard(index):
            wanted = [position[row] for row in range(*index[0].indices(rows))]
            return array[wanted][(slice(None), *index[1:])]

        return jax.make_array_from_callback(
            (rows, *array.shape[1:]), batch_sharding(mesh, name), shard
        )

    return {name: make_array(name, array) for name, array in local.items()}
