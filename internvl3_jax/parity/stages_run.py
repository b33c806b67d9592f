"""The stages of a prompt by the model of this package, one jitted call a prompt."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from internvl3_jax.config import ModelConfig
from internvl3_jax.data.batch import Prompt
from internvl3_jax.data.text.tokenizer import Tokenizer
from internvl3_jax.model.internvl import InternVL


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model: its configuration, its parameters in the stacked layout, and the compute dtype."""

    config: ModelConfig
    params: Mapping
    dtype: DTypeLike


def prompt_stages(prompt: Prompt, tokenizer: Tokenizer) -> dict:
    """Returns the stages before the model. Prompt: as of `data.batch.make_prompt`."""
    stages = {
        "rendered": tokenizer.decode(prompt.tokens.tolist(), skip_special=False),
        "token_ids": prompt.tokens.astype(np.int64),
        "positions": prompt.positions.astype(np.int64),
    }
    if prompt.tiles:
        stages["tile_counts"] = np.asarray([len(tiles) for tiles in prompt.tiles], np.int64)
        stages["tiles"] = np.concatenate(prompt.tiles)
    return stages


def model_stages(
    weights: Weights, prompt: Prompt, scaling: str, tiles: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Returns the stages from the tower to the logits, f32.

    Args:
      prompt: its tokens, positions and tiles.
      scaling: of the rope.
      tiles: normalized pixels f32[N,S,S,3] in place of the prompt's tiles.
    """
    length, size = len(prompt.tokens), weights.config.vision.image_size
    # Few shapes compile: tokens in multiples of 256, tiles in powers of two.
    rows = -(-length // 256) * 256
    batch = {
        "tokens": _padded(prompt.tokens, rows),
        "positions": _padded(prompt.positions, rows),
        "segments": _padded(np.ones(length, np.int32), rows),
    }
    if tiles is None:
        tiles = np.concatenate([np.zeros((0, size, size, 3), np.uint8), *prompt.tiles])
    batch["tiles"] = _padded(tiles, max(4, 1 << (len(tiles) - 1).bit_length()) if len(tiles) else 0)
    run = _compiled(weights.config, jnp.dtype(weights.dtype), scaling)
    found = jax.device_get(run(weights.params, {k: v[None] for k, v in batch.items()}, length - 1))
    stages = {name: np.asarray(value, np.float32) for name, value in found.items()}
    for name in ("embeddings", "hidden_first", "hidden_last"):
        stages[name] = stages[name][:length]
    for name in ("tower", "projector"):
        if name in stages:
            stages[name] = stages[name][: len(tiles)]
    return stages


def _padded(array: np.ndarray, length: int) -> np.ndarray:
    rest = [(0, length - len(array))] + [(0, 0)] * (array.ndim - 1)
    return np.pad(array, rest)


@functools.lru_cache(maxsize=16)
def _compiled(config: ModelConfig, dtype: np.dtype, scaling: str):
    model = InternVL(config, dtype)

    @jax.jit
    def run(params: Mapping, batch: Mapping, last: int) -> dict:
        variables = {"params": params}
        hidden, state = model.apply(
            variables, batch, scaling=scaling, method=InternVL.hidden, mutable=["intermediates"]
        )
        sown = state["intermediates"]
        logits = model.apply(variables, hidden[:, last][:, None], method=InternVL.logits)
        stages = {
            "embeddings": sown["merged"][0][0],
            "hidden_first": sown["language"]["layers"]["block"][0][0, 0],
            "hidden_last": hidden[0],
            "logits": logits[0, 0, : config.language.vocab_size],
        }
        tiles = batch["tiles"][0]
        if len(tiles):
            tower = model.apply(
                variables, tiles, method=lambda model, tiles: model.vision(tiles, True)
            )
            # The projector leaves out the class token, and what may pad the patches.
            stages["tower"] = tower[:, 1 : 1 + config.vision.grid**2]
            stages["projector"] = model.apply(variables, tiles, method=InternVL.encode)
        return stages

    return run
