"""Scores a model on the questions of a meta JSON, by task and V2PE step, with greedy answers.

Reading, tiling, prompts and generation are those of training and inference. Every row has a key
"task"; the last turn of its conversation is the expected answer.
"""

import pathlib
import sys
from collections.abc import Sequence

import jax
import numpy as np

from internvl3_jax.checkpoints.checkpoint import Checkpoint
from internvl3_jax.config import UNITS, DataConfig
from internvl3_jax.data.batch import Prompt, make_prompt

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the clone

from internvl3_jax.data.example import ExampleBuilder
from internvl3_jax.data.sources.catalog import open_sources
from internvl3_jax.evaluate.scorers.boxes import text_or_box
from internvl3_jax.inference.generation_config import GenerationConfig
from internvl3_jax.inference.generator import Generator
from internvl3_jax.inference.sampling import Sampling
from internvl3_jax.positions import parse_delta

LONGEST = 64  # tokens of an answer
BATCHES = (50, 25, 10, 5, 1)  # prompts per batch; the largest that has at most TOKENS
TOKENS = 8192
UNSCORED = "continue"  # a novel has no correct answer; its loss is in the log of the training


def score(
    checkpoint: Checkpoint, meta: str, deltas: Sequence[str], most: int | None = None
) -> dict[str, dict[str, dict]]:
    """Scores every task of every source.

    Args:
      deltas: V2PE steps to ask each question with.
      most: questions of each task of a source; None is all.

    Returns:
      delta -> "SOURCE/TASK" -> {"right": fraction of correct answers, "questions": number,
      "position": median of the prompts' last positions}.
    """
    stop_ids = [checkpoint.tokenizer.token_id(token) for token in checkpoint.processor.stop_tokens]
    generator = Generator(checkpoint.config, jax.device_get(checkpoint.params), stop_ids=stop_ids)
    data = DataConfig(source=meta)
    builder = ExampleBuilder(data, checkpoint.processor, checkpoint.tokenizer)
    scores: dict[str, dict[str, dict]] = {delta: {} for delta in deltas}
    for source in open_sources(data):
        for task, rows in rows_by_task(source, most).items():
            questions = [read(builder, source, row) for row in rows]
            expected = [messages[-1]["content"] for messages, _ in questions]
            for delta in deltas:
                units = parse_delta(delta)
                prompts = [build_prompt(checkpoint, *question, units) for question in questions]
                answers = answer(checkpoint, generator, prompts)
                right = [is_right(*pair) for pair in zip(expected, answers, strict=True)]
                positions = [prompt.positions[-1] / UNITS for prompt in prompts]
                scores[delta][f"{source.name}/{task}"] = {
                    "right": float(np.mean(right)),
                    "questions": len(rows),
                    "position": float(np.median(positions)),
                }
    return scores


def rows_by_task(source, most: int | None = None) -> dict[str, list[int]]:
    """Returns task -> numbers of the first `most` rows of a source that have it."""
    rows: dict[str, list[int]] = {}
    for row in range(len(source)):
        task = source.rows[row][0].get("task", "")
        if task != UNSCORED:
            rows.setdefault(task, []).append(row)
    return {task: numbers[:most] for task, numbers in rows.items()}


def read(builder: ExampleBuilder, source, row: int) -> tuple[list[dict], list[np.ndarray]]:
    """Returns (messages, tiles u8[n,S,S,3] of each image) of a row."""
    conversation = builder.read(source, row, np.random.default_rng(0))
    tiles = [builder.cut(image, conversation) for image in conversation.images]
    return conversation.messages, tiles


def build_prompt(
    checkpoint: Checkpoint, messages: list[dict], tiles: list[np.ndarray], delta: int
) -> Prompt:
    """Returns the conversation up to its last answer. delta: V2PE step of all images, in 1/256."""
    return make_prompt(
        messages[:-1], tiles, checkpoint.tokenizer, checkpoint.processor, [delta] * len(tiles)
    )


def answer(checkpoint: Checkpoint, generator: Generator, prompts: Sequence[Prompt]) -> list[str]:
    """Returns the greedy answers, generated in batches."""
    longest = max(len(prompt.tokens) for prompt in prompts)
    size = next((size for size in BATCHES if size * longest <= TOKENS), 1)
    answers = []
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        # V2PE switches dynamic NTK off
        run = GenerationConfig(LONGEST, Sampling(), (0,) * len(batch), "none")
        answers += [
            checkpoint.tokenizer.decode(ids).strip() for ids in generator.generate(batch, run)
        ]
    return answers


def is_right(expected: str, answered: str) -> bool:
    """Compares as internvl3_jax.evaluate does: texts or, if a box is expected, names and boxes (IoU
    >= 0.5, as in RefCOCO).
    """
    return text_or_box(answered, expected)
