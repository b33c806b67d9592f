"""Pairs of answers as a data set in files, and a training configuration for them."""

import dataclasses

from internvl3_jax.config import LossConfig
from tests.support.official_data import make_image, write_meta
from tests.support.tiny_checkpoint import train_config

LOSS = LossConfig(kind="mpo")
PAIRS = 3


def write_pairs(folder) -> str:
    for number in range(3):
        make_image(20 + 8 * number, 20, number).save(folder / f"{number}.png")
    seen = [
        {
            "image": f"{n % 3}.png",
            "question": f"What is {n}?",
            "chosen": f"It is {n}.",
            "rejected": f"No idea, maybe {n + 1}",
        }
        for n in range(6)
    ]
    text = [{"question": f"Say {n}.", "chosen": f"{n}", "rejected": f"{n + 1}?"} for n in range(4)]
    two = [
        {
            "image": ["0.png", "1.png"],
            "question": "<image><image>Same?",
            "chosen": "no",
            "rejected": "yes yes",
        }
    ]
    return write_meta(folder, seen={"rows": seen}, text={"rows": text}, two={"rows": two})


def pairs_config(folder, **data):
    config = train_config()
    settings = {
        "source": write_pairs(folder),
        "pairs": True,
        "pairs_per_row": PAIRS,
        "loss_reduction": "sample",
    } | data
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **settings))
