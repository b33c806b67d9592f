"""Where a run's parameters come from: what it starts from, and the base that a LoRA run trains
beside.
"""

import dataclasses
import functools
import math
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from internvl3_jax.checkpoints import checkpoint
from internvl3_jax.checkpoints.adapters import Adapter, base_hash
from internvl3_jax.checkpoints.manifest import Base
from internvl3_jax.checkpoints.param_hash import described
from internvl3_jax.checkpoints.storage import by_path, nest
from internvl3_jax.config import TrainConfig, from_dict, to_dict
from internvl3_jax.io.remote_files import as_path, is_remote
from internvl3_jax.model import lora
from internvl3_jax.model.internvl import abstract_params
from internvl3_jax.training.optimizer import Optimizer, split_params
from internvl3_jax.training.param_table import frozen_hash
from internvl3_jax.training.step import TrainState, init_loss_state


@dataclasses.dataclass
class RunHistory:
    """What a run remembers beside its arrays and data streams."""

    seconds: float = 0.0  # trained so far
    best: float = float("inf")  # lowest held-out loss
    best_step: int = 0
    frozen: str = ""  # hash of what is not trained
    base: str = ""  # of a LoRA run: `adapters.base_hash`
    base_path: str = ""  # where that is

    def saved(self) -> dict:
        """As it is kept in a step: JSON has no infinity."""
        return dataclasses.asdict(self) | {"best": self.best if math.isfinite(self.best) else None}

    @classmethod
    def of_saved(cls, values: dict) -> "RunHistory":
        """From `saved`, or from what an earlier version kept. ConfigError names what is of a wrong
        type.
        """
        known = {
            name: value for name, value in values.items() if name != "best" or _is_finite(value)
        }
        return from_dict(cls, known, "past")


def _is_finite(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def trainable(config: TrainConfig, params: dict) -> dict:
    """What of the parameters a checkpoint holds: all, or of a LoRA run what it trains."""
    return split_params(params, config.optimizer.freeze)[0] if config.lora.rank else params


def warm_start(
    config: TrainConfig, optimizer: Optimizer, places: TrainState, past: RunHistory
) -> TrainState:
    """The first state from a checkpoint, a released directory of either layout or a hub id; all of
    its parameters or an error. Past is told what a LoRA run is trained beside.
    """
    source = open_base(config, places, config.init_from)
    params = source.params
    if config.lora.rank:
        draw = functools.partial(lora.init, abstract_params(config.model), config.lora)
        drawn = jax.jit(draw, out_shardings=places.params[lora.SUBTREE])(
            jax.random.key(config.seed)
        )
        params = params | {lora.SUBTREE: drawn}
        if config.lora.init_from:
            # With the configuration's processor, whatever it was trained with.
            adapter = checkpoint.load_adapter(
                config.lora.init_from, source, accept_fingerprint=True
            )
            params = load_init_adapter(adapter, params, config, places)
        past.base = base_hash(
            source.described, by_path(lora.base_params(trainable(config, params)))
        )
        local = (
            is_remote(config.init_from)
            or pathlib.Path(os.path.expanduser(config.init_from)).exists()
        )
        past.base_path = str(source.directory) if local else config.init_from  # a hub id
    opt_state = jax.jit(optimizer.init, out_shardings=places.opt_state)(params)
    loss_state = jax.device_put(init_loss_state(config), places.loss_state)
    return TrainState(jax.device_put(np.int32(0), places.step), params, opt_state, loss_state)


def open_base(config: TrainConfig, places: TrainState, name: str) -> checkpoint.Checkpoint:
    """Its parameters, without adapters, are as a run trains them or trains beside them."""
    read = {}

    def prepare(path, leaf):
        read.update(described({path: leaf}))
        return lora.prepare_base_leaf(path, leaf, config.lora)

    is_base = config.lora.rank > 0
    source = checkpoint.load(
        name, dtype=config.param_dtype, mesh=places.step.mesh, prepare=prepare if is_base else None
    )
    source.described = read if is_base else None
    theirs, ours = to_dict(source.config), to_dict(config.model)
    # of the training, not of the weights
    theirs["vision"]["drop_path"] = ours["vision"]["drop_path"]
    if found := config_diff(theirs, ours, "model"):
        raise ValueError(f"{name} is another model than the configuration's: {'; '.join(found)}")
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config.model)))
    if jax.process_index() == 0:
        print(
            f"all {count:,} parameters are from {source.directory}; none is missing, none is initialised"
        )
    if config.lora.rank:
        source.params = jax.device_put(source.params, lora.base_params(places.params))
    return source


def restore_on_base(
    config: TrainConfig,
    workdir: pathlib.Path,
    step: int,
    own: dict,
    places: TrainState,
    past: RunHistory,
) -> dict:
    """What a LoRA run's checkpoint holds, with the base that it was trained beside; ValueError if
    that is another now. Past is told where it is.

    Where config.init_from names a training run, which may have gone on, that is the step of it that
    was taken then.
    """
    before = as_path(past.base_path)
    name = (
        past.base_path
        if before.is_relative_to(as_path(config.init_from)) and before.exists()
        else config.init_from
    )
    source = open_base(config, places, name)
    if past.base != base_hash(source.described, by_path(lora.base_params(own))):
        raise ValueError(
            f"step {step} of {workdir} was trained beside {past.base_path} as it was then; {source.directory} has other parameters. Bring "
            f"that one back, or name it as init_from"
        )
    params = nest(by_path(source.params) | by_path(own))
    # Of a quantized base other machines may make other bits.
    past.frozen, past.base_path = frozen_hash(params, config.optimizer.freeze), name
    return params


def check_adapters_learn(config: TrainConfig, params: dict) -> None:
    """ValueError if optimizer.freeze names what lora.targets or lora.full train: no checkpoint
    would hold it.
    """
    if not config.lora.rank:
        return
    whole = [re.compile(pattern) for pattern in config.lora.full]
    meant = {
        path
        for path in by_path(params)
        if path.startswith("lora/") or any(one.fullmatch(path) for one in whole)
    }
    if lost := sorted(meant - by_path(trainable(config, params)).keys()):
        raise ValueError(
            f"optimizer.freeze freezes {lost[0]}, which lora.targets or lora.full trains; name it in one of them"
        )


def load_init_adapter(
    adapter: Adapter, params: dict, config: TrainConfig, places: TrainState
) -> dict:
    """The parameters with an adapter in the place of the new ones. ValueError unless it has the
    layers and ranks of the configuration.
    """
    own = {lora.SUBTREE: lora.unscaled(adapter.lora, config.lora)} | adapter.whole
    theirs, ours = by_path(own), by_path(trainable(config, params))
    wrong = [
        name for name in theirs | ours if np.shape(theirs.get(name)) != np.shape(ours.get(name))
    ]
    if wrong:
        name = wrong[0]
        shapes = " and ".join(
            str(np.shape(leaves[name])) if name in leaves else "missing"
            for leaves in (theirs, ours)
        )
        raise ValueError(
            f"{config.lora.init_from} does not fit lora.rank, targets and full: {name} is {shapes} there and here"
        )
    theirs = reinit_dead_ranks(theirs, ours)
    placed = by_path(places.params)
    put = {
        name: jax.device_put(jnp.asarray(leaf, jnp.float32), placed[name])
        for name, leaf in theirs.items()
    }
    return nest(by_path(params) | put)


def reinit_dead_ranks(theirs: dict, drawn: dict) -> dict:
    """Adapters by path, of which no part stands still for ever: where a and b are both zero, as of
    layers that were left out, neither has a gradient. There a is drawn anew, which changes no
    output.
    """

    def one(path, leaf):
        if not path.startswith("lora/") or not path.endswith("/a"):
            return leaf
        b = jnp.asarray(theirs[f"{path[:-1]}b"])
        dead = (jnp.asarray(leaf) == 0).all(axis=-2, keepdims=True) & (b == 0).all(axis=-1)[
            ..., None, :
        ]
        return jnp.where(dead, drawn[path], leaf)

    return {path: one(path, leaf) for path, leaf in theirs.items()}


def base_of(config: TrainConfig, past: RunHistory) -> Base | None:
    """What a LoRA run's checkpoints say of their base."""
    if not config.lora.rank:
        return None
    return Base(past.base_path, config.param_dtype, past.base, config.lora)


def check_frozen(config: TrainConfig, params, past: RunHistory, step: int) -> None:
    """ValueError unless what is not trained has the bits that it began with."""
    if config.optimizer.freeze and frozen_hash(params, config.optimizer.freeze) != past.frozen:
        raise ValueError(
            f"step {step}: parameters that optimizer.freeze names have changed; the state is not saved"
        )


def config_diff(theirs: dict, ours: dict, where: str) -> list[str]:
    found = []
    for name in theirs | ours:
        value, own, path = theirs.get(name), ours.get(name), f"{where}.{name}" if where else name
        if isinstance(value, dict) and isinstance(own, dict):
            found += config_diff(value, own, path)
        elif value != own:
            found.append(f"{path} is {value!r} there and {own!r} here")
    return found
