"""Configurations of runs on several processes, imported by those processes."""

import dataclasses

from internvl3_jax.config import LossConfig
from tests.support.tiny_checkpoint import train_config

STEPS, SAVE_EVERY = 12, 3


def hosts_config():
    """Eight rows from four streams, so that one, two or four processes see the same global batches."""
    config = train_config()
    data = dataclasses.replace(config.data, rows=8, shards=4, tokens_per_row=128, tiles_per_row=8)
    optimizer = dataclasses.replace(config.optimizer, name="adamw", learning_rate=1e-3)
    return dataclasses.replace(
        config, data=data, optimizer=optimizer, steps=STEPS, save_every=SAVE_EVERY, agree_every=2
    )


def pairs_config(source: str, init_from: str):
    """MPO on pairs, with held-out ones."""
    config = hosts_config()
    data = dataclasses.replace(
        config.data,
        source=source,
        pairs=True,
        pairs_per_row=3,
        loss_average="sample",
        packing_buffer=2,
    )
    loss = LossConfig(
        kind="mpo", shift="moving"
    )  # the running one counts the parts of an update, so it knows how many there are
    held_out = {"held_out": source, "evaluate_every": 3, "evaluate_batches": 1}
    optimizer = dataclasses.replace(config.optimizer, warmup_steps=0)
    return dataclasses.replace(
        config, data=data, optimizer=optimizer, loss=loss, init_from=init_from, steps=3, **held_out
    )
