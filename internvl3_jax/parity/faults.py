"""Computes what known faults would give: each is one change of a copy of this engine.

A fault is a function (engine, root, request, prompt) -> stages, or None where it changes nothing.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from internvl3_jax.config import UNITS, ProcessorConfig
from internvl3_jax.data.batch import Prompt, cut_images, make_prompt
from internvl3_jax.data.media.images import open_image
from internvl3_jax.data.media.tiles import candidate_grids, cut_tiles
from internvl3_jax.data.text.chat_template import IMAGE_TAG, insert_missing_tags
from internvl3_jax.data.text.media_tags import frame_lines
from internvl3_jax.parity.compare import FLOATS, STAGES, compare
from internvl3_jax.parity.folder import Request
from internvl3_jax.parity.jax_engine import JaxEngine
from internvl3_jax.parity.stages_run import Weights, model_stages, prompt_stages
from internvl3_jax.positions import build_positions, parse_delta

Stages = dict[str, np.ndarray | str]
Fault = Callable[[JaxEngine, pathlib.Path, Request, Prompt], Stages | None]
_QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_MODEL_CASE = "image"  # where the faults inside of the model are looked for


def build_prompt(
    engine: JaxEngine,
    root: pathlib.Path,
    request: Request,
    processor: ProcessorConfig | None = None,
    cut: Callable[[Sequence[Image.Image], ProcessorConfig, int | None], list] = cut_images,
    has_labels: bool = True,
) -> Prompt:
    """Makes the prompt of a request of its parts, any of which can be another one."""
    processor = processor or engine.checkpoint.processor
    paths = request.images + request.frames
    images = [open_image((root / path).read_bytes()) for path in paths]
    question = request.question
    if request.frames:
        question = frame_lines(len(images), processor.frame_label) + question
    elif not has_labels:
        question = f"{IMAGE_TAG}\n" * len(images) + question
    messages = insert_missing_tags([{"role": "user", "content": question}], len(images))
    tiles = cut(images, processor, 1 if request.frames else None)
    delta = processor.delta if request.delta is None else parse_delta(request.delta)
    deltas = [delta] * len(images)
    return make_prompt(messages, tiles, engine.checkpoint.tokenizer, processor, deltas)


# --- before the model -----------------------------------------------------------------------------


def _processor(**changes) -> Fault:
    def fault(engine, root, request, prompt):
        processor = dataclasses.replace(engine.checkpoint.processor, **changes)
        changed = build_prompt(engine, root, request, processor)
        return prompt_stages(changed, engine.checkpoint.tokenizer)

    return fault


def _tiles(change: Callable[[np.ndarray], np.ndarray]) -> Fault:
    """Returns a fault that changes the tiles of each image."""

    def fault(engine, root, request, prompt):
        def cut(*arguments):
            return [change(tiles) for tiles in cut_images(*arguments)]

        changed = build_prompt(engine, root, request, cut=cut)
        return prompt_stages(changed, engine.checkpoint.tokenizer)

    return fault


def _tie_on_area(engine, root, request, prompt):
    def cut(images, processor, max_tiles):
        return [_cut_on_area(image, processor, max_tiles) for image in images]

    changed = build_prompt(engine, root, request, cut=cut)
    return prompt_stages(changed, engine.checkpoint.tokenizer)


def _cut_on_area(image: Image.Image, processor: ProcessorConfig, max_tiles: int | None):
    """Returns the tiles of the grid with most tiles, among the equally near ones."""
    limit = max_tiles or processor.max_tiles
    aspect = image.width / image.height
    grids = candidate_grids(processor.min_tiles, limit)
    columns, rows = min(grids, key=lambda grid: (abs(aspect - grid[0] / grid[1]), -np.prod(grid)))
    size, side = (columns * processor.image_size, rows * processor.image_size), processor.image_size
    canvas = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    tiles = canvas.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    whole = dataclasses.replace(processor, min_tiles=1, max_tiles=1)
    thumbnail = cut_tiles(image, whole) if processor.use_thumbnail and len(tiles) > 1 else tiles[:0]
    return np.concatenate([tiles, thumbnail])


def _image_label(engine, root, request, prompt):
    changed = build_prompt(engine, root, request, has_labels=False)
    return prompt_stages(changed, engine.checkpoint.tokenizer)


def _ids(change: Callable) -> Fault:
    """Returns a fault that changes the ids; change(ids, tokenizer) returns None for no change."""

    def fault(engine, root, request, prompt):
        tokenizer = engine.checkpoint.tokenizer
        ids = change(prompt.tokens, tokenizer)
        if ids is None:
            return None
        stages = prompt_stages(dataclasses.replace(prompt, tokens=ids), tokenizer)
        return {name: stages[name] for name in ("rendered", "token_ids")}

    return fault


def _without_newlines(ids, tokenizer):
    (newline,) = tokenizer.encode("\n", special=False)
    behind = np.roll(ids == tokenizer.token_id("<|im_end|>"), 1)
    return ids[~(behind & (ids == newline))]


def _without_header(ids, tokenizer):
    return ids[: np.flatnonzero(ids == tokenizer.token_id("<|im_start|>"))[-1]]


def _other_image_id(ids, tokenizer):
    try:
        other = tokenizer.token_id("<think>")
    except ValueError:
        return None  # the default is right where <think> does not exist
    return np.where(ids == tokenizer.token_id("<IMG_CONTEXT>"), other, ids)


def _v2pe_ignored(engine, root, request, prompt):
    positions = build_positions(len(prompt.tokens), prompt.runs, [UNITS] * len(prompt.runs))
    return {"positions": positions.astype(np.int64)}


# --- the model ------------------------------------------------------------------------------------


def _mean_std(engine, root, request, prompt):
    if not prompt.tiles:
        return None
    pixels = np.concatenate(prompt.tiles).astype(np.float32) / 255
    scaling = engine.scaling(request)
    return model_stages(engine.weights, prompt, scaling, (pixels - 0.5) / np.float32(0.5))


def _language(**changes) -> Callable[[JaxEngine], Weights]:
    def change(engine):
        language = dataclasses.replace(engine.weights.config.language, **changes)
        config = dataclasses.replace(engine.weights.config, language=language)
        return dataclasses.replace(engine.weights, config=config)

    return change


def _weights(change: Callable[[JaxEngine], Weights]) -> Fault:
    def fault(engine, root, request, prompt):
        return model_stages(change(engine), prompt, engine.scaling(request))

    return fault


def _no_qk_norm(engine, root, request, prompt):
    if not engine.weights.config.language.qk_norm:
        return None
    weights = _language(qk_norm=False)(engine)
    return model_stages(weights, prompt, engine.scaling(request))


def _image_id_in_model(engine, root, request, prompt):
    if not prompt.tiles:
        return None
    without = dataclasses.replace(prompt, tiles=[])
    return model_stages(engine.weights, without, engine.scaling(request))


def _rope_linear(engine, root, request, prompt):
    factor = engine.weights.config.language.rope_factor
    positions = (prompt.positions / factor).astype(np.int32)
    changed = dataclasses.replace(prompt, positions=positions)
    return model_stages(engine.weights, changed, "none")


def _tied_head(engine, root, request, prompt):
    config = engine.weights.config.language
    if config.tie_embeddings:
        return None
    hidden = model_stages(engine.weights, prompt, engine.scaling(request))["hidden_last"][-1]
    table = np.asarray(engine.weights.params["language"]["embedding"], np.float32)
    return {"logits": table[: config.vocab_size] @ hidden}


FAULTS: dict[str, Fault] = {
    "tie_on_area": _tie_on_area,
    "no_thumbnail": _processor(use_thumbnail=False),
    "thumbnail_first": _tiles(lambda tiles: np.roll(tiles, 1, axis=0)),
    "bgr": _tiles(lambda tiles: tiles[..., ::-1]),
    "no_system": _processor(system_message=None),
    "empty_system": _processor(system_message=""),
    "other_system": _processor(system_message=_QWEN_SYSTEM),
    "no_newline": _ids(_without_newlines),
    "no_generation_prompt": _ids(_without_header),
    "frame_label": _processor(frame_label="Frame{}: "),
    "image_label": _image_label,
    "image_id_in_prompt": _ids(_other_image_id),
    "v2pe_ignored": _v2pe_ignored,
    "mean_std": _mean_std,
    "image_id_in_model": _image_id_in_model,
    "no_qk_norm": _no_qk_norm,
    "rope_theta": _weights(_language(rope_theta=1e4)),
    "rope_linear": _rope_linear,
    "tied_head": _tied_head,
}
_IN_MODEL = tuple(FAULTS)[tuple(FAULTS).index("mean_std") :]


def fault_stages(
    engine: JaxEngine,
    root: pathlib.Path,
    case: str,
    request: Request,
    prompt: Prompt,
    golden: Stages,
    tolerance: float,
) -> dict[str, Stages]:
    """Returns fault -> the stages at which it differs from the goldens.

    Of large stages only the first is kept, and the logits: a cause is named where it shows first.
    """
    found = {}
    for name, fault in FAULTS.items():
        if name in _IN_MODEL and case != _MODEL_CASE:
            continue
        stages = fault(engine, root, request, prompt) or {}
        kept = {}
        for stage in STAGES:
            is_large = stage == "tiles" or stage in FLOATS - {"logits"}
            if stage not in stages or (is_large and any(key in kept for key in FLOATS | {"tiles"})):
                continue
            if stage in golden and compare(stage, stages[stage], golden[stage], tolerance):
                kept[stage] = stages[stage]
        if kept:
            found[name] = kept
    return found
