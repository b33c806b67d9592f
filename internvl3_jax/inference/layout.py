"""The layout of parameters in generation: layers apart, so that a step reads each where it is.

A scan over stacked layers would copy each layer in every step. On a CPU the layers are parts of the
stacked leaves. Elsewhere leaves are converted one by one, and each is freed before the next, so that
memory holds one leaf twice.
"""

import jax
from jax.typing import DTypeLike

from internvl3_jax.checkpoints import adapters
from internvl3_jax.config import ModelConfig
from internvl3_jax.inference import programs
from internvl3_jax.model import language, lora, vision, weights
from internvl3_jax.parallel.sharding import param_shardings

LARGE = 256 << 20  # bytes of a decoder, whose products take longer than calling them


def mesh_of(params: dict) -> jax.sharding.Mesh | None:
    """Returns the mesh of several devices that the parameters are sharded over, if any."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if isinstance(sharding, jax.NamedSharding) and sharding.mesh.size > 1:
        return sharding.mesh
    return None


def is_fused(params: dict, mesh: jax.sharding.Mesh | None) -> bool:
    """Returns whether the kernels of q/k/v and of gate/up are concatenated: fewer, larger products.

    They are not where a tensor axis shards their columns, nor for large models on a CPU: there the
    products take as long, and layers that are not merged stay where they were loaded.
    """
    if mesh is not None:
        return mesh.shape["tensor"] == 1
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params["language"]))
    return not programs.on_cpu() or size < LARGE


def unroll(
    params: dict,
    config: ModelConfig,
    dtype: DTypeLike,
    fused: bool,
    mesh: jax.sharding.Mesh | None,
) -> dict:
    """Returns parameters in the layout of generation, and empties `params`.

    Args:
      params: the stacked tree or subtrees of it, such as those of an adapter.
      dtype: of all parameters that are not quantized.
      fused: concatenate the kernels of q/k/v, and of gate/up.
      mesh: the devices; None: one.
    """
    params = weights.cast(params, dtype, donate=True)
    on_cpu = programs.on_cpu()
    if on_cpu and "vision" in params:
        params["vision"] = vision.unroll(params["vision"], config.vision, donate=True)
    if "language" in params:
        layers = params["language"]
        params["language"] = language.unroll(layers, config.language, fused, donate=True)
    if lora.SUBTREE in params:
        params[lora.SUBTREE] = adapters.unroll(params[lora.SUBTREE], config, fused, on_cpu)
    if mesh is not None:
        _place(params, param_shardings(params, mesh))
    return params


def _place(params: dict, shardings: dict) -> None:
    """Reshards a tree in place, leaf by leaf."""
    for name, node in params.items():
        if isinstance(node, dict):
            _place(node, shardings[name])
        else:
            params[name] = jax.device_put(node, shardings[name])
