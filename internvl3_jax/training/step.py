"""The train step: loss, gradients of the trainable parameters, update.

These are pure functions; the caller compiles them and donates the state. Metrics of `train_step`,
f32[] unless another shape is given:

    loss             under MPO also loss_preference, loss_quality, loss_generation, reward_shift,
                     and the means over pairs reward_chosen, reward_rejected, reward_margin and
                     reward_accuracy
    router_...       under "router": the tiles of the update that were judged, the shares of them
                     that are cheap and that the router had right, and the ratio's threshold
    weight           sum of the loss weights
    grad_norm        before clipping; also that of each trained component, such as grad_norm_vision
    finite           bool[], whether loss and gradients are
    zero_gradient    i32[], index in `trained_paths` of the first leaf with an unexpected zero
                     gradient, or -1
    loss_balance,    of a decoder with experts; the second is f32[layers,experts], the tokens that
    expert_choices   chose each
    source_loss,     f32[num_sources], if the loss reports sources
    source_weight
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32, PRNGKeyArray

from internvl3_jax.config import LoraConfig, TrainConfig
from internvl3_jax.model import lora
from internvl3_jax.model.internvl import InternVL
from internvl3_jax.parallel import compiler_options
from internvl3_jax.parallel.collectives import constrain, require_mesh
from internvl3_jax.parallel.sharding import param_shardings, state_shardings
from internvl3_jax.param_tree import path_name
from internvl3_jax.training.loss_choice import make_loss
from internvl3_jax.training.mpo import RewardShift
from internvl3_jax.training.objective import batch_totals
from internvl3_jax.training.optimizer import Optimizer, join
from internvl3_jax.training.vico import RatioWindow


class TrainState(NamedTuple):
    """State that an update changes."""

    step: Int32[Array, ""]  # number of updates done
    params: dict
    opt_state: Any
    loss_state: RewardShift | RatioWindow | tuple = ()


def train_step(
    loss_fn: Callable,
    optimizer: Optimizer,
    state: TrainState,
    batch: Mapping,
    key: PRNGKeyArray,
    ref_params: Mapping | None = None,
    *,
    micro_batches: int = 1,
) -> tuple[TrainState, dict]:
    """Computes one update.

    Args:
      loss_fn: As `loss_choice.make_loss` returns it.
      batch: A `Batch`.
      key: Seeds drop path and the adapters' dropout, folded with the step.
      ref_params: Parameters of the reference model of "mpo", "vico" and "router", or None; see
        `objective.MpoLoss.ref_logps`.
      micro_batches: Number of equal parts of the batch that are computed one after the other; loss
        and gradients are those of the full batch.

    Returns:
      The new state and the metrics, which the top of this file lists. If the loss or a gradient is
      not finite, the state is the old one, so that it can be saved.
    """
    # Loss and gradients of the trainable parameters, summed over micro-batches
    trainable, frozen = optimizer.split(state.params)
    totals, key = batch_totals(batch), jax.random.fold_in(key, state.step)

    def micro_batch(trainable, batch, index, loss_state):
        def loss(trainable):
            params, micro_key = join(trainable, frozen), jax.random.fold_in(key, index)
            return loss_fn(params, batch, micro_key, loss_state, totals, ref_params)

        (value, (metrics, loss_state)), gradients = jax.value_and_grad(loss, has_aux=True)(
            trainable
        )
        return (metrics | {"loss": value}, gradients), loss_state

    (sums, gradients), loss_state = _over_micro_batches(
        micro_batch, trainable, batch, micro_batches, state.loss_state
    )

    # Metrics, replicated, since every process reads them
    loss_state, loss_metrics = loss_fn.finish(loss_state, sums)
    metrics = (
        sums
        | loss_metrics
        | {"weight": totals.weight}
        | _gradient_metrics(gradients, lora.expected_zero_grads(trainable))
    )
    metrics["finite"] = finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    metrics = jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), metrics)

    # Update; the optimizer state comes to the device first, if it is offloaded
    state = state._replace(opt_state=jax.device_put(state.opt_state, jax.memory.Space.Device))
    updates, opt_state = optimizer.update(gradients, state.opt_state, trainable)
    params = join(optax.apply_updates(trainable, updates), frozen)
    updated = TrainState(state.step + 1, params, opt_state, loss_state)
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state), metrics


def make_step(
    config: TrainConfig,
    model: InternVL,
    optimizer: Optimizer,
    num_sources: int,
    shardings: TrainState,
):
    """Returns the jitted (state, batch, key, ref_params) -> (state, metrics); state is donated.

    Args:
      shardings: Those of the state, as `shardings_of` returns them.

    Raises:
      RuntimeError: No mesh is in context.
    """
    require_mesh()
    loss_fn = make_loss(
        config, model, num_sources, drop_path=trains_tower(optimizer, shardings.params)
    )
    step = functools.partial(train_step, loss_fn, optimizer, micro_batches=config.micro_batches)
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=compiler_options.options("train"),
    )


def trains_tower(optimizer: Optimizer, params: dict) -> bool:
    """Returns whether the layers of the vision tower are trained; frozen ones drop no paths."""
    return "layers" in optimizer.split(params)[0].get("vision", {})


# --- the state -----------------------------------------------------------------------------------


def make_model(config: TrainConfig) -> InternVL:
    """Returns the model as a run trains it."""
    return InternVL(
        config.model,
        jnp.dtype(config.compute_dtype),
        scan_unroll=config.scan_unroll,
        remat_vision=config.remat_vision,
        remat_language=config.remat_language,
        attention_vision=config.attention_vision,
        attention_language=config.attention_language,
        max_segments=config.data.max_segments,
    )


def init_state(
    model: InternVL,
    optimizer: Optimizer,
    batch,
    seed: int,
    param_dtype=jnp.float32,
    adapters: LoraConfig | None = None,
    loss_state: RewardShift | RatioWindow | tuple = (),
) -> TrainState:
    """Initializes a state randomly.

    Args:
      batch: An example of the batch, which gives shapes.
      adapters: With a rank above 0 the parameters are a base and its LoRA adapters.
    """
    params = model.init(jax.random.key(seed), batch)["params"]
    params = jax.tree.map(lambda leaf: leaf.astype(param_dtype), params)
    if adapters and adapters.rank:
        new = lora.init(params, adapters, jax.random.key(seed))
        params = lora.prepare_base(params, adapters) | {lora.SUBTREE: new}
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), loss_state)


def shardings_of(
    state: TrainState, mesh: jax.sharding.Mesh, offload_optimizer: bool = False
) -> TrainState:
    """Returns the NamedShardings of a state, whose leaves may be ShapeDtypeStructs.

    Args:
      offload_optimizer: Whether the optimizer state is kept in host memory.
    """
    replicated = jax.NamedSharding(mesh, jax.P())
    opt_state = state_shardings(state.opt_state, state.params, mesh)
    if offload_optimizer:
        opt_state = jax.tree.map(
            lambda sharding: sharding.with_memory_kind("pinned_host"), opt_state
        )
    loss_state = jax.tree.map(lambda _: replicated, state.loss_state)
    return TrainState(replicated, param_shardings(state.params, mesh), opt_state, loss_state)


def trained_paths(params: dict, optimizer: Optimizer) -> list[str]:
    """Returns the paths of the trained leaves in the order in which `zero_gradient` counts them."""
    return [path_name(path) for path, _ in jax.tree.leaves_with_path(optimizer.split(params)[0])]


# --- micro-batches and gradients ------------------------------------------------------------------


def _over_micro_batches(function, trainable, batch, count: int, carry):
    """Returns the float32 sum of function(trainable, micro-batch, index, carry), and the carry."""
    rows = len(batch["tokens"])
    if rows % count:
        raise ValueError(f"micro_batches is {count}; it must divide the batch's {rows} rows")

    if count == 1:
        sums, carry = function(trainable, batch, 0, carry)
        return jax.tree.map(lambda x: x.astype(jnp.float32), sums), carry
    # A micro-batch takes every count-th row, so that sharded rows stay on their devices.
    micro_batches = jax.tree.map(
        lambda x: x.reshape(rows // count, count, *x.shape[1:]).swapaxes(0, 1), dict(batch)
    )
    indices = jnp.arange(count)

    def add(state, inputs):
        total, carry = state
        sums, carry = function(trainable, *inputs, carry)
        return (jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, sums), carry), None

    shapes, _ = jax.eval_shape(
        function, trainable, *jax.tree.map(lambda x: x[0], (micro_batches, indices)), carry
    )
    total = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    return jax.lax.scan(add, (total, carry), (micro_batches, indices))[0]


def _gradient_metrics(gradients: dict, expected_zero: list) -> dict:
    """Returns norms of the gradients. expected_zero: For each leaf whether its gradient is zero."""
    squares = jax.tree.map(lambda x: jnp.square(x).sum(), gradients)
    leaves = jnp.stack(jax.tree.leaves(squares))
    metrics = {
        f"grad_norm_{name}": jnp.sqrt(sum(jax.tree.leaves(component)))
        for name, component in squares.items()
    }
    metrics["grad_norm"] = jnp.sqrt(leaves.sum())
    wrong = (leaves == 0) & ~jnp.stack(jax.tree.map(jnp.asarray, expected_zero))
    metrics["zero_gradient"] = jnp.where(wrong.any(), jnp.argmax(wrong), -1).astype(jnp.int32)
    return metrics
