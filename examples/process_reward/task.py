"""The task: what the sum of a picture's digits ends in, found by adding one digit after the other and keeping the last place.

7392                    what is read
7 + 3 = 10              from the left or from the right
0 + 9 = 9
9 + 2 = 11
Answer: 1               the steps stand apart by blank lines
"""

import json
import pathlib

import numpy as np

from internvl3_jax.data import digits

QUESTION = "What is the last digit of the sum?"
FEWEST, MOST = 4, 5  # digits of a picture


def write_questions(folder: pathlib.Path, name: str, count: int, split: str, seed: int) -> None:
    """`count` pictures of handwriting of a split, NAME.jsonl of questions and NAME_solved.jsonl of conversations that solve them."""
    rng = np.random.default_rng((seed, sum(name.encode())))
    (folder / name).mkdir(parents=True, exist_ok=True)
    questions, solved = [], []
    for number in range(count):
        scene = digits.line(rng, split, MOST)
        while len(scene.digits) < FEWEST:
            scene = digits.line(rng, split, MOST)
        image = f"{name}/{number:05}.png"
        scene.image.save(folder / image)
        answer = str(sum(scene.digits) % 10)
        questions.append({"id": number, "image": image, "question": QUESTION, "answer": answer})
        turns = _turns(f"<image>\n{QUESTION}", solve(scene.digits, backwards=bool(rng.integers(2))))
        solved.append({"id": number, "image": image, "conversations": turns})
    _write(folder / f"{name}.jsonl", questions)
    _write(folder / f"{name}_solved.jsonl", solved)


def write_text(path: pathlib.Path, count: int, seed: int) -> None:
    """Conversations without pictures: the digits stand in the question. Adding is learnt from them, reading need not be."""
    rng = np.random.default_rng((seed, 1))
    rows = []
    for number in range(count):
        values = rng.integers(0, 10, rng.integers(FEWEST, MOST + 1)).tolist()
        question = f"{''.join(map(str, values))}\n{QUESTION}"
        rows.append({"id": number, "conversations": _turns(question, solve(values, backwards=bool(rng.integers(2))))})
    _write(path, rows)


def _turns(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _write(path: pathlib.Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def solve(values: list[int], backwards: bool) -> str:
    """The solution that adds the digits from the left, or from the right."""
    steps = ["".join(map(str, values))]
    last, *rest = values[::-1] if backwards else values
    for value in rest:
        steps.append(f"{last} + {value} = {last + value}")
        last = (last + value) % 10
    return "\n\n".join([*steps, f"Answer: {last}"])
