"""Tiny random transformers models with the same weights as ours, and inputs for both."""

import functools

import jax
import numpy as np
import torch

from internvl3_jax.checkpoints.hf.assemble import params_from_tensors
from internvl3_jax.checkpoints.hf.config import from_hf
from internvl3_jax.checkpoints.storage import by_path
from internvl3_jax.config import UNITS
from internvl3_jax.data.batch import Prompt
from internvl3_jax.inference.generation_config import GenerationConfig
from internvl3_jax.inference.sampling import Sampling
from internvl3_jax.model.internvl import InternVL
from internvl3_jax.positions import build_positions
from tests.support.expert_names import in_files
from tests.support.torch_reference import build_reference

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@functools.cache
def pair(vit="300m", llm="qwen2", tied=False):
    """Returns (torch model, ModelConfig, params) with the same weights."""
    reference, hf = build_reference(vit, llm, tied)
    config = from_hf(hf)
    params = params_from_tensors(
        config, {name: tensor.numpy() for name, tensor in in_files(reference.state_dict()).items()}
    )
    return reference, config, params


def conversation(config, tiles_per_image, rng, lead=3, text=5):
    """Returns (tokens, image spans) of text, then images with text between them."""
    tokens, runs = list(rng.integers(0, config.image_token_id, lead)), []
    for tiles in tiles_per_image:
        runs.append((len(tokens), tiles * config.tokens_per_tile))
        tokens += [config.image_token_id] * runs[-1][1] + list(
            rng.integers(0, config.image_token_id, text)
        )
    return np.asarray(tokens, np.int32), runs


def make_row(config, tiles_per_image, seed, **shape):
    """Returns (batch of one row, normalized pixels for torch f32[N,3,S,S])."""
    rng = np.random.default_rng(seed)
    tokens, _ = conversation(config, tiles_per_image, rng, **shape)
    size = config.vision.image_size
    tiles = rng.integers(0, 256, (1, sum(tiles_per_image), size, size, 3), dtype=np.uint8)
    positions = np.arange(len(tokens), dtype=np.int32)[None] * UNITS
    batch = {
        "tokens": tokens[None],
        "positions": positions,
        "segments": np.ones_like(positions),
        "tiles": tiles,
    }
    return batch, pixels(tiles[0], config)


def pixels(tiles, config):
    scaled = (tiles.astype(np.float32) / 255 - np.float32(config.vision.mean)) / np.float32(
        config.vision.std
    )
    return torch.from_numpy(scaled).permute(0, 3, 1, 2)


def torch_logits(reference, tokens, values, **more):
    with torch.no_grad():
        ids = torch.from_numpy(np.asarray(tokens, np.int64))
        return reference(
            input_ids=ids, pixel_values=values if len(values) else None, **more
        ).logits.numpy()


def loss_gradients(forward, batch, weights):
    """Runs a backward pass in torch through sum(logits * weights) / tokens."""
    loss = (forward() * torch.from_numpy(weights)).sum() / batch["tokens"].size
    loss.backward()


def assert_gradients(config, params, batch, weights, expected):
    """Compares the gradient of the same sum with `expected`, a parameter tree from torch."""

    def loss(params):
        logits = InternVL(config).apply({"params": params}, batch)
        return (logits[..., : config.language.vocab_size] * weights).sum() / batch["tokens"].size

    found = by_path(jax.jit(jax.grad(loss))(params))
    expected = by_path(expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.abs(value).max() > 0, name
        np.testing.assert_allclose(found[name], value, err_msg=name, **TOLERANCE)


def greedy(limit, rows, config):
    return GenerationConfig(limit, Sampling(), (0,) * rows, config.language.rope_scaling)


def as_prompt(config, batch, tiles_per_image, deltas=None):
    tokens = batch["tokens"][0]
    starts = [
        i
        for i, t in enumerate(tokens)
        if t == config.image_token_id and (i == 0 or tokens[i - 1] != config.image_token_id)
    ]
    runs = [
        (start, tiles * config.tokens_per_tile)
        for start, tiles in zip(starts, tiles_per_image, strict=True)
    ]
    cuts = np.cumsum(tiles_per_image)[:-1] if tiles_per_image else []
    tiles = np.split(batch["tiles"][0], cuts) if tiles_per_image else []
    deltas = [UNITS] * len(runs) if deltas is None else deltas
    return Prompt(tokens, build_positions(len(tokens), runs, deltas), runs, tiles)
