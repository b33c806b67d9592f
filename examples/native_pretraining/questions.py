"""Scenes and questions of the experiment, with and without images."""

import pathlib
import sys

import numpy as np
from scenes import PROMPTS, Scene, make_number, make_things, make_turn
from writer import Writer, make_row

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the clone

from examples.tiny_digits.recipe import data as digits

WORDS = 15  # of a passage to read, and of its continuation
TEST_CHAPTER = 10  # every tenth chapter is for testing


# --- scenes --------------------------------------------------------------------------------------


def number_scenes(writer: Writer, source: str, count: int, split: str) -> list[tuple[str, Scene]]:
    """Images of numbers, half of them of one digit and the rest of up to three: (path, scene)."""
    rng = writer.rng(source)
    scenes = [make_number(rng, split, 1 if rng.random() < 0.5 else 3) for _ in range(count)]
    return [(writer.save(source, index, scene), scene) for index, scene in enumerate(scenes)]


def thing_scenes(
    writer: Writer, source: str, count: int, drawings: dict, vary: bool
) -> list[tuple[str, Scene]]:
    """Images of things, half of them of one and the rest of up to three: (path, scene)."""
    rng = writer.rng(source)
    scenes = [
        make_things(rng, drawings, 1 if rng.random() < 0.5 else int(rng.integers(2, 4)), vary)
        for _ in range(count)
    ]
    return [(writer.save(source, index, scene), scene) for index, scene in enumerate(scenes)]


# --- questions about images ----------------------------------------------------------------------


def digit_turns(rng: np.random.Generator, scene: Scene) -> list[tuple[str, str]]:
    tasks = ["read", "count digits"]
    rng.shuffle(tasks)
    return [make_turn(task, scene) for task in tasks]


def thing_turns(rng: np.random.Generator, scene: Scene) -> list[tuple[str, str]]:
    """Returns two of these questions: what, how many, where."""
    tasks = rng.permutation(["what", "count", "where"])[:2]
    return [make_turn(str(task), scene, int(rng.integers(len(scene.names)))) for task in tasks]


def find_digit(rng: np.random.Generator, numbers: list, others: list, count: int) -> dict:
    """Returns a search for the one image of a digit among `count` images."""
    chosen = [others[int(rng.integers(len(others)))] for _ in range(count)]
    place = int(rng.integers(count))
    chosen[place] = numbers[int(rng.integers(len(numbers)))]
    return make_row([make_turn("read", chosen[place][1])], [path for path, _ in chosen], "find")


# --- text ----------------------------------------------------------------------------------------


def words_row(rng: np.random.Generator, names: list[str]) -> dict:
    """Returns a question without an image: how many words there are, or which of two numbers is
    larger.
    """
    if rng.random() < 0.5:
        question = digits.compare_in_words(rng)
        return make_row([(question.messages[0]["content"], question.answer)], [], "words")
    chosen = [str(name) for name in rng.choice(names, int(rng.integers(1, 4)), replace=False)]
    turn = (f"{', '.join(chosen)}. {PROMPTS['count']}", str(len(chosen)))
    return make_row([turn], [], "words")


def cut_passages(chapters: list[str]) -> dict[str, list[tuple[str, str]]]:
    """Returns {"train": ..., "test": ...} of (passage, its continuation), of WORDS words each."""
    passages = {"train": [], "test": []}
    for chapter, text in enumerate(chapters):
        words = text.split()
        split = "test" if chapter % TEST_CHAPTER == TEST_CHAPTER - 1 else "train"
        for start in range(0, len(words) - 2 * WORDS + 1, 2 * WORDS):
            passage = " ".join(words[start : start + WORDS])
            continuation = " ".join(words[start + WORDS : start + 2 * WORDS])
            passages[split].append((passage, continuation))
    return passages


def passage_row(passage: tuple[str, str]) -> dict:
    return make_row([(f"{PROMPTS['continue']}\n{passage[0]}", passage[1])], [], "continue")
