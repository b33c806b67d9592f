"""Asks a model the questions of a meta JSON: the same reading, cutting, prompts and generation as
in training and in use.

Used by run.py. Every row has a key "task"; the last turn of its conversation is the expected
answer. Greedy.
"""

import pathlib
import re
import sys
from collections.abc import Sequence

import jax
import numpy as np

from internvl3_jax.checkpoints.checkpoint import Checkpoint
from internvl3_jax.config import UNITS, DataConfig
from internvl3_jax.data.batch import Prompt, make_prompt

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the clone

from examples.tiny_digits.recipe.data import iou
from internvl3_jax.data.example import ExampleBuilder
from internvl3_jax.data.sources.catalog import open_sources
from internvl3_jax.inference.generator import GenerationConfig, Generator
from internvl3_jax.inference.sampling import Sampling
from internvl3_jax.positions import parse_delta

LONGEST = 64  # tokens of an answer
BATCHES = (50, 25, 10, 5, 1)  # prompts at a time; the largest that keeps within TOKENS
TOKENS = 8192
UNASKED = "continue"  # a novel has no right answer; its loss is in the training's log


def score(
    checkpoint: Checkpoint, meta: str, deltas: Sequence[str], most: int | None = None
) -> dict[str, dict[str, dict]]:
    """Delta -> "SOURCE/TASK" -> {"right": share, "questions": number, "position": median of the
    prompts' last positions}.

    most: questions of each task of a source that are asked; None: all.
    """
    generator = Generator(
        checkpoint.config,
        jax.device_get(checkpoint.params),
        stop_ids=[
            checkpoint.tokenizer.token_id(token) for token in checkpoint.processor.stop_tokens
        ],
    )
    data = DataConfig(source=meta)
    preparer = ExampleBuilder(data, checkpoint.processor, checkpoint.tokenizer)
    scores: dict[str, dict[str, dict]] = {delta: {} for delta in deltas}
    for source in open_sources(data):
        for task, rows in rows_by_task(source, most).items():
            questions = [read(preparer, source, row) for row in rows]
            for delta in deltas:
                prompts = [
                    prompt(checkpoint, *question, parse_delta(delta)) for question in questions
                ]
                answers = answer(checkpoint, generator, prompts)
                expected = [messages[-1]["content"] for messages, _ in questions]
                scores[delta][f"{source.name}/{task}"] = {
                    "right": float(
                        np.mean([is_right(*pair) for pair in zip(expected, answers, strict=True)])
                    ),
                    "questions": len(rows),
                    "position": float(np.median([one.positions[-1] / UNITS for one in prompts])),
                }
    return scores


def rows_by_task(source, most: int | None = None) -> dict[str, list[int]]:
    """Task -> numbers of the first `most` rows of a source that have it."""
    found: dict[str, list[int]] = {}
    for row in range(len(source)):
        task = source.rows[row][0].get("task", "")
        if task != UNASKED:
            found.setdefault(task, []).append(row)
    return {task: rows[:most] for task, rows in found.items()}


def read(preparer: ExampleBuilder, source, row: int) -> tuple[list[dict], list[np.ndarray]]:
    """(messages, tiles u8[n,S,S,3] of each picture) of a row."""
    conversation = preparer.read(source, row, np.random.default_rng(0))
    return conversation.messages, [
        preparer.cut(picture, conversation) for picture in conversation.images
    ]


def prompt(
    checkpoint: Checkpoint, messages: list[dict], tiles: list[np.ndarray], delta: int
) -> Prompt:
    """The conversation up to its last answer, with every picture at one V2PE step in units of
    1/256.
    """
    return make_prompt(
        messages[:-1], tiles, checkpoint.tokenizer, checkpoint.processor, [delta] * len(tiles)
    )


def answer(checkpoint: Checkpoint, generator: Generator, prompts: Sequence[Prompt]) -> list[str]:
    longest = max(len(one.tokens) for one in prompts)
    size = next((size for size in BATCHES if size * longest <= TOKENS), 1)
    answers = []
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        # V2PE switches dynamic NTK off
        run = GenerationConfig(LONGEST, Sampling(), (0,) * len(part), "none")
        answers += [
            checkpoint.tokenizer.decode(ids).strip() for ids in generator.generate(part, run)
        ]
    return answers


def is_right(expected: str, answered: str) -> bool:
    """Equal; with a box, the same thing and a box that covers its own well enough (IoU >= 0.5, as
    RefCOCO scores).
    """
    wanted, found = _box(expected), _box(answered)
    if wanted is None:
        return expected == answered
    return found is not None and wanted[0] == found[0] and iou(wanted[1], found[1]) >= 0.5


def _box(text: str) -> tuple[str, tuple[int, ...]] | None:
    """(name, box) of a text that ends with one."""
    match = re.search(r"<ref>([^<]*)</ref><box>\[\[(\d+), (\d+), (\d+), (\d+)\]\]</box>$", text)
    return (match[1], tuple(map(int, match.groups()[1:]))) if match else None
