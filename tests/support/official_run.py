"""A short training run on data in InternVL's format: text and images, workers, augmentation,
micro-batches.
"""

import dataclasses

from internvl3_jax.config import EvalConfig
from tests.support.official_data import make_image, turns, write_meta
from tests.support.tiny_checkpoint import changed, train_config


def write_official(folder) -> str:
    """Writes a meta JSON of a text source and of one whose images are augmented (recompressed)."""
    for number in range(3):
        make_image(20 + 8 * number, 20, number).save(folder / f"{number}.png")
    text = [{"id": n, "conversations": turns(f"Say {n}.", f"It is {n}.")} for n in range(8)]
    seen = [
        {"id": n, "image": f"{n % 3}.png", "conversations": turns("What is it?", f"Noise {n}.")}
        for n in range(8)
    ]
    return write_meta(folder, text={"rows": text}, seen={"rows": seen, "data_augment": True})


def official_config(meta: str, **optimizer):
    """Returns a configuration that trains and evaluates on the data of `meta`."""
    config = train_config()
    return changed(
        config,
        steps=6,
        checkpoint__every=3,
        data=dataclasses.replace(config.data, source=meta, text_fraction=0.25, workers=2),
        optimizer=dataclasses.replace(config.optimizer, name="adamw", **optimizer),
        eval=EvalConfig(source=meta, every=3, batches=2, answers=2),
        micro_batches=2,
        remat_vision="full",
        remat_language="dots",
    )
