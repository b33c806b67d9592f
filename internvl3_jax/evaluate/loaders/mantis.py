"""Mantis-Eval: the parquet file of its hub repository."""

import functools
import os
import pathlib
from collections.abc import Sequence

from internvl3_jax.evaluate.loaders.places import find_files
from internvl3_jax.evaluate.task import Loaded, Row, Task
from internvl3_jax.io.safe_files import FileError
from internvl3_jax.io.strict_json import Object

_KINDS = ("multi-choice", "short-answer")


def load(task: Task, data: pathlib.Path) -> Loaded:
    """Reads question_type, question, images, options and answer."""
    paths = find_files(data, task.files)
    rows = []
    for path in paths:
        for number, values in enumerate(read_parquet(path), 1):
            rows.append(_row(Object(values, f"{path.name} row {number}"), len(rows) + 1))
    return Loaded(rows, tuple(map(str, paths)))


def read_parquet(path: str | os.PathLike) -> list[dict]:
    """Returns the rows of a parquet file.

    Raises:
      ValueError: pyarrow is not installed.
      FileError: the file cannot be read.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            "Mantis-Eval is a parquet file, which pyarrow reads: pip install pyarrow"
        ) from error
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise FileError(f"{path}: is not a complete parquet file ({error})") from error


def _row(item: Object, number: int) -> Row:
    kind = item.get("question_type", str, choices=_KINDS)
    options = [str(option).strip() for option in item.get("options", list, [])]
    answer = item.get("answer", str)
    if kind == "multi-choice" and not (
        len(answer) == 1 and 0 <= ord(answer) - ord("A") < len(options)
    ):
        raise FileError(f"{item.where}: answer is {answer!r}; expected a letter of the options")
    images = item.get("images", list, low=1)
    return Row(
        id=str(number),
        where=item.where,
        question=item.get("question", str),
        answer=answer,
        values={"kind": kind, "texts": options},
        load_images=functools.partial(_images, images, item.where),
    )


def _images(images: Sequence, where: str) -> list[bytes]:
    found = [image.get("bytes") if isinstance(image, dict) else image for image in images]
    if not all(isinstance(image, bytes) and image for image in found):
        raise FileError(f"{where}: column images has no bytes; was it downloaded completely?")
    return found
