"""Reads the log of a training run."""

import json

from tests.support.tiny_checkpoint import train_config

STEPS, SAVE_EVERY = train_config().steps, train_config().checkpoint.every


def log_of(workdir):
    rows = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"], row["batch"]) for row in rows]
