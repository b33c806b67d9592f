"""Converts the shipped digits model, asks it about images, and checks the answers (`make demo`).

    python examples/demo.py [--model examples/tiny_digits] [--output demo_output]

The model was trained with configs/tiny_digits.py and is stored as the large ones are released:
safetensors, config.json, tokenizer. The handwriting in the images is of test scans. The exit status
is 1 if more than a quarter of the answers are wrong: the model misses a few percent, a broken
program nearly all. A box counts as correct from an intersection over union of 0.5 on.
"""

import argparse
import os
import pathlib
import statistics
import sys
import time

from rich import box
from rich.console import Console
from rich.table import Table

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from convert.open import open_model
from convert.run import convert
from examples.experiment import read_jsonl
from examples.tiny_digits.recipe.data import is_right
from internvl3_jax import Chat, load

MODEL = ROOT / "examples" / "tiny_digits"
LONGEST_ANSWER = 96  # tokens; naming five boxes takes most of them
ACCEPTED_SHARE_WRONG = 0.25


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        type=pathlib.Path,
        default=MODEL,
        help="directory with safetensors and questions.jsonl",
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=ROOT / "demo_output",
        help="folder of the converted checkpoint",
    )
    options = parser.parse_args()
    began = time.perf_counter()
    console = Console(
        highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 160
    )
    try:
        checkpoint = convert_model(options.model, options.output / "checkpoint", console)
        questions = read_jsonl(options.model / "questions.jsonl")
        rows = ask_all(checkpoint, questions, options.model, console)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    console.print(make_table(rows))
    wrong = sum(not row["right"] for row in rows)
    first_token = statistics.median(row["answer"].first_token_seconds for row in rows)
    console.print(
        f"\n{len(rows) - wrong} of {len(rows)} answers are right; "
        f"{time.perf_counter() - began:.0f} s in all."
    )
    console.print(f"First token after {first_token:.2f} s (median; a new shape is compiled first).")
    command = f"{shown(sys.executable)} {shown(ROOT / 'infer.py')} --checkpoint {shown(checkpoint)}"
    console.print(
        f"Ask your own question:\n  {command} --image IMAGE --prompt 'Read the number.'",
        soft_wrap=True,
    )
    return 1 if wrong > ACCEPTED_SHARE_WRONG * len(rows) else 0


def convert_model(source: pathlib.Path, target: pathlib.Path, console: Console) -> pathlib.Path:
    """Converts safetensors, as `python -m convert SOURCE TARGET --verify --overwrite` does."""
    began = time.perf_counter()
    target.parent.mkdir(parents=True, exist_ok=True)
    hashes = convert(open_model(source), target, verify=True, overwrite=True)
    seconds = time.perf_counter() - began
    console.print(
        f"converted {shown(source)} to {shown(target)}: {len(hashes)} tensors, hashes equal, "
        f"{seconds:.1f} s\n"
    )
    return target


def ask_all(
    checkpoint: pathlib.Path, questions: list[dict], directory: pathlib.Path, console: Console
) -> list[dict]:
    """Asks each question in a new conversation and streams the answers.

    Args:
      questions: rows of task, prompt, image (paths relative to `directory`) and expected.

    Returns:
      Rows for `make_table`.
    """
    chat = Chat(load(checkpoint, dtype="float32"), max_new_tokens=LONGEST_ANSWER)
    rows = []
    for number, question in enumerate(questions, 1):
        asked = question["prompt"].removeprefix("<image>\n").replace("\n", " ")
        console.print(f"{number:>2}  {asked} ", end="")
        chat.reset()
        images = [str(directory / image) for image in question["image"]]
        for piece in chat.stream(question["prompt"], images):
            console.print(piece, end="")
        answer = chat.last
        console.print()
        right = is_right(question["task"], question["expected"], answer.text)
        rows.append({"number": number, "question": question, "answer": answer, "right": right})
    console.print()
    return rows


def make_table(rows: list[dict]) -> Table:
    table = Table(box=box.SIMPLE if sys.stdout.isatty() else None, pad_edge=False)
    table.add_column("", justify="right")
    for heading in ("task", "image", "tiles", "expected", "answered", ""):
        table.add_column(heading, overflow="fold", max_width=48)
    table.add_column("first token", justify="right")
    for row in rows:
        question, answer = row["question"], row["answer"]
        images = "\n".join(os.path.basename(image) for image in question["image"])
        tiles = " + ".join(map(str, answer.tiles))
        mark = "✓" if row["right"] else "✗"
        seconds = f"{answer.first_token_seconds:.2f} s"
        table.add_row(
            str(row["number"]),
            question["task"],
            images,
            tiles,
            question["expected"],
            answer.text.replace("\n", " "),
            mark,
            seconds,
        )
    return table


def shown(path: str | os.PathLike) -> str:
    """Returns the path relative to the working directory, if it is below it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


if __name__ == "__main__":
    sys.exit(main())
