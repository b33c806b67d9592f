"""One update: loss, gradients of what is trained, optimizer. Pure; the caller jits it and donates the state."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from internvl3_jax.config import LoraConfig, LossConfig, TrainConfig
from internvl3_jax.model import lora
from internvl3_jax.model.internvl import InternVL
from internvl3_jax.parallel.sharding import constrain, param_shardings, require_mesh, state_shardings
from internvl3_jax.training import mpo, objective
from internvl3_jax.training.optimizer import Optimizer, join, path_name


class TrainState(NamedTuple):
    step: jax.Array  # i32[], updates done
    params: dict
    opt_state: Any
    shift: mpo.Shift | tuple = ()  # of MPO's quality loss


def make_model(config: TrainConfig) -> InternVL:
    """The model as a run trains it."""
    return InternVL(
        config.model,
        jnp.dtype(config.compute_dtype),
        scan_unroll=config.scan_unroll,
        remat_vision=config.remat_vision,
        remat_language=config.remat_language,
        attention_vision=config.attention_vision,
        attention_language=config.attention_language,
    )


def make_step(config: TrainConfig, model: InternVL, optimizer: Optimizer, sources: int, places: TrainState):
    """(state, batch, key, reference) -> (state, metrics), to be compiled within the mesh; the state is donated, and lies where `places`
    says. reference: parameters of MPO's reference model, or None; see `train_step`.

    places: shardings of the state, of `shardings_of`. RuntimeError if no mesh is in context.
    """
    require_mesh()
    scaling = "none" if set(config.data.deltas) != {"1"} else None  # V2PE switches dynamic NTK off
    settings = {"micro_batches": config.micro_batches, "loss_chunk": config.loss_chunk, "num_sources": sources}
    settings |= {"loss": config.loss, "pairs": config.data.pairs_per_row}
    step = functools.partial(train_step, model, optimizer, scaling=scaling, adapters=config.lora, **settings)
    return jax.jit(step, donate_argnums=0, out_shardings=(places, None))


def init_state(
    model: InternVL,
    optimizer: Optimizer,
    batch,
    seed: int,
    param_dtype=jnp.float32,
    adapters: LoraConfig | None = None,
    loss: LossConfig | None = None,
) -> TrainState:
    """A first state; with `adapters` (of a rank above 0) the parameters are a base and its adapters."""
    params = model.init(jax.random.key(seed), batch)["params"]
    params = jax.tree.map(lambda leaf: leaf.astype(param_dtype), params)
    if adapters and adapters.rank:
        new = lora.init(params, adapters, jax.random.key(seed))
        params = lora.prepared(params, adapters) | {lora.SUBTREE: new}
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), first_shift(loss))


def first_shift(loss: LossConfig | None) -> mpo.Shift | tuple:
    return mpo.first_shift() if loss and loss.kind == "mpo" else ()


def shardings_of(state: TrainState, mesh: jax.sharding.Mesh, offload_optimizer: bool = False) -> TrainState:
    """The state's tree (arrays or ShapeDtypeStructs) of NamedShardings. offload_optimizer: whether its state lies with the hosts."""
    whole = jax.NamedSharding(mesh, jax.P())
    opt_state = state_shardings(state.opt_state, state.params, mesh)
    if offload_optimizer:
        opt_state = jax.tree.map(lambda place: place.with_memory_kind("pinned_host"), opt_state)
    shift = jax.tree.map(lambda _: whole, state.shift)
    return TrainState(whole, param_shardings(state.params, mesh), opt_state, shift)


def train_step(
    model,
    optimizer: Optimizer,
    state: TrainState,
    batch,
    key,
    reference=None,
    *,
    micro_batches=1,
    loss_chunk=1024,
    num_sources=0,
    scaling=None,
    adapters: LoraConfig | None = None,
    loss: LossConfig | None = None,
    pairs: int = 0,
):
    """(new state, metrics); where the loss or a gradient is not finite the state stays as it is, so that it can be saved.

    Args:
      batch: a `Batch`; with num_sources > 0 also "sources" i32[B,T], which source each token came from.
      key: seeds drop path and the adapters' dropout, folded with the step.
      micro_batches: the rows are computed in so many parts; loss and gradients are those of the whole batch.
      loss_chunk: tokens whose logits exist at a time, on each device.
      scaling: rope scaling in place of the config's ("none" under V2PE).
      adapters: settings of the adapters in the state's parameters, if it has any.
      loss: what is minimised; None: next-token cross-entropy. "mpo" takes a batch of pairs, at most `pairs` a row.
      reference: parameters of MPO's reference model. None: the batch has its log-probabilities ("reference"); or else it is the base
        without adapters.

    Metrics, f32[] unless said: loss (weighted mean, or MPO's sum), of MPO loss_preference, _quality, _generation, reward_chosen, _rejected,
    _margin, _accuracy (means over pairs) and reward_shift; weight (sum), grad_norm before clipping, that of _vision, _projector, _language,
    _lora if they are trained; finite bool[]; zero_gradient i32[], the first trained leaf (`trained_paths`) whose gradient is all
    zero though it need not be (`lora.idle`), or -1; source_loss and source_weight f32[num_sources], sums.
    """
    trained, frozen = optimizer.split(state.params)
    loss = loss or LossConfig()
    whole, head = objective.whole(batch), objective.Head(model.config.language.vocab_size, loss_chunk)
    drop_path_key = jax.random.fold_in(key, state.step)
    # Drop path is for a tower that learns; under MPO it would set the policy apart from its reference.
    is_still = "layers" not in trained.get("vision", {}) or (loss.kind == "mpo" and not loss.drop_path)

    def of_reference(part):
        return reference_log_probabilities(model, head, state.params, reference, part, pairs, scaling)

    def loss_fn(trained, part, index, shift):
        variables = lora.variables(join(trained, frozen), adapters, training=True)
        own_key = jax.random.fold_in(drop_path_key, index)
        rngs = {"drop_path": own_key, "dropout": jax.random.fold_in(own_key, 1)}
        inputs = outputs(model, variables, part, is_still, scaling, rngs)
        if loss.kind == "sft":
            value, losses = objective.supervised(head, *inputs, part, whole)
            return value, (_by_source(part, losses, num_sources), shift)
        value, losses, metrics, shift = objective.preferred(
            head, *inputs, part, whole, shift, functools.partial(of_reference, part), loss, pairs
        )
        return value, (metrics | _by_source(part, losses, num_sources), shift)

    def of_part(trained, part, index, shift):
        (value, (metrics, shift)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(trained, part, index, shift)
        return (metrics | {"loss": value}, gradients), shift

    (sums, gradients), shift = _over_micro_batches(of_part, trained, batch, micro_batches, state.shift)
    metrics = sums | {"weight": whole.weight} | _gradient_metrics(gradients, lora.idle(trained))
    if loss.kind == "mpo":
        metrics["reward_shift"] = shift.mean
        if loss.shift == "moving":
            shift = mpo.moving_shift(shift, (sums["reward_chosen"] + sums["reward_rejected"]) / 2, loss.shift_decay)
    metrics["finite"] = finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    state = state._replace(opt_state=jax.device_put(state.opt_state, jax.memory.Space.Device))  # if it lies with the host
    updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
    metrics = jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), metrics)  # whole, so that every process can read them
    updated = TrainState(state.step + 1, join(optax.apply_updates(trained, updates), frozen), opt_state, shift)
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state), metrics


def outputs(model: InternVL, variables, batch, deterministic: bool = True, scaling=None, rngs=None):
    """(hidden states [B,T,D], the head's matrix [D,V])"""
    hidden = model.apply(variables, batch, deterministic, scaling, rngs=rngs, method=InternVL.hidden)
    return hidden, model.apply(variables, method=InternVL.head_kernel)


def reference_log_probabilities(model: InternVL, head: objective.Head, params, reference, batch, pairs: int, scaling=None):
    """f32[B,K,2] of a batch of pairs: its own if it has them; else of the parameters `reference`, or, where these are None, of `params`
    without adapters."""
    if "reference" in batch:
        return mpo.answer_sums(batch["reference"], batch["answers"], pairs)
    params = lora.without(params) if reference is None else reference
    return head.log_probabilities(*outputs(model, {"params": params}, batch, True, scaling), batch, pairs)


def trained_paths(params: dict, optimizer: Optimizer) -> list[str]:
    """Paths of the trained leaves in the order in which `zero_gradient` counts them."""
    return [path_name(path) for path, _ in jax.tree.leaves_with_path(optimizer.split(params)[0])]


def _over_micro_batches(function, trained, batch, count: int, carried):
    """(sum over `count` parts of the batch in float32, what is carried in the end) of function(trained, part, index, carried)."""
    rows = len(batch["tokens"])
    if rows % count:
        raise ValueError(f"micro_batches is {count}; it must divide the batch's {rows} rows")

    if count == 1:
        sums, carried = function(trained, batch, 0, carried)
        return jax.tree.map(lambda x: x.astype(jnp.float32), sums), carried
    # Every count-th row, so that where rows are sharded each device takes its part of each micro-batch from its own rows.
    parts = jax.tree.map(lambda x: x.reshape(rows // count, count, *x.shape[1:]).swapaxes(0, 1), dict(batch))
    indices = jnp.arange(count)

    def add(carry, inputs):
        total, carried = carry
        sums, carried = function(trained, *inputs, carried)
        return (jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, sums), carried), None

    shapes, _ = jax.eval_shape(function, trained, *jax.tree.map(lambda x: x[0], (parts, indices)), carried)
    total = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    return jax.lax.scan(add, (total, carried), (parts, indices))[0]


def _by_source(batch, losses, count: int) -> dict:
    """Sums of weighted losses and of weights of each source, f32[count] each; nothing if count is 0."""
    if not count:
        return {}
    # Compared with a counter in place of a scatter: rows that are sharded stay where they are.
    member = batch["sources"][..., None] == jnp.arange(count)[None, None]
    values = {"source_loss": losses * batch["loss_weights"], "source_weight": batch["loss_weights"]}
    return {name: jnp.where(member, value[..., None], 0.0).sum((0, 1)) for name, value in values.items()}


def _gradient_metrics(gradients, idle: list) -> dict:
    """idle: of each leaf, whether its gradient is zero as it must be."""
    squares = jax.tree.map(lambda x: jnp.square(x).sum(), gradients)
    leaves = jnp.stack(jax.tree.leaves(squares))
    metrics = {f"grad_norm_{name}": jnp.sqrt(sum(jax.tree.leaves(part))) for name, part in squares.items()}
    metrics["grad_norm"] = jnp.sqrt(leaves.sum())
    wrong = (leaves == 0) & ~jnp.stack(jax.tree.map(jnp.asarray, idle))
    metrics["zero_gradient"] = jnp.where(wrong.any(), jnp.argmax(wrong), -1).astype(jnp.int32)
    return metrics
