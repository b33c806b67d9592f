"""The adapters of a LoRA run on disk: a checkpoint that names its base and holds only what was trained beside it."""

import logging
import pathlib

import jax
import jax.numpy as jnp

from internvl3_jax import lora, storage
from internvl3_jax.checksum import combined, described
from internvl3_jax.config import LoraConfig
from internvl3_jax.manifest import Base
from internvl3_jax.sharding import abstract, param_shardings

log = logging.getLogger(__name__)


def read_own(directory: pathlib.Path, mesh: jax.sharding.Mesh | None = None) -> dict:
    """What a step of a LoRA run holds: the subtree "lora", and parameters that were trained whole."""
    shapes = storage.nest(dict(storage.leaf_infos(directory / "params")))
    if mesh is not None:
        shapes = abstract(shapes, param_shardings(shapes, mesh))
    return storage.load_tree(directory / "params", shapes)


def put_on(params: dict, own: dict, base: Base) -> dict:
    """The run's whole tree, as it trains, of the base's parameters and what it holds itself."""
    return storage.nest(storage.by_path(lora.prepared(params, base.lora)) | storage.by_path(own))


def adapter(own: dict, config: LoraConfig) -> lora.Adapter:
    """The same for use beside a base that stays as it is."""
    return lora.Adapter(lora.scaled(own[lora.SUBTREE], config), lora.without(own))


def check_base(params: dict, own: dict, base: Base, where: str) -> None:
    """ValueError unless the base's parameters, in whatever dtype they are here, are those that the run was trained beside."""
    leaves, trained = storage.by_path(params), storage.by_path(lora.without(own))
    if missing := sorted(trained.keys() - leaves.keys()):
        raise ValueError(f"{where} has parameters that the base lacks: {', '.join(missing[:5])}")
    if any(jnp.finfo(leaf.dtype).bits < jnp.finfo(base.dtype).bits for leaf in leaves.values()):
        log.warning("%s: not checked against its base, which is here in a narrower dtype than %s", where, base.dtype)
        return
    found = {}
    for path, leaf in leaves.items():
        if path not in trained:
            as_trained = lora.prepared_leaf(path, leaf.astype(base.dtype), base.lora)
            found |= described(storage.by_path(storage.nest({path: as_trained})))
    if combined(found) != base.frozen:
        raise ValueError(
            f"{where} was trained beside {base.path} as it was then; the base here has other parameters. Bring that one back, or name it"
        )
