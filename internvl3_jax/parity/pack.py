"""Writes a pack: of tiny models of every family, or of one checkpoint."""

import dataclasses
import pathlib
from collections.abc import Callable
from importlib import metadata

import jax
import numpy as np

from internvl3_jax.parity import tiny_models
from internvl3_jax.parity.cases import requests, write_images
from internvl3_jax.parity.compare import TOLERANCES, derived
from internvl3_jax.parity.faults import build_prompt, fault_stages
from internvl3_jax.parity.folder import (
    Case,
    PackedModel,
    PackError,
    Request,
    write_case,
    write_manifest,
)
from internvl3_jax.parity.jax_engine import JaxEngine
from internvl3_jax.parity.tiny_config import FAMILIES

_TOP = 5  # most likely first tokens whose log-probabilities are compared


def write_pack(
    root: pathlib.Path,
    checkpoint: str | None = None,
    dtype: str = "float32",
    seed: int = 0,
    families: tuple[str, ...] = tuple(FAMILIES),
    report: Callable[[PackedModel], None] = lambda model: None,
) -> list[PackedModel]:
    """Writes a pack into a new folder.

    Args:
      root: the folder.
      checkpoint: what to make goldens of, as `internvl3_jax.load` takes it; its weights are not
        copied. None: tiny models.
      dtype: of the computation of a checkpoint; tiny models are computed in float32.
      seed: of the weights and images.
      families: the tiny models.
      report: is called with each model once its files are written.

    Raises:
      FileExistsError: the folder exists and is not empty.
    """
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root} exists; choose a new folder (--output)")
    root.mkdir(parents=True, exist_ok=True)
    models = []
    # A GPU or TPU would multiply float32 in fewer bits.
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        if checkpoint is not None:
            engine = JaxEngine(checkpoint, dtype)
            models.append(_write_model(root, "checkpoint", engine, {}, checkpoint, seed, None, 16))
            report(models[-1])
        else:
            for number, name in enumerate(families):
                written = tiny_models.write(root / name, name, seed + number)
                engine = JaxEngine(written["internvl"], "float32")
                paths = {key: path.relative_to(root).as_posix() for key, path in written.items()}
                delta = "1/4" if name == "v2pe" else None
                models.append(_write_model(root, name, engine, paths, name, seed, delta, 8))
                report(models[-1])
    write_manifest(root, metadata.version("internvl3-jax"), models)
    return models


def _write_model(
    root: pathlib.Path,
    name: str,
    engine: JaxEngine,
    checkpoints: dict[str, str],
    source: str,
    seed: int,
    delta: str | None,
    max_new_tokens: int,
) -> PackedModel:
    """Writes the cases of a model."""
    config, dtype = engine.weights.config, np.dtype(engine.weights.dtype).name
    images = "images"
    if not (root / images).exists():
        write_images(root / images, config.vision.image_size, seed)
    model = PackedModel(
        name,
        checkpoints,
        source,
        dtype,
        list(engine.chat.generator.stop_ids),
        config.image_token_id,
        {"mean": list(config.vision.mean), "std": list(config.vision.std)},
    )
    (root / name).mkdir(exist_ok=True)
    for case, request in requests(images, delta, max_new_tokens).items():
        write_case(root / name, _case(root, case, engine, request, TOLERANCES[dtype]))
        model.cases.append(case)
    return model


def _case(
    root: pathlib.Path, name: str, engine: JaxEngine, request: Request, tolerance: float
) -> Case:
    """Returns a case with its goldens, and what known faults would give."""
    # 1) The prompt, by Chat and of its parts: faults change the parts.
    prompt = engine.prompt(root, request)
    parts = build_prompt(engine, root, request)
    if not np.array_equal(prompt.tokens, parts.tokens) or not np.array_equal(
        prompt.positions, parts.positions
    ):
        raise PackError(f"case {name}: Chat and its parts disagree about the prompt; report this")
    # 2) The stages, and those of the faults.
    stages = engine.stages(root, request, prompt)
    order = np.argsort(-stages["logits"], kind="stable")[:_TOP]
    logprobs = derived(stages, [[id] for id in order])["logprobs"]
    tokenizer = engine.checkpoint.tokenizer
    top = [
        [int(id), tokenizer.decode([int(id)], skip_special=False), float(value)]
        for id, value in zip(order, logprobs, strict=True)
    ]
    faults = fault_stages(engine, root, name, request, prompt, stages, tolerance)
    return Case(name, dataclasses.replace(request), stages, top, faults)
