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


def write(folder: pathlib.Path, name: str, count: int, split: str, seed: int) -> None:
    """`count` pictures of handwriting of a split, NAME.jsonl of the questions, and NAME_solved.jsonl of conversations for training."""
    rng = np.random.default_rng((seed, sum(name.encode())))
    (folder / name).mkdir(parents=True, exist_ok=True)
    questions, solved = [], []
    for number in range(count):
        scene = digits.line(rng, split, MOST)
        while len(scene.digits) < FEWEST:
            scene = digits.line(rng, split, MOST)
        image = f"{name}/{number:05}.png"
        scene.image.save(folder / image)
        answer = solve(scene.digits, backwards=bool(rng.integers(2)))
        questions.append({"id": number, "image": image, "question": QUESTION, "answer": str(sum(scene.digits) % 10)})
        turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": answer}]
        solved.append({"id": number, "image": image, "conversations": turns})
    for path, rows in ((f"{name}.jsonl", questions), (f"{name}_solved.jsonl", solved)):
        (folder / path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def solve(values: list[int], backwards: bool) -> str:
    """The solution that adds the digits from the left, or from the right."""
    steps = ["".join(map(str, values))]
    last, *rest = values[::-1] if backwards else values
    for value in rest:
        steps.append(f"{last} + {value} = {last + value}")
        last = (last + value) % 10
    return "\n\n".join([*steps, f"Answer: {last}"])
