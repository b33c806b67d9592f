"""AdamW, Muon or Adafactor with schedule, decay, learning rates by leaf, and frozen parameters.

A parameter is named by its path in the tree, such as "vision/layers/fc1/kernel".
`OptimizerConfig.freeze` splits the tree in two. The optimizer sees only the trainable part: frozen
parameters have no state, no gradient and no update.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from internvl3_jax.config import OptimizerConfig
from internvl3_jax.param_tree import match_paths, path_name

NAMES = ("adafactor", "adamw", "muon")
SCHEDULES = ("cosine", "wsd")
_NORMS_AND_BIASES = ("bias", "scale", "layer_scale1", "layer_scale2")


class Optimizer(NamedTuple):
    """An optax transformation of the trainable parameters, and the split that finds them.

    Attributes:
      init: From all parameters to the state, a tree of arrays.
      update: From (gradients, state, trainable parameters) to (updates, state).
      split: From all parameters to (trainable, frozen), two trees that `join` joins again.
    """

    init: Callable[[dict], Any]
    update: Callable[[dict, Any, dict], tuple[dict, Any]]
    split: Callable[[dict], tuple[dict, dict]]


def make_optimizer(config: OptimizerConfig, steps: int) -> Optimizer:
    """Returns the optimizer of a run of `steps` updates.

    Raises:
      ValueError: A field is out of its range; the error names it. Freeze patterns are checked
        later, by `split`.
    """
    if config.name not in NAMES:
        raise ValueError(
            f"optimizer.name is {config.name!r}; it must be {', '.join(NAMES[:-1])} or {NAMES[-1]}"
        )
    if config.moment_dtype not in ("float32", "bfloat16"):
        raise ValueError(
            f"optimizer.moment_dtype is {config.moment_dtype!r}; it must be float32 or bfloat16"
        )
    schedule = make_schedule(config, steps, config.learning_rate)
    if config.name == "muon":
        peak = make_schedule(config, steps, config.muon_learning_rate)
        parts = {
            "muon": _finish(_muon(config), config, peak),
            "adamw": _finish(_adam(config), config, schedule),
        }
        update = optax.partition(
            parts,
            lambda tree: jax.tree.map(lambda x: "muon" if is_stacked_matrix(x) else "adamw", tree),
        )
    else:
        update = _finish(
            _adam(config) if config.name == "adamw" else _adafactor(config), config, schedule
        )
    chain = optax.chain(optax.clip_by_global_norm(config.clip_norm), update)

    def split(params):
        return split_params(params, config.freeze)

    def init(params):
        # Statistics are float32 whatever the dtype of the parameters, except a first moment in
        # moment_dtype.
        return chain.init(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), split(params)[0]))

    return Optimizer(init, chain.update, split)


def make_schedule(config: OptimizerConfig, steps: int, peak: float) -> optax.Schedule:
    """Returns the learning rate by update, counted from 0.

    It rises linearly from 0 to `peak` and ends at `final_lr_fraction` of it. "cosine" falls all the
    way; "wsd" (warm-up, stable, decay: Hu et al. 2024, MiniCPM) stays at the peak and falls
    linearly at the end.
    """
    warmup = warmup_steps(config, steps)
    if not 0 <= warmup < steps:
        raise ValueError(
            f"optimizer.warmup_steps is {warmup}; it must be between 0 and steps ({steps}): set it, "
            f"or optimizer.warmup_fraction, which follows steps"
        )
    final = peak * config.final_lr_fraction
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, final)
    if config.schedule != "wsd":
        raise ValueError(
            f"optimizer.schedule is {config.schedule!r}; it must be {' or '.join(SCHEDULES)}"
        )
    falling = round(config.decay_fraction * steps)
    if not 0 <= falling <= steps - warmup:
        raise ValueError(
            f"optimizer.decay_fraction is {config.decay_fraction}: {falling} of {steps} steps, "
            f"but {warmup} of them are the warm-up"
        )
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, warmup),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, final, falling),
        ],
        [warmup, steps - falling],
    )


def warmup_steps(config: OptimizerConfig, steps: int) -> int:
    """Returns the number of warm-up steps, from `warmup_fraction` if that is set."""
    return round(config.warmup_fraction * steps) if config.warmup_fraction else config.warmup_steps


def _finish(
    direction, config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Adds decoupled weight decay (Loshchilov and Hutter 2019) and each leaf's learning rate."""
    mask = None if config.decay_norms_and_biases else _is_decayed
    return optax.chain(
        direction,
        optax.add_decayed_weights(config.weight_decay, mask),
        optax.stateless(
            lambda updates, _: jax.tree.map(jnp.multiply, updates, relative_rates(updates, config))
        ),
        optax.scale_by_learning_rate(schedule),
    )


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    # With Muon, whose momentum is Nesterov's, AdamW takes Nesterov's too, as in
    # optax.contrib.muon.
    nesterov = config.name == "muon"
    return optax.scale_by_adam(
        config.beta1, config.beta2, mu_dtype=config.moment_dtype, nesterov=nesterov
    )


def _adafactor(config: OptimizerConfig) -> optax.GradientTransformation:
    """Returns Adafactor as for ViT-G (Zhai et al. 2021): a factored second and a first moment.

    Its steps do not grow with the parameters, so that a learning rate means about what it means to
    AdamW. A stacked leaf is factored over its matrices' axes, and its steps are clipped together.
    """
    second = optax.scale_by_factored_rms(decay_rate=0.8)  # Shazeer and Stern 2018
    parts = [second, optax.clip_by_block_rms(1.0)]
    if config.beta1:
        parts.append(optax.ema(config.beta1, debias=False, accumulator_dtype=config.moment_dtype))
    return optax.chain(*parts)


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """Returns Muon (Jordan et al. 2024) on every matrix of [...,in,out], scaled by its shape."""
    orthogonal = scale_by_muon(
        mu_dtype=config.moment_dtype,
        weight_dimension_numbers=lambda tree: jax.tree.map(
            lambda leaf: MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1), tree
        ),
    )
    return optax.chain(
        orthogonal,
        optax.stateless_with_tree_map(lambda x, _: x * max(1.0, x.shape[-1] / x.shape[-2]) ** 0.5),
    )


def is_stacked_matrix(leaf) -> bool:
    """Returns whether Muon takes a leaf: the matrices of all layers, [L,in,out] or [L,E,in,out]."""
    return leaf.ndim >= 3


def _is_decayed(tree):
    return jax.tree.map_with_path(lambda path, _: path[-1].key not in _NORMS_AND_BIASES, tree)


# --- the learning rate of each leaf --------------------------------------------------------------


def relative_rates(params, config: OptimizerConfig):
    """Returns factors of the learning rate: f32[] per leaf, f32[L,1...] for the tower's layers.

    Each component has its factor. In the vision tower each layer has `vision_layer_decay` times
    that of the layer above it. The top layer has the tower's factor, and the embeddings come below
    the first layer (Bao et al. 2021, BEiT, counted from the top).
    """
    leaves, tree = jax.tree.flatten_with_path(params)
    # An adapter has the factor of its layer.
    paths = [path_name(path).removeprefix("lora/") for path, _ in leaves]
    depth = next(
        (
            leaf.shape[0]
            for path, (_, leaf) in zip(paths, leaves, strict=True)
            if path.startswith("vision/layers/")
        ),
        0,
    )
    decay = np.float32(config.vision_layer_decay)

    def rate(path, leaf):
        component = np.float32(getattr(config, path.split("/", 1)[0] + "_lr_scale"))
        if not path.startswith("vision/") or decay == 1:
            return component
        if path.startswith("vision/layers/"):
            below_top = np.arange(depth - 1, -1, -1, dtype=np.float32)
            return component * (decay**below_top).reshape(-1, *(1,) * (leaf.ndim - 1))
        return component * decay**depth

    return jax.tree.unflatten(
        tree, [rate(path, leaf) for path, (_, leaf) in zip(paths, leaves, strict=True)]
    )


# --- what is trained -----------------------------------------------------------------------------


def split_params(params: dict, freeze: tuple[str, ...]) -> tuple[dict, dict]:
    """Returns (trainable, frozen): a leaf is frozen if a pattern matches its full path.

    Raises:
      ValueError: A pattern is not a regular expression or matches nothing, or all leaves are
        frozen.
    """
    leaves = flatten_dict(params, sep="/")
    frozen = {
        path for pattern in freeze for path in match_paths(pattern, leaves, "optimizer.freeze")
    }
    if len(frozen) == len(leaves):
        raise ValueError(f"optimizer.freeze {list(freeze)} leaves nothing to train")
    parts = (
        {path: leaf for path, leaf in leaves.items() if (path in frozen) is wanted}
        for wanted in (False, True)
    )
    trained, frozen = (unflatten_dict(part, sep="/") for part in parts)
    return trained, frozen


def join(trained: dict, frozen: dict) -> dict:
    """Joins the two trees of `split_params`."""
    return unflatten_dict(flatten_dict(trained, sep="/") | flatten_dict(frozen, sep="/"), sep="/")
