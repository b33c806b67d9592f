"""Weights of fewer bits for inference: which kernels are quantized, and what can compute with them.

The kernels of the decoder's layers and of an output head of its own are quantized, by option those
of the tower and the projector, too. Embeddings, norms, biases and positions stay as they are: so
does the head of a model that ties it to its embedding. NF4 is for layers alone, as in LoRA.
"""

import re
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from internvl3_jax.model.ops.quantize import FORMATS, PER_COLUMN, is_quantized, library, quantize
from internvl3_jax.parallel.sharding import spec
from internvl3_jax.param_tree import own

_DECODER = re.compile(r"language/layers/((experts/)?(gate|up|down)|q|k|v|o)/kernel")
_HEAD = re.compile(r"language/head/kernel")
_TOWER = re.compile(r"vision/layers/(qkv|proj|fc1|fc2)/kernel")
_PROJECTOR = re.compile(r"projector/fc[12]/kernel")
_PART = re.compile(rf"/kernel/({'|'.join(FORMATS)}|scales)$")
_FLOAT8_FROM = (8, 9)  # compute capability of the first NVIDIA GPUs with float8: L4, L40, RTX 40

_quantize = jax.jit(quantize, static_argnums=1)


def is_chosen(path: str, weights: str, tower: bool = False) -> bool:
    """Returns whether the leaf at `path` of the stacked tree is quantized.

    Args:
      weights: One of FORMATS.
      tower: Whether kernels of the vision tower and the projector are, too.
    """
    patterns = [_DECODER] + [_TOWER] * tower
    if weights in PER_COLUMN:
        patterns += [_HEAD] + [_PROJECTOR] * tower
    return any(pattern.fullmatch(path) for pattern in patterns)


def quantize_leaf(
    path: str, leaf: Shaped[Array, "*shape"], weights: str, tower: bool = False
) -> Shaped[Array, "*shape"] | dict[str, Array]:
    """Returns a leaf of the stacked tree, quantized if `is_chosen`; sharded leaves stay sharded.

    Raises:
      ValueError: NF4 of an odd number of rows.
    """
    if not is_chosen(path, weights, tower):
        return leaf
    quantized = _quantize(leaf, weights)
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, jax.NamedSharding):
        return quantized
    mesh = sharding.mesh
    return {
        name: jax.device_put(
            part, jax.NamedSharding(mesh, spec(f"{path}/{name}", part.shape, mesh))
        )
        for name, part in quantized.items()
    }


def abstract_quantized(params: Mapping[str, object], weights: str, tower: bool = False) -> dict:
    """Returns path -> shape and dtype of the tree that `quantize_leaf` makes of path -> shape."""
    made = {}
    for path, leaf in params.items():
        if not is_chosen(path, weights, tower):
            made[path] = leaf
            continue
        shapes = jax.eval_shape(lambda leaf: quantize(leaf, weights), leaf)
        made |= {f"{path}/{name}": shape for name, shape in shapes.items()}
    return made


def is_part(path: str) -> bool:
    """Returns whether a path is that of values or scales of a quantized kernel."""
    return _PART.search(path) is not None


def format_in(paths: Iterable[str]) -> str | None:
    """Returns the format of the quantized kernels among the paths of a tree, None without any."""
    names = {match[1] for path in paths if (match := _PART.search(path))} - {"scales"}
    return min(names, default=None)


def cast(params: dict, dtype: DTypeLike, donate: bool = False) -> dict:
    """Returns the tree in `dtype`; quantized kernels and their scales stay as they are.

    Args:
      donate: Change `params` itself, leaf by leaf, so that memory holds one leaf in both dtypes.
    """
    tree = params if donate else own(params)
    for name, node in tree.items():
        if is_quantized(node):
            tree[name] = jax.tree.map(jnp.asarray, node)
        elif isinstance(node, dict):
            cast(node, dtype, donate=True)
        else:
            tree[name] = jnp.asarray(node, dtype)
    return tree


def check(weights: str, mesh: jax.sharding.Mesh | None = None, where: str = "weights") -> None:
    """Checks that the devices can compute with quantized weights, before they are made.

    Args:
      weights: What the user gave; None is not quantized.
      mesh: The devices; None: the default one.
      where: What errors call the argument.

    Raises:
      ValueError: It is unknown, or the devices or jax lack the format.
      ImportError: It is nf4, and qwix is not installed.
    """
    if weights not in FORMATS:
        raise ValueError(f"{where} is {weights!r}; it must be one of {', '.join(FORMATS)}")
    if weights == "nf4":
        library()
        if mesh is not None and mesh.size > 1:
            raise ValueError(
                f"{where} is nf4, which several devices would unpack for all layers; use int8"
            )
    if weights == "fp8":
        _check_float8(jax.devices()[0] if mesh is None else mesh.devices.flat[0], where)


def _check_float8(device, where: str) -> None:
    """Raises ValueError if a product with a float8 kernel does not run on the device."""
    capability = getattr(device, "compute_capability", None)
    if isinstance(capability, str) and device.platform == "gpu":
        if tuple(map(int, capability.split("."))) < _FLOAT8_FROM:
            raise ValueError(
                f"{where} is fp8: {device.device_kind} (compute capability {capability}) has no "
                "float8, which begins with 8.9; use int8"
            )
    try:
        _try_float8(device)
    except Exception as error:  # whatever the compiler raises
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{where} is fp8: jax {jax.__version__} cannot multiply float8 on "
            f"{device.device_kind} ({reason[0][:200]}); use int8"
        ) from error


def _try_float8(device) -> Float[Array, "8 8"]:
    x = jax.device_put(jnp.ones((8, 8), jnp.bfloat16), device)
    return jax.jit(lambda x: x @ x.astype(jnp.float8_e4m3fn).astype(x.dtype))(x).block_until_ready()
