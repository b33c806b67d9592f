"""Parameters and optimizer state of a run: restored from its checkpoint, loaded or initialized."""

import functools
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from internvl3_jax.checkpoints import checkpoint, steps
from internvl3_jax.checkpoints.adapters import Adapter, base_hash
from internvl3_jax.checkpoints.manifest import Base
from internvl3_jax.checkpoints.param_hash import described
from internvl3_jax.checkpoints.storage import by_path, nest
from internvl3_jax.config import TrainConfig, to_dict
from internvl3_jax.data.identity import check_identity
from internvl3_jax.data.loader import BatchLoader
from internvl3_jax.io import strict_json
from internvl3_jax.io.remote_files import as_path, is_remote
from internvl3_jax.model import lora
from internvl3_jax.model.internvl import InternVL, abstract_params
from internvl3_jax.parallel import sharding
from internvl3_jax.training.config_diff import config_diff
from internvl3_jax.training.history import RunHistory, eval_identity
from internvl3_jax.training.loss_choice import init_loss_state
from internvl3_jax.training.optimizer import Optimizer, split_params
from internvl3_jax.training.param_table import frozen_hash
from internvl3_jax.training.step import TrainState, init_state, shardings_of


def restore_or_init(
    config: TrainConfig,
    workdir: pathlib.Path,
    model: InternVL,
    optimizer: Optimizer,
    loader: BatchLoader,
    mesh: jax.sharding.Mesh,
    step: int | None,
) -> tuple[TrainState, RunHistory]:
    """Restores the newest intact checkpoint, or loads `config.init_from`, or initializes randomly.

    Every array is made or read with its sharding on the mesh, which may differ from the mesh that
    the checkpoint was saved from.

    Args:
      loader: The training data; restoring moves it to the batch after the checkpoint.
      step: The newest complete step, or None.

    Returns:
      The state and what the run remembers.

    Raises:
      ValueError: The checkpoint, its base or the data are not those of this configuration.
    """
    if config.lora.rank and not config.init_from:
        raise ValueError(
            "lora.rank is above 0 and init_from is empty: name the base of the adapters"
        )
    shapes = jax.eval_shape(functools.partial(_random_state, config, model, optimizer))
    check_adapters_learn(config, shapes.params)
    shardings = shardings_of(shapes, mesh, config.offload_optimizer)
    if step is not None:
        return _restore(config, workdir, loader, sharding.abstract(shapes, shardings), step)

    history = RunHistory(first_length=config.steps, eval_data=eval_identity(config))
    if config.init_from:
        state = warm_start(config, optimizer, shardings, history)
    else:
        init = functools.partial(_random_state, config, model, optimizer)
        state = jax.jit(init, out_shardings=shardings)()
    history.frozen = frozen_hash(state.params, config.optimizer.freeze)
    return state, history


def _random_state(config: TrainConfig, model: InternVL, optimizer: Optimizer) -> TrainState:
    size = config.model.vision.image_size
    row = np.zeros((1, 1), np.int32)
    tiles = np.zeros((1, 1, size, size, 3), np.uint8)
    example = {"tokens": row, "positions": row, "segments": row, "tiles": tiles}
    dtype, loss_state = jnp.dtype(config.param_dtype), init_loss_state(config)
    return init_state(model, optimizer, example, config.seed, dtype, config.lora, loss_state)


def _restore(
    config: TrainConfig,
    workdir: pathlib.Path,
    loader: BatchLoader,
    abstract: TrainState,
    step: int,
) -> tuple[TrainState, RunHistory]:
    """Reads a step of the run. abstract: The state's shapes, dtypes and shardings."""
    check_data(config, workdir, loader, step)
    stored = saved_params(config, abstract.params)
    params, opt_state, extra = steps.restore_training(workdir, step, stored, abstract.opt_state)

    history = RunHistory.of_saved(extra["past"])
    history.set_eval_data(eval_identity(config))
    if config.lora.rank:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        params = restore_on_base(config, workdir, step, params, shardings, history)
    loader.restore(extra["data"])
    if jax.process_index() == 0:
        print(f"resuming from step {step} of {workdir}", flush=True)
    check_frozen(config, params, history, step)
    loss_state = init_loss_state(config)
    if loss_state:
        stored = (np.asarray(value, np.float32) for value in extra["loss_state"])
        loss_state = type(loss_state)(*stored)
    small = jax.device_put((np.int32(step), loss_state), abstract.step.sharding)
    return TrainState(small[0], params, opt_state, small[1]), history


def check_data(config: TrainConfig, workdir: pathlib.Path, loader: BatchLoader, step: int) -> None:
    """Raises data.identity.DataChanged if the samples are not made of the same files as before.

    This reads no array.
    """
    training = strict_json.Object(
        steps.read_training(workdir, step),
        str(workdir / "checkpoints" / str(step) / steps.TRAINING),
    )
    saved = training.get("identity", dict)
    check_identity(saved, loader.identity, step, config.accept_changed_data)


# --- the first state -----------------------------------------------------------------------------


def saved_params(config: TrainConfig, params: dict) -> dict:
    """Returns the parameters that a checkpoint holds: all, or the trained ones of a LoRA run."""
    return split_params(params, config.optimizer.freeze)[0] if config.lora.rank else params


def warm_start(
    config: TrainConfig, optimizer: Optimizer, shardings: TrainState, history: RunHistory
) -> TrainState:
    """Loads the first state from `config.init_from`: every parameter, or an error.

    For LoRA, records the base checkpoint in `history`.
    """
    source = open_base(config, shardings, config.init_from)
    params = source.params
    if config.lora.rank:
        init = functools.partial(lora.init, abstract_params(config.model), config.lora)
        init = jax.jit(init, out_shardings=shardings.params[lora.SUBTREE])
        params = params | {lora.SUBTREE: init(jax.random.key(config.seed))}
        if config.lora.init_from:
            # The processor is the configuration's, whatever the adapter was trained with.
            adapter = checkpoint.load_adapter(
                config.lora.init_from, source, accept_fingerprint=True
            )
            params = load_init_adapter(adapter, params, config, shardings)
        trained = by_path(lora.base_params(saved_params(config, params)))
        history.base = base_hash(source.described, trained)
        # A hub id is recorded as it is.
        is_local = is_remote(config.init_from) or (
            pathlib.Path(os.path.expanduser(config.init_from)).exists()
        )
        history.base_path = str(source.directory) if is_local else config.init_from
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    loss_state = jax.device_put(init_loss_state(config), shardings.loss_state)
    return TrainState(jax.device_put(np.int32(0), shardings.step), params, opt_state, loss_state)


def open_base(config: TrainConfig, shardings: TrainState, name: str) -> checkpoint.Checkpoint:
    """Loads a checkpoint's parameters, sharded as a run trains them or as the base of its adapters.

    Raises:
      ValueError: The checkpoint's model is not that of the configuration.
    """
    descriptions = {}

    def prepare(path, leaf):
        descriptions.update(described({path: leaf}))
        return lora.prepare_base_leaf(path, leaf, config.lora)

    is_base = config.lora.rank > 0
    source = checkpoint.load(
        name,
        dtype=config.param_dtype,
        mesh=shardings.step.mesh,
        prepare=prepare if is_base else None,
    )
    checkpoint.check_not_quantized(source, "trained")
    source.described = descriptions if is_base else None

    # Drop path belongs to the training, not to the weights.
    loaded, wanted = to_dict(source.config), to_dict(config.model)
    loaded["vision"]["drop_path"] = wanted["vision"]["drop_path"]
    if differences := config_diff(loaded, wanted, "model", "checkpoint"):
        raise ValueError(f"{name} does not match the config: {'; '.join(differences)}")

    count = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config.model)))
    if jax.process_index() == 0:
        print(f"all {count:,} parameters are from {source.directory}; none is initialized")
    if is_base:
        source.params = jax.device_put(source.params, lora.base_params(shardings.params))
    return source


# --- LoRA ----------------------------------------------------------------------------------------


def restore_on_base(
    config: TrainConfig,
    workdir: pathlib.Path,
    step: int,
    trained: dict,
    shardings: TrainState,
    history: RunHistory,
) -> dict:
    """Joins the parameters of a LoRA run's checkpoint with its base; updates `history.base_path`.

    If config.init_from is a training run, which may have continued since, the base is the step that
    was taken from it at first.

    Args:
      trained: What the checkpoint holds.

    Raises:
      ValueError: The base has changed since.
    """
    recorded = as_path(history.base_path)
    is_recorded = recorded.is_relative_to(as_path(config.init_from)) and recorded.exists()
    name = history.base_path if is_recorded else config.init_from
    source = open_base(config, shardings, name)
    if history.base != base_hash(source.described, by_path(lora.base_params(trained))):
        raise ValueError(
            f"step {step} of {workdir} was trained on the base {history.base_path}, and "
            f"{source.directory} has other parameters; bring that base back, or name it as "
            f"init_from"
        )
    params = nest(by_path(source.params) | by_path(trained))
    # Another machine may quantize the base to other bits.
    history.frozen, history.base_path = frozen_hash(params, config.optimizer.freeze), name
    return params


def check_adapters_learn(config: TrainConfig, params: dict) -> None:
    """Raises ValueError if optimizer.freeze names what lora.targets or lora.full train: it would
    not be saved.
    """
    if not config.lora.rank:
        return
    full = [re.compile(pattern) for pattern in config.lora.full]
    wanted = {
        path
        for path in by_path(params)
        if path.startswith("lora/") or any(pattern.fullmatch(path) for pattern in full)
    }
    if frozen := sorted(wanted - by_path(saved_params(config, params)).keys()):
        raise ValueError(
            f"optimizer.freeze freezes {frozen[0]}, which lora.targets or lora.full trains; "
            f"name it in one of them"
        )


def load_init_adapter(
    adapter: Adapter, params: dict, config: TrainConfig, shardings: TrainState
) -> dict:
    """Returns the parameters with a loaded adapter in place of the new one.

    Raises:
      ValueError: Its layers or ranks are not those of the configuration.
    """
    subtree = {lora.SUBTREE: lora.unscaled(adapter.lora, config.lora)} | adapter.whole
    loaded, new = by_path(subtree), by_path(saved_params(config, params))
    for name in loaded | new:
        if np.shape(loaded.get(name)) != np.shape(new.get(name)):
            in_adapter, in_config = (
                str(np.shape(leaves[name])) if name in leaves else "missing"
                for leaves in (loaded, new)
            )
            raise ValueError(
                f"{config.lora.init_from} does not fit lora.rank, targets and full: "
                f"{name} is {in_adapter} in the adapter, {in_config} in the config"
            )
    loaded, by_sharding = reinit_dead_ranks(loaded, new), by_path(shardings.params)
    arrays = {
        name: jax.device_put(jnp.asarray(leaf, jnp.float32), by_sharding[name])
        for name, leaf in loaded.items()
    }
    return nest(by_path(params) | arrays)


def reinit_dead_ranks(loaded: dict, new: dict) -> dict:
    """Reinitializes dead ranks of adapters, given and returned by path.

    Where both A and B are zero, as in layers that had no adapter, neither gets a gradient. There A
    is taken from `new`, which changes no output.
    """

    def revive(path, leaf):
        if not path.startswith("lora/") or not path.endswith("/a"):
            return leaf
        b = jnp.asarray(loaded[f"{path[:-1]}b"])
        a_is_zero = (jnp.asarray(leaf) == 0).all(axis=-2, keepdims=True)
        b_is_zero = (b == 0).all(axis=-1)[..., None, :]
        return jnp.where(a_is_zero & b_is_zero, new[path], leaf)

    return {path: revive(path, leaf) for path, leaf in loaded.items()}


def base_of(config: TrainConfig, history: RunHistory) -> Base | None:
    """Returns what a LoRA run's checkpoints say of their base, or None without adapters."""
    if not config.lora.rank:
        return None
    return Base(history.base_path, config.param_dtype, history.base, config.lora)


def check_frozen(config: TrainConfig, params: dict, history: RunHistory, step: int) -> None:
    """Raises ValueError unless the frozen parameters have the bits that the run began with."""
    if config.optimizer.freeze and frozen_hash(params, config.optimizer.freeze) != history.frozen:
        raise ValueError(
            f"step {step}: parameters that optimizer.freeze names have changed; "
            f"the state is not saved"
        )
