"""Writes the images and questions of `make demo`: four of each task, on handwriting of test scans.

    python examples/make_questions.py    into examples/tiny_digits, beside the weights

    images/01_read.png ...     the images
    questions.jsonl              {"id": 1, "task": .., "prompt": .., "image": [PATHS], "expected": ..}
                                 per line

The seed is fixed, so the files are the same every time. It differs from the seed of the accuracy in
the training report. infer.py answers the same file: --requests
examples/tiny_digits/questions.jsonl.
"""

import argparse
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # the clone

from examples.tiny_digits.recipe.data import Question, held_out

DIRECTORY = pathlib.Path(__file__).resolve().parent / "tiny_digits"
PER_TASK = 4
SEED = 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", nargs="?", type=pathlib.Path, default=DIRECTORY)
    directory = parser.parse_args().directory
    (directory / "pictures").mkdir(parents=True, exist_ok=True)
    rows = [
        write(question, number, directory)
        for number, question in enumerate(held_out(PER_TASK, SEED), 1)
    ]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (directory / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
    size = sum(path.stat().st_size for path in (directory / "pictures").iterdir())
    print(
        f"{len(rows)} questions in {directory / 'questions.jsonl'}, {size / 1000:.0f} kB of images"
    )


def write(question: Question, number: int, directory: pathlib.Path) -> dict:
    """Saves the images of a question; returns its row."""
    paths = []
    for index, image in enumerate(question.images, 1):
        suffix = f"_{index}" if len(question.images) > 1 else ""
        paths.append(f"pictures/{number:02}_{question.task}{suffix}.png")
        image.save(directory / paths[-1], optimize=True)
    prompt = question.messages[0]["content"]
    return {
        "id": number,
        "task": question.task,
        "prompt": prompt,
        "image": paths,
        "expected": question.answer,
    }


if __name__ == "__main__":
    main()
