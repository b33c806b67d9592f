"""Sharding inside of computations: constraints, all-gathered weights, products that stay in place.

The functions read the mesh in context (`jax.set_mesh`) and do nothing where there is none, so the
model is the same code on one device and on many.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Shaped

from internvl3_jax.parallel.sharding import BATCH_AXES, RULES, SHARDED_AXES, spec


def axis_size(*axes: str) -> int:
    """Returns the number of devices along axes of the mesh in context; 1 where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes if axis in mesh.axis_names)


def platform() -> str:
    """Returns "cpu", "gpu" or "tpu": the devices of the mesh in context, or the default devices.

    The mesh may also consist of devices that are only compiled for (internvl3_jax/fit).
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None or device.platform is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def require_mesh() -> None:
    """Raises RuntimeError where no mesh is in context.

    Without a mesh every constraint would silently do nothing.
    """
    if jax.sharding.get_abstract_mesh().empty:
        raise RuntimeError(
            "no mesh is in context; wrap the call in `with jax.set_mesh(make_mesh(config.mesh)):`"
        )


def constrain(x: Shaped[Array, "*shape"], *axes) -> Shaped[Array, "*shape"]:
    """Shards x over `axes` of the mesh in context; returns x itself where there is no mesh.

    Axes that do not divide a dimension are dropped, the last first (of SHARDED_AXES "context"
    first, as in `sharding.spec`), so that small and odd shapes work everywhere. Parameters and
    batches must not be replicated silently: `sharding.spec` and `check_batch` check those.

    Args:
      axes: For each dimension of x an axis, a tuple of axes, or None (replicated).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x

    def dividing(size, axis):
        names = (axis,) if isinstance(axis, str) else axis or ()
        names = tuple(name for name in names if name in mesh.axis_names)
        while size % math.prod(mesh.shape[name] for name in names):
            names = names[1:] if axis == SHARDED_AXES else names[:-1]
        return names or None

    specs = [dividing(size, axis) for size, axis in zip(x.shape, axes, strict=True)]
    return jax.lax.with_sharding_constraint(x, jax.P(*specs))


def row_major(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """Has a GPU keep x and its gradient with the last axis innermost; returns x itself elsewhere.

    In layers that are not in a loop XLA otherwise chooses a layout by the reductions of the norms,
    and transposes x for every product. On several devices x is left alone: the constraint would
    all-gather it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if platform() != "gpu" or (not mesh.empty and mesh.size > 1):
        return x
    from jax.experimental.layout import Layout, with_layout_constraint

    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def all_gather_weight(weight: Shaped[Array, "*shape"], path: str) -> Shaped[Array, "*shape"]:
    """All-gathers the weight at `path` for its use; the decoder's stay sharded over "tensor".

    The gradient is reduce-scattered to the shards in which the weight is stored. Returns the weight
    itself where no sharding rule or no mesh applies.
    """
    mesh = jax.sharding.get_abstract_mesh()
    stored = _rule(path)
    if stored is None or mesh.empty or mesh.size == 1:
        return weight
    in_decoder = re.match("(lora/)?language/", path)
    used = tuple(axis if axis == "tensor" and in_decoder else None for axis in stored)
    return _gather(weight, used, stored)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(weight, used, stored):
    return constrain(weight, *used)


_gather.defvjp(
    lambda weight, used, stored: (_gather(weight, used, stored), None),
    # Sum where the gradient is computed, then scatter. With the scattered sharding alone the
    # compiler would all-gather the tokens instead.
    lambda used, stored, _, gradient: (constrain(constrain(gradient, *used), *stored),),
)


def barrier_after(
    x: Shaped[Array, "*rows d_in"], weight: Shaped[Array, "d_in d_out"], path: str
) -> tuple[Shaped[Array, "*rows d_in"], Shaped[Array, "d_in d_out"]]:
    """Ties the weight at `path` to x, so that XLA does nothing to the weight before x is computed.

    In the unrolled layout (generation) each layer's weights are arrays of their own. Without the
    barrier XLA copies those of all layers into its preferred layout before the first layer runs. In
    a scan they arrive one layer at a time anyway.
    """
    if not re.search(r"/layer_\d+/", path) or axis_size(*SHARDED_AXES) == 1:
        return x, weight
    # Shard x as the product takes it: products that share x then exchange it once, before it is
    # tied to each weight.
    rule = _rule(path)
    in_axis = rule[0] if rule else None
    x = constrain(x, BATCH_AXES, "context", "tensor" if in_axis == "tensor" else None)
    return jax.lax.optimization_barrier((x, weight))


def matmul_weight_stationary(
    x: Shaped[Array, "B 1 d_in"],
    weight: Shaped[Array, "d_in d_out"],
    path: str,
    dtype: DTypeLike | None = None,
) -> Shaped[Array, "B 1 d_out"]:
    """Computes x @ weight without moving the weight at `path`.

    Every device multiplies its shard of the weight with the rows that share it. The products, which
    are small, are exchanged and summed. dtype: of the result; None is that of x.
    """
    in_axis, out_axis = _rule(path) or (None, None)
    rows = ("slice", "data")
    product = jnp.matmul(constrain(x, rows, None, in_axis), weight, preferred_element_type=dtype)
    return constrain(product, rows, None, out_axis)


def stored_spec(path: str, shape: tuple[int, ...]) -> jax.P:
    """Returns the PartitionSpec of the parameter at `path`, one entry per dimension.

    Nothing is sharded where no sharding rule or no mesh applies.
    """
    mesh = jax.sharding.get_abstract_mesh()
    none = (None,) * len(shape)
    return jax.P(*none) if mesh.empty or _rule(path) is None else spec(path, shape, mesh)


def _rule(path: str) -> tuple | None:
    return next((axes for pattern, axes in RULES if re.fullmatch(pattern, path)), None)
