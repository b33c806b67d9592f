"""One compiled update of the tiny model, and the comparison of two updates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from internvl3_jax.config import OptimizerConfig
from internvl3_jax.model.internvl import InternVL
from internvl3_jax.param_tree import path_name
from internvl3_jax.training.objective import SftLoss
from internvl3_jax.training.optimizer import make_optimizer
from internvl3_jax.training.step import TrainState, train_step, trains_tower
from tests.support.tiny_checkpoint import CONFIG, random_params

MODEL, PARAMS = InternVL(CONFIG), random_params(CONFIG)

SETTINGS = OptimizerConfig(warmup_steps=0, learning_rate=1e-3)
# Adds the gradient to the parameters. AdamW's update depends on the sign of gradients that are
# nearly zero, which rounding changes; this one does not.
GRADIENT = make_optimizer(SETTINGS, 100)._replace(
    init=lambda _: (), update=lambda gradients, state, _: (gradients, state)
)


def by_path(tree):
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def first_state(optimizer, params=PARAMS) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))


def compiled_step(optimizer, state, values, model=MODEL, **settings):
    micro_batches = settings.pop("micro_batches", 1)
    loss_fn = SftLoss(model, drop_path=trains_tower(optimizer, state.params), **settings)
    step = jax.jit(functools.partial(train_step, loss_fn, optimizer, micro_batches=micro_batches))
    return step.lower(state, values, jax.random.key(0)).compile()


def assert_close(found, expected, tolerance=1e-5):
    found, expected = by_path(found), by_path(expected)
    assert set(found) == set(expected)
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, rtol=tolerance, atol=tolerance, err_msg=path)
