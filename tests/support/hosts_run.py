"""Configurations of runs on several processes, imported by those processes."""

import dataclasses

from internvl3_jax.config import EvalConfig, LossConfig
from tests.support.tiny_checkpoint import changed, train_config

STEPS, SAVE_EVERY = 12, 3


def hosts_config():
    """Trains on eight rows from four streams: any of 1, 2 and 4 processes gets the same batches."""
    config = train_config()
    data = dataclasses.replace(config.data, rows=8, shards=4, tokens_per_row=128, tiles_per_row=8)
    optimizer = dataclasses.replace(config.optimizer, name="adamw", learning_rate=1e-3)
    return changed(
        config,
        data=data,
        optimizer=optimizer,
        steps=STEPS,
        checkpoint__every=SAVE_EVERY,
        host_check_every=2,
    )


def pairs_config(source: str, init_from: str):
    """Trains MPO on pairs, and evaluates on the same pairs."""
    config = hosts_config()
    data = dataclasses.replace(
        config.data,
        source=source,
        pairs=True,
        pairs_per_row=3,
        loss_reduction="sample",
        packing_buffer=2,
    )
    # "running" counts micro-batches, whose number depends on how they are divided.
    loss = LossConfig(kind="mpo", reward_shift="moving")
    optimizer = dataclasses.replace(config.optimizer, warmup_steps=0)
    return dataclasses.replace(
        config,
        data=data,
        optimizer=optimizer,
        loss=loss,
        init_from=init_from,
        steps=3,
        eval=EvalConfig(source, every=3, batches=1),
    )
