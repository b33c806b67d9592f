r"""Gives a model an untrained router and second projector, as InternVL3.5-Flash has them.

    python -m internvl3_jax.training.add_router --checkpoint checkpoints/internvl3_5-8b \
        --output checkpoints/internvl3_5-8b-vico-start

The new checkpoint is where training with loss.kind "vico" starts. With --flash off it answers as
the given one.
"""

import dataclasses
import functools
import os
import pathlib

import jax
import jax.numpy as jnp
from absl import flags, logging

from internvl3_jax.checkpoints import checkpoint
from internvl3_jax.config import ModelConfig
from internvl3_jax.io import command_line
from internvl3_jax.model.flash import Flash


def new_parts(config: ModelConfig, seed: int, dtype) -> dict:
    """Returns the subtree "flash" of a model, initialized randomly."""
    grid, width = config.vision.grid, config.vision.hidden_size
    tokens = jax.ShapeDtypeStruct((1, 1 + grid**2, width), jnp.float32)
    init = functools.partial(Flash(config, jnp.float32).init, grid=(grid, grid))

    def made(key):
        params = init(key, jnp.zeros(tokens.shape, tokens.dtype))["params"]
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    return jax.jit(made)(jax.random.key(seed))


def main(argv) -> None:
    logging.set_verbosity(logging.WARNING)  # jax and orbax log every step of every load
    if len(argv) > 1:
        raise command_line.UsageError(f"what is {argv[1]!r}? Give --checkpoint and --output")
    options = flags.FLAGS
    source = checkpoint.load(options.checkpoint)
    checkpoint.check_not_quantized(source, "a model to train")
    if source.config.flash:
        raise ValueError(f"{options.checkpoint} has a router already; train it as it is")
    config = dataclasses.replace(
        source.config, flash=True, flash_relative=options.relative, flash_absolute=options.absolute
    )
    dtype = jax.tree.leaves(source.params)[0].dtype
    params = source.params | {"flash": new_parts(config, options.seed, dtype)}
    output = pathlib.Path(os.path.expanduser(options.output))
    files = source.tokenizer.files()
    checkpoint.save_checkpoint(
        output, params, config, source.processor, files, overwrite=options.overwrite
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(params["flash"]))
    print(f"{output}: {count:,} new parameters in flash/")


def define_flags() -> None:
    """Defines the flags; not when the module is imported, as other programs have some of them."""
    flags.DEFINE_string("checkpoint", None, "Model without a router.", required=True)
    flags.DEFINE_string("output", None, "Directory of the new checkpoint.", required=True)
    text = "Tiles up to this quantile of a request's probabilities are not compressed."
    flags.DEFINE_float("relative", 0.0, text, 0.0, 1.0)
    text = "Lowest probability of a tile that is compressed."
    flags.DEFINE_float("absolute", 0.5, text, 0.0, 1.0)
    flags.DEFINE_bool("overwrite", False, "Replace a checkpoint of this package.")
    flags.DEFINE_integer("seed", 0, "Seed of the new parameters.", 0, 2**32 - 1)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
