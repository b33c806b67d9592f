"""Rows of made-up benchmarks, and how they are written."""

import base64
import csv
import functools
import io
import json
import pathlib
from collections.abc import Callable, Sequence

from PIL import Image

ROWS = 6
SIZE = 32  # of every image: one tile of the tiny model
OPTIONS = {"A": "a red car", "B": "a dog", "C": "two cats", "D": "none of these"}


@functools.cache
def picture(number: int = 0) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (40 * number % 256, 90, 120)).save(data, "PNG")
    return data.getvalue()


def in_base64(number: int) -> str:
    return base64.b64encode(picture(number)).decode()


def save(path: pathlib.Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def write_table(path: pathlib.Path, rows: Sequence[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    save(path, text.getvalue())


def write_lines(path: pathlib.Path, rows: Sequence[dict]) -> None:
    save(path, "".join(json.dumps(row) + "\n" for row in rows))


def letter(number: int) -> str:
    return "ABCD"[number % 4]


# --- VLMEvalKit's tables --------------------------------------------------------------------------


def table_rows(**columns: Callable[[int], object] | object) -> list[dict]:
    """Rows with an index, an image and a question; a function makes a column of the number."""
    rows = []
    for number in range(ROWS):
        row = {"index": number, "image": in_base64(number), "question": f"Question {number}?"}
        row |= {
            name: value(number) if callable(value) else value for name, value in columns.items()
        }
        rows.append(row)
    # A row may share the image of another one.
    rows[1]["image"] = rows[0]["index"]
    return rows


def choices(**more) -> list[dict]:
    return table_rows(hint="", **OPTIONS, answer=letter, **more)
