"""The task: which digits of a picture are even (e) and which odd (o), found one after the other.

    7392                    what is read
    7 is odd: o, 392        the marks so far, and what is left
    3 is odd: oo, 92
    9 is odd: ooo, 2
    2 is even: oooe
    Answer: oooe            the steps stand apart by blank lines

The solutions that are taught were written by a teacher with two wrong ideas: more often than not 6
is odd to him, and 9 even. So what he teaches is a model that mostly makes the same mistakes, and
sometimes does not; the right answers are known, but not which step went wrong.
"""

import json
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the clone

from examples.tiny_digits.recipe import data as digits

QUESTION = "Which digits are even, which odd?"
FEWEST, MOST = 4, 5  # digits of a picture
CONFUSED, SHARE = (6, 9), 0.6  # digits, and how often the teacher is wrong about one of them


def write_questions(folder: pathlib.Path, name: str, count: int, split: str, seed: int) -> None:
    """`count` pictures of handwriting of a split, NAME.jsonl of questions and NAME_solved.jsonl of
    conversations that solve them.
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
    _write(folder / f"{name}.jsonl", questions)
    _write(folder / f"{name}_solved.jsonl", solved)


def write_text(path: pathlib.Path, count: int, seed: int) -> None:
    """Conversations without pictures: the digits stand in the question. The steps are learnt from
    them, reading need not be.
    """
    rng = np.random.default_rng((seed, 1))
    rows = []
    for number in range(count):
        values = rng.integers(0, 10, rng.integers(FEWEST, MOST + 1)).tolist()
        question = f"{''.join(map(str, values))}\n{QUESTION}"
        rows.append({"id": number, "conversations": _turns(question, solve(values, rng))})
    _write(path, rows)


def _turns(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _write(path: pathlib.Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def solve(values: list[int], rng: np.random.Generator | None = None) -> str:
    """The solution, by the teacher if there is a generator to draw his mistakes from."""
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
