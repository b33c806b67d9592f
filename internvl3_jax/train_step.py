"""One update: loss, gradients, AdamW. Pure; the caller jits it and donates the state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from internvl3_jax.losses import cross_entropy
from internvl3_jax.model import InternVL


class TrainState(NamedTuple):
    step: jax.Array  # i32[], updates done
    params: dict
    opt_state: Any


def init_state(model: InternVL, optimizer: optax.GradientTransformation, batch, seed: int) -> TrainState:
    params = model.init(jax.random.key(seed), batch)["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def train_step(model: InternVL, optimizer: optax.GradientTransformation, state: TrainState, batch, key):
    """(new state, metrics). `key` seeds drop path and is folded with the step. Metrics: loss, grad_norm, f32[] each."""
    drop_path_key = jax.random.fold_in(key, state.step)

    def loss_fn(params):
        rngs = {"drop_path": drop_path_key}
        hidden = model.apply({"params": params}, batch, deterministic=False, rngs=rngs, method=InternVL.hidden)
        logits = model.apply({"params": params}, hidden, method=InternVL.logits)
        total, weight = cross_entropy(logits, batch["targets"], batch["loss_weights"])
        return total / weight

    loss, gradients = jax.value_and_grad(loss_fn)(state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), {"loss": loss, "grad_norm": optax.tree.norm(gradients)}
