"""The whole way in one command: converts the shipped digits model, asks it about pictures, compares
the answers. `make demo`.

    python examples/demo.py [--model examples/tiny_digits] [--output demo_output]

The model was trained by this repository (configs/tiny_digits.py) and lies here as the big ones are
released: safetensors, config.json, tokenizer. The handwriting in the pictures is of scans it has
never seen. The exit status is 1 if more than a quarter of the answers are wrong: the model misses a
few per cent, a broken program nearly all. A place counts as right if every box covers at least half
of what it and the expected box cover together.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time

from rich import box
from rich.console import Console
from rich.table import Table

ROOT = pathlib.Path(__file__).resolve().parent.parent
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
        help="where the converted checkpoint goes",
    )
    options = parser.parse_args()
    began = time.perf_counter()
    console = Console(
        highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 160
    )
    try:
        checkpoint = convert_model(options.model, options.output / "checkpoint", console)
        questions = read_questions(options.model / "questions.jsonl")
        rows = ask_all(checkpoint, questions, options.model, console)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    console.print(make_table(rows))
    wrong = sum(not row["right"] for row in rows)
    first_token = statistics.median(row["answer"].first_token_seconds for row in rows)
    console.print(
        f"\n{len(rows) - wrong} of {len(rows)} answers are right; {time.perf_counter() - began:.0f} s in all."
    )
    console.print(
        f"First token after {first_token:.2f} s (median; where a shape is new, its program is compiled first)."
    )
    command = f"{shown(sys.executable)} {shown(ROOT / 'infer.py')} --checkpoint {shown(checkpoint)}"
    console.print(
        f"Ask on your own:\n  {command} --image PICTURE --prompt 'Read the number.'", soft_wrap=True
    )
    return 1 if wrong > ACCEPTED_SHARE_WRONG * len(rows) else 0


def convert_model(source: pathlib.Path, target: pathlib.Path, console: Console) -> pathlib.Path:
    """Safetensors -> checkpoint, as `python -m convert SOURCE TARGET --verify --overwrite`."""
    from convert.open import open_model
    from convert.run import convert

    began = time.perf_counter()
    target.parent.mkdir(parents=True, exist_ok=True)
    hashes = convert(open_model(source), target, verify=True, overwrite=True)
    seconds = time.perf_counter() - began
    console.print(
        f"converted {shown(source)} to {shown(target)}: {len(hashes)} tensors, hashes equal, {seconds:.1f} s\n"
    )
    return target


def read_questions(path: pathlib.Path) -> list[dict]:
    """Lines of task, prompt, image (list of paths beside the file) and expected, as
    examples/make_questions.py writes them.
    """
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ask_all(
    checkpoint: pathlib.Path, questions: list[dict], directory: pathlib.Path, console: Console
) -> list[dict]:
    """Asks each question in a conversation of its own and prints the answers as they come; returns
    the table's rows.
    """
    from internvl3_jax import Chat, load

    sys.path.insert(0, str(ROOT))
    from examples.tiny_digits.recipe.data import is_right

    chat = Chat(load(checkpoint, dtype="float32"), max_new_tokens=LONGEST_ANSWER)
    rows = []
    for number, question in enumerate(questions, 1):
        asked = question["prompt"].removeprefix("<image>\n").replace("\n", " ")
        console.print(f"{number:>2}  {asked} ", end="")
        chat.reset()
        for piece in chat.stream(
            question["prompt"], images=[str(directory / image) for image in question["image"]]
        ):
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
    for heading in ("task", "picture", "tiles", "expected", "answered", ""):
        table.add_column(heading, overflow="fold", max_width=48)
    table.add_column("first token", justify="right")
    for row in rows:
        question, answer = row["question"], row["answer"]
        pictures = "\n".join(os.path.basename(image) for image in question["image"])
        tiles = " + ".join(map(str, answer.tiles))
        mark = "✓" if row["right"] else "✗"
        seconds = f"{answer.first_token_seconds:.2f} s"
        table.add_row(
            str(row["number"]),
            question["task"],
            pictures,
            tiles,
            question["expected"],
            answer.text.replace("\n", " "),
            mark,
            seconds,
        )
    return table


def shown(path: str | os.PathLike) -> str:
    """A path as short as it can be typed here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


if __name__ == "__main__":
    sys.exit(main())
