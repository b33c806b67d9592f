"""Adapters of the tiny model, a train step with them, and a short LoRA run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import train
from internvl3_jax.config import CheckpointConfig, LoraConfig, MeshConfig, OptimizerConfig
from internvl3_jax.model import lora
from internvl3_jax.model.internvl import InternVL
from internvl3_jax.parallel import sharding
from internvl3_jax.training.optimizer import make_optimizer
from internvl3_jax.training.step import TrainState
from tests.support.batches import batch
from tests.support.meshes import STYLES, widened
from tests.support.tiny_checkpoint import CONFIG, changed, random_params, train_config
from tests.support.train_step import compiled_step

EVERYWHERE = (
    "vision/layers/(qkv|proj|fc1|fc2)",
    "projector/fc[12]",
    "language/layers/(q|k|v|o|gate|up|down)",
)
SETTINGS = LoraConfig(rank=3, alpha=6.0, targets=EVERYWHERE)
ONE_DEVICE = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
LORA = LoraConfig(
    rank=2,
    alpha=8.0,
    dropout=0.1,
    targets=("language/layers/(q|v|down)", "vision/layers/(qkv|fc2)"),
    full=("projector/.*",),
)


def drawn(params, settings=SETTINGS, seed=0):
    """Returns adapters whose b is random too, where new ones have zeros."""
    rng = np.random.default_rng(seed)
    new = lora.init(params, settings, jax.random.key(seed))
    return jax.tree.map(
        lambda leaf: np.asarray(leaf) + 0.1 * rng.standard_normal(leaf.shape, np.float32), new
    )


@functools.cache
def adapted(style="300m", settings=SETTINGS, seed=0):
    params = random_params(STYLES[style])
    return params | {lora.SUBTREE: drawn(params, settings, seed)}


@functools.partial(jax.jit, static_argnums=0)
def logits(config, variables, values):
    return InternVL(config).apply(variables, values)


def step_of(settings, optimizer=None, params=None, mesh=None, **options):
    """Returns (first state, updated state, metrics, optimizer) of one update; AdamW by default."""
    learning = OptimizerConfig(warmup_steps=0, learning_rate=1e-3)
    config = lora.freeze_base(
        dataclasses.replace(train_config(), optimizer=learning, lora=settings)
    )
    made = make_optimizer(config.optimizer, 10)
    optimizer = optimizer._replace(split=made.split) if optimizer else made
    params = params or adapted(settings=settings)
    values = widened(batch(8)) if mesh else batch(4)
    if mesh:
        values = sharding.global_batch(mesh, 8, values, list(range(8)))
        params = jax.device_put(params, sharding.param_shardings(params, mesh))
    with jax.set_mesh(mesh) if mesh else jax.default_device(None):
        state = TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))
        step = compiled_step(
            optimizer, state, values, InternVL(CONFIG), num_sources=3, adapters=settings, **options
        )
        updated, metrics = step(state, values, jax.random.key(0))
    return state, updated, metrics, optimizer


def config_of(base, **changes):
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=2)
    checkpoint = CheckpointConfig(every=3, keep=5)
    config = dataclasses.replace(
        train_config(), optimizer=optimizer, steps=6, checkpoint=checkpoint, lora=LORA
    )
    return changed(config, init_from=str(base), **changes)


def start(config, workdir):
    config = lora.freeze_base(config)
    train.save_config(config, workdir)
    return train.fit(config, workdir, ONE_DEVICE)
