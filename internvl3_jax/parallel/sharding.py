"""Where arrays live: the mesh of devices, and the one table of rules by which parameters, optimizer
state and batches are split over it.

The axes of the mesh and what is split over them:

    slice    rows of the batch, across TPU slices, where the network is slowest; the gradients are summed over it once a step
    data     rows; parameters are whole on each member
    fsdp     rows, and the parameters, gradients and optimizer state (Zhao et al. 2023); a layer is gathered while it is computed
    tensor   heads, MLP columns and vocabulary of the decoder (Shoeybi et al. 2019)
    context  tokens of a row; the parameters are split over it too, as over fsdp

The vision tower is data parallel on all of them: every device computes its own tiles, whatever the
decoder does.

Axes are `Auto`: rules say where arrays begin and end, `constrain` marks a few places between, and
the compiler adds the collectives.
"""

import functools
import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils

from internvl3_jax.config import MeshConfig

AXES = ("slice", "data", "fsdp", "tensor", "context")
BATCH_AXES = ("slice", "data", "fsdp")  # the rows of a batch
ROW_AXES = ("context", "tensor")  # what a row's tiles are split over
TILE_AXES = BATCH_AXES + ROW_AXES  # the tiles of all rows, one after the other
# Parameters, along their width. fsdp comes last, so that it can leave the width in one all-to-all
# (language.Decoder.embed).
SHARDED_AXES = ("context", "fsdp")

# Path of a parameter -> the mesh axes of its last dimensions. Where context and fsdp together do
# not divide a dimension, fsdp alone must. Leading dimensions (the layers) are whole. Vectors are
# whole: all of them together are smaller than one matrix.
WIDTH = SHARDED_AXES
_MATRICES = (
    (r"vision/layers?(_\d+)?/(qkv|proj|fc1)", (WIDTH, "tensor")),
    (r"vision/layers?(_\d+)?/fc2", ("tensor", WIDTH)),
    (r"projector/(fc1|fc2)", (WIDTH, "tensor")),
    (r"language/layers?(_\d+)?/(q|k|v|qkv|gate|up|gate_up)", (WIDTH, "tensor")),
    (r"language/layers?(_\d+)?/(o|down)", ("tensor", WIDTH)),
)
RULES: tuple[tuple[str, tuple], ...] = (
    (r"vision/(class_embedding|position_embedding)", ()),
    (r"vision/patch_embedding/kernel", (None, WIDTH)),
    (r"language/embedding", ("tensor", WIDTH)),
    (r"language/head/kernel", (WIDTH, "tensor")),
    (r"(vision|projector|language)/(.*/)?(bias|scale|layer_scale1|layer_scale2)", ()),
    # A linear layer: its matrix, that matrix in few bits (ops/quantize.py), and its adapter's two
    # factors (lora.py).
    *((rf"{layer}/kernel(/int8|/nf4)?", (rows, columns)) for layer, (rows, columns) in _MATRICES),
    *((rf"{layer}/kernel/scales", (None, columns)) for layer, (_, columns) in _MATRICES),
    *((rf"lora/{layer}/a", (rows, None)) for layer, (rows, _) in _MATRICES),
    *((rf"lora/{layer}/b", (None, columns)) for layer, (_, columns) in _MATRICES),
)


def make_mesh(config: MeshConfig, devices=None) -> jax.sharding.Mesh:
    """The mesh of `devices` (all of them if None), laid out after the topology where it is a TPU's.

    Raises ValueError if the axes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(config, len(devices))
    if shape["slice"] > 1 and _slices(devices) > 1:
        inner = tuple(shape[axis] for axis in AXES[1:])
        # Slices (or, on GPUs, whatever the runtime calls a slice) on the first axis, one slice's
        # devices on the others.
        grid = mesh_utils.create_hybrid_device_mesh(
            (1, *inner), (shape["slice"], 1, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        # jax.make_mesh splits the torus' axes on v5e only; ordinary meshes of v5p and v6e need it
        # as well.
        grid = mesh_utils.create_device_mesh(
            tuple(shape.values()), devices, allow_split_physical_axes=True
        )
    return jax.sharding.Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def mesh_shape(config: MeshConfig, devices: int) -> dict[str, int]:
    """Axis -> size; the one axis that is -1 takes what the others leave. ValueError if that does
    not come out even.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    wrong = [axis for axis, size in sizes.items() if size == 0 or size < -1]
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if wrong or len(open_axes) > 1:
        raise ValueError(
            f"mesh {sizes}: sizes are positive, and at most one is -1, which takes the remaining devices"
        )
    product = math.prod(size for size in sizes.values() if size != -1)
    if devices % product or (not open_axes and product != devices):
        raise ValueError(
            f"mesh {sizes} is for {'a multiple of ' if open_axes else ''}{product} devices; there are {devices}"
        )
    return {axis: devices // product if size == -1 else size for axis, size in sizes.items()}


def _slices(devices) -> int:
    return len({getattr(device, "slice_index", 0) for device in devices})


# --- parameters ----------------------------------------------------------------------------------


def spec(path: str, shape: tuple[int, ...], mesh) -> jax.P:
    """How the parameter at `path` is split. ValueError if no rule matches, or a dimension does not
    divide.
    """
    matching = [axes for pattern, axes in RULES if re.fullmatch(pattern, path)]
    if len(matching) != 1:
        raise ValueError(
            f"{path}: {len(matching)} sharding rules match it; there must be one (sharding.RULES)"
        )
    axes = matching[0]
    dimensions = shape[len(shape) - len(axes) :]
    fitted = [_fit(path, size, axis, mesh) for size, axis in zip(dimensions, axes, strict=True)]
    return jax.P(*(None,) * (len(shape) - len(axes)), *fitted) if axes else jax.P()


def _fit(path: str, size: int, axes, mesh):
    """The axes, without those before the last if all of them do not divide the dimension."""
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
    """A tree like `params` (arrays or ShapeDtypeStructs) of NamedShardings. ValueError as of
    `spec`.
    """

    def one(path, leaf):
        return jax.NamedSharding(mesh, spec(path_name(path), leaf.shape, mesh))

    return jax.tree.map_with_path(one, params)


def state_shardings(state, params, mesh):
    """The same of an optimizer's state: a leaf whose path ends in a parameter's, and which has its
    shape, is split like it; the rest (counters, factored moments) is whole.
    """
    shapes = {path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}

    def one(path, leaf):
        found = re.search(r"(?:^|/)((?:lora/)?(?:vision|projector|language)/.*)", path_name(path))
        like = found is not None and shapes.get(found[1]) == leaf.shape
        return jax.NamedSharding(mesh, spec(found[1], leaf.shape, mesh) if like else jax.P())

    return jax.tree.map_with_path(one, state)


def abstract(tree, places):
    """The tree as ShapeDtypeStructs with the shardings `places`."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree,
        places,
    )


def path_name(path) -> str:
    """A path of jax.tree_util, of a parameter or of an optimizer's state, as
    "0/mu/vision/layers/fc1/kernel".
    """
    return "/".join(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    )


# --- batches -------------------------------------------------------------------------------------


def batch_sharding(mesh, name: str) -> jax.NamedSharding:
    """Of a field of a `Batch`: rows over BATCH_AXES; tokens over context, or tiles over context and
    tensor.
    """
    return jax.NamedSharding(mesh, jax.P(BATCH_AXES, ROW_AXES if name == "tiles" else "context"))


def check_batch(mesh, rows: int, micro_batches: int, tokens: int, tiles: int) -> None:
    """ValueError naming what does not split over the mesh."""
    devices = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    parts = math.prod(mesh.shape[axis] for axis in ROW_AXES)
    per_axis = f"{' x '.join(f'{axis} {mesh.shape[axis]}' for axis in BATCH_AXES)}"
    if rows % (devices * micro_batches):
        raise ValueError(
            f"data.rows is {rows}; it must be a multiple of {devices * micro_batches}: {micro_batches} micro-batches over {per_axis}"
        )
    if tokens % mesh.shape["context"]:
        raise ValueError(
            f"data.tokens_per_row is {tokens}; it must be a multiple of mesh.context ({mesh.shape['context']})"
        )
    if tiles % parts:
        raise ValueError(
            f"data.tiles_per_row is {tiles}; it must be a multiple of mesh.context x mesh.tensor ({parts})"
        )


def local_rows(mesh, rows: int, process: int | None = None) -> list[int]:
    """The rows of the global batch that a process's devices compute, in order. Several processes
    may share rows.
    """
    process = jax.process_index() if process is None else process
    placed = jax.NamedSharding(mesh, jax.P(BATCH_AXES)).devices_indices_map((rows,))
    mine = [index[0] for device, index in placed.items() if device.process_index == process]
    return sorted({row for part in mine for row in range(*part.indices(rows))})


def global_batch(
    mesh, rows: int, local: dict[str, np.ndarray], own: list[int]
) -> dict[str, jax.Array]:
    """Arrays of all rows from this process's: `local` has the rows `own`, of which all that
    `local_rows` names are needed.
    """
    place = {row: index for index, row in enumerate(own)}

    def put(name, array):
        def part(index):
            wanted = [place[row] for row in range(*index[0].indices(rows))]
            return array[wanted][(slice(None), *index[1:])]

        return jax.make_array_from_callback(
            (rows, *array.shape[1:]), batch_sharding(mesh, name), part
        )

    return {name: put(name, array) for name, array in local.items()}


# --- inside of computations ----------------------------------------------------------------------


def axis_size(*axes: str) -> int:
    """Devices along the axes of the mesh in context (`jax.set_mesh`); 1 where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes if axis in mesh.axis_names)


def constrain(x, *axes):
    """x split over `axes`, one entry (an axis, several, or None) for each dimension; x itself where
    no mesh is in context.

    Of several axes those at the end, or of SHARDED_AXES context as in `spec`, are left out until
    the rest divides the dimension, so that small and odd shapes work everywhere; what must not
    happen silently (parameters, batches) is checked by `spec` and `check_batch`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x

    def present(size, axis):
        names = tuple(
            name
            for name in ((axis,) if isinstance(axis, str) else axis or ())
            if name in mesh.axis_names
        )
        while size % math.prod(mesh.shape[name] for name in names):
            names = names[1:] if axis == SHARDED_AXES else names[:-1]
        return names or None

    specs = [present(size, axis) for size, axis in zip(x.shape, axes, strict=True)]
    return jax.lax.with_sharding_constraint(x, jax.P(*specs))


def all_gather_weight(kernel, path: str):
    """The matrix at `path` as it is used: whole, but for the decoder's split over tensor. Its
    gradient goes back to where the rule of the path stores it, so that it is summed and scattered
    in one step. The matrix itself where no rule or no mesh is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = next((axes for pattern, axes in RULES if re.fullmatch(pattern, path)), None)
    if axes is None or mesh.empty or mesh.size == 1:
        return kernel
    used = tuple(
        axis if axis == "tensor" and re.match("(lora/)?language/", path) else None for axis in axes
    )
    return _gather(kernel, used, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(kernel, used, stored):
    return constrain(kernel, *used)


_gather.defvjp(
    lambda kernel, used, stored: (_gather(kernel, used, stored), None),
    # First summed where it was made, then scattered. Asked for the scattered one at once, the
    # compiler would gather all tokens instead.
    lambda used, stored, _, gradient: (constrain(constrain(gradient, *used), *stored),),
)


def barrier_after(x, kernel, path: str):
    """x [B,T,D] and the matrix at `path`, which nothing is done to before x is there.

    Where each layer's matrices are arrays of their own, as in generation, the compiler would
    otherwise copy all of them into the layout that it likes best before the first layer. In a scan
    they come one by one anyway.
    """
    if not re.search(r"/layer_\d+/", path) or axis_size(*SHARDED_AXES) == 1:
        return x, kernel
    rows = next((axes[0] for pattern, axes in RULES if re.fullmatch(pattern, path)), None)
    # As the product takes it, so that what several products share is exchanged once, before it is
    # bound to each.
    x = constrain(x, BATCH_AXES, "context", "tensor" if rows == "tensor" else None)
    return jax.lax.optimization_barrier((x, kernel))


def matmul_weight_stationary(x, kernel, path: str):
    """x [B,1,D] @ kernel without moving the matrix at `path`: every device multiplies its part with
    all rows that share it, and the parts, which are small, are exchanged and summed.
    """
    axes = next((axes for pattern, axes in RULES if re.fullmatch(pattern, path)), (None, None))
    rows = ("slice", "data")
    return constrain(constrain(x, rows, None, axes[0]) @ kernel, rows, None, axes[1])


def require_mesh() -> None:
    """RuntimeError where no mesh is in context: without one every constraint would silently do
    nothing.
    """
    if jax.sharding.get_abstract_mesh().empty:
        raise RuntimeError(
            "no mesh is in context; wrap the call in `with jax.set_mesh(make_mesh(config.mesh)):`"
        )
