"""Shapes, dtypes and shardings of the parameters that are loaded from a checkpoint."""

import pathlib

import jax

from internvl3_jax.checkpoints import storage
from internvl3_jax.checkpoints.manifest import Manifest
from internvl3_jax.config import ModelConfig
from internvl3_jax.io.integrity import MANIFEST
from internvl3_jax.model import weights
from internvl3_jax.model.internvl import abstract_params
from internvl3_jax.parallel.sharding import param_shardings


def mesh_of(params: dict) -> jax.sharding.Mesh | None:
    """Returns the mesh that parameters are on, None for a single device."""
    sharding = jax.tree.leaves(params)[0].sharding
    return sharding.mesh if isinstance(sharding, jax.NamedSharding) else None


def shardings_by_path(
    config: ModelConfig, mesh: jax.sharding.Mesh | None
) -> dict[str, jax.sharding.Sharding]:
    """Returns path -> sharding of each parameter."""
    wanted = abstract_params(config)
    if mesh is None:
        return dict.fromkeys(
            storage.by_path(wanted), jax.sharding.SingleDeviceSharding(jax.devices()[0])
        )
    return storage.by_path(param_shardings(wanted, mesh))


def load_targets(
    directory: pathlib.Path,
    manifest: Manifest,
    stored: dict,
    dtype,
    mesh: jax.sharding.Mesh | None,
):
    """Returns the abstract tree to load.

    Args:
      directory: the checkpoint.
      manifest: its configuration, and whether its kernels are quantized.
      stored: path -> shape and dtype of what it holds.
      dtype: of all leaves but quantized kernels; None keeps the stored one.
      mesh: the devices; None: the default one.

    Raises:
      ValueError: the stored shapes are not the model's.
    """
    wanted = storage.by_path(abstract_params(manifest.model))
    if manifest.weights:
        tower = any(weights.is_part(path) and path.startswith("vision/") for path in stored)
        wanted = weights.abstract_quantized(wanted, manifest.weights, tower)
    wrong = [
        f"\n  {path}: stored {_shape(stored.get(path))}, the model has {_shape(wanted.get(path))}"
        for path in sorted(stored.keys() | wanted.keys())
        if _shape(stored.get(path)) != _shape(wanted.get(path))
    ]
    if wrong:
        raise ValueError(
            f"{directory}: the parameters do not fit the model in {MANIFEST}:{''.join(wrong[:12])}"
        )
    if mesh is None:
        shardings = dict.fromkeys(wanted, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    else:
        shardings = storage.by_path(param_shardings(storage.nest(wanted), mesh))
    return storage.nest(
        {
            path: jax.ShapeDtypeStruct(
                leaf.shape,
                leaf.dtype if weights.is_part(path) else dtype or stored[path].dtype,
                sharding=shardings[path],
            )
            for path, leaf in wanted.items()
        }
    )


def _shape(leaf) -> str:
    return "nothing" if leaf is None else str(tuple(leaf.shape))
