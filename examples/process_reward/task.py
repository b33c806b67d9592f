"""The task: mark each digit of an image as even (e) or odd (o), step by step.

    7392                    the number that is read
    7 is odd: o, 392        the marks so far, and the remaining digits
    3 is odd: oo, 92
    9 is odd: ooo, 2
    2 is even: oooe
    Answer: oooe            blank lines separate the steps

The solutions of the training data make two mistakes on purpose: in 60 % of the cases 6 is called
odd, and 9 even. A model trained on them mostly makes the same mistakes, and sometimes does not. The
correct answers are known, but not which step is wrong.
"""

import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the clone

from examples.experiment import write_jsonl
from examples.tiny_digits.recipe import data as digits

QUESTION = "Which digits are even, which odd?"
FEWEST, MOST = 4, 5  # digits of an image
# Digits that the training data calls by the wrong name, and how often
CONFUSED, SHARE = (6, 9), 0.6


def write_questions(folder: pathlib.Path, name: str, count: int, split: str, seed: int) -> None:
    """Writes `count` images of a split's handwriting, questions (NAME.jsonl), and conversations with
    solutions (NAME_solved.jsonl).
    """
    rng = np.random.default_rng((seed, sum(name.encode())))
    (folder / name).mkdir(parents=True, exist_ok=True)
    questions, solved = [], []
    for number in range(count):
        scene = digits.line(rng, split, MOST)
        while len(scene.digits) < FEWEST:
            scene = digits.line(rng, split, MOST)
        image = f"{name}/{number:05}.png"
        scene.image.save(folder / image)
        answer = "".join("oe"[digit % 2 == 0] for digit in scene.digits)
        questions.append({"id": number, "image": image, "question": QUESTION, "answer": answer})
        turns = _turns(f"<image>\n{QUESTION}", solve(scene.digits, rng))
        solved.append({"id": number, "image": image, "conversations": turns})
    write_jsonl(folder / f"{name}.jsonl", questions)
    write_jsonl(folder / f"{name}_solved.jsonl", solved)


def write_text(path: pathlib.Path, count: int, seed: int) -> None:
    """Writes conversations without images, with the digits in the question. They train the steps
    without the reading.
    """
    rng = np.random.default_rng((seed, 1))
    rows = []
    for number in range(count):
        values = rng.integers(0, 10, rng.integers(FEWEST, MOST + 1)).tolist()
        question = f"{''.join(map(str, values))}\n{QUESTION}"
        rows.append({"id": number, "conversations": _turns(question, solve(values, rng))})
    write_jsonl(path, rows)


def _turns(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def solve(values: list[int], rng: np.random.Generator | None = None) -> str:
    """Returns the solution. rng: Samples the mistakes of the training data; None makes none."""
    steps, marks = ["".join(map(str, values))], ""
    for number, value in enumerate(values):
        even = value % 2 == 0
        if rng is not None and value in CONFUSED and rng.random() < SHARE:
            even = not even
        marks += "e" if even else "o"
        left = "".join(map(str, values[number + 1 :]))
        steps.append(
            f"{value} is {'even' if even else 'odd'}: {marks}" + (f", {left}" if left else "")
        )
    return "\n\n".join([*steps, f"Answer: {marks}"])
