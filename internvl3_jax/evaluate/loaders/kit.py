"""VLMEvalKit's tables of images as rows."""

import io
import pathlib
from collections.abc import Callable

from PIL import Image

from internvl3_jax.data.media.images import open_image
from internvl3_jax.evaluate.loaders.places import find_files
from internvl3_jax.evaluate.loaders.table import Record, Table
from internvl3_jax.evaluate.stored import as_stored
from internvl3_jax.evaluate.task import Loaded, Row, Task
from internvl3_jax.io.safe_files import FileError

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def load(task: Task, data: pathlib.Path) -> Loaded:
    """Reads the tables of a task. As in the kit, rows without an image are left out.

    Arguments of the task:
      kind: "options" (a letter of the row's options), "text", "list" (a printed list of texts),
        "mmmu", "box", "yes_or_no", "none" (labels are hidden or not needed). Default: "text".
      columns: further columns that the scorer needs.
      lists: columns with printed lists, which may be empty.
      split: rows with another `split` are left out.
      letters: of the columns of options; "" for none.
    """
    paths = find_files(data, task.files)
    found = [_rows(task, path, prefixed=len(paths) > 1) for path in paths]
    rows = [row for kept, _ in found for row in kept]
    if not rows:
        raise FileError(
            f"{paths[0].name}: no row has the split {task.arguments.get('split')!r}; is it the "
            "right file?"
        )
    return Loaded(rows, tuple(map(str, paths)), sum(imageless for _, imageless in found))


def _rows(task: Task, path: pathlib.Path, prefixed: bool) -> tuple[list[Row], int]:
    """Returns the rows of one table, and how many have no image."""
    arguments = task.arguments
    kind, letters = arguments.get("kind", "text"), arguments.get("letters", _LETTERS)
    more = (*arguments.get("columns", ()), *arguments.get("lists", ()))
    needed = ["index", "image", "question", *more]
    needed += [] if kind == "none" else ["bbox" if kind == "box" else "answer"]
    needed += ["split"] if "split" in arguments else []
    table = Table(path, needed)
    references = table.by_index  # also refuses an index that occurs twice
    rows, imageless = [], 0
    for record in references.values():
        if "split" in arguments and record.values["split"] != arguments["split"]:
            continue
        if record.is_imageless:
            imageless += 1
            continue
        options = record.options(letters)
        values = dict(record.values)
        for name in ("hint",):
            values[name] = record.present(name)
        for column in arguments.get("columns", ()):
            record.get(column)
        for column in arguments.get("lists", ()):
            values[column] = record.literal(column) if record.present(column) else []
        rows.append(
            Row(
                id=f"{path.stem}:{record.values['index']}" if prefixed else record.values["index"],
                where=record.where,
                question=record.get("question"),
                answer=_ANSWERS[kind](record, options),
                options=options,
                values=values | {"columns": table.columns},
                load_images=_doubled_first(record) if kind == "mmmu" else _stored(record),
                check=record.check,
            )
        )
    return rows, imageless


def _stored(record: Record) -> Callable[[], list]:
    return lambda: as_stored(record.images(), record.names(), record.where)


def _doubled_first(record: Record) -> Callable[[], list]:
    """Doubles the size of MMMU's first image before it is cut into tiles, as the kit does."""

    def load_images() -> list:
        first, *rest = _stored(record)()
        image = open_image(io.BytesIO(first) if isinstance(first, bytes) else first)
        size = (2 * image.width, 2 * image.height)
        return [image.resize(size, Image.Resampling.BILINEAR), *rest]

    return load_images


def _letter(record: Record, options: dict[str, str]) -> str:
    if not options:
        raise FileError(f"{record.where}: columns A, B, ... are empty; expected options")
    return record.one_of("answer", list(options))


def _mmmu(record: Record, options: dict[str, str]) -> str:
    return _letter(record, options) if options else record.get("answer")


def _texts(record: Record, options: dict[str, str]) -> list[str]:
    return [str(text) for text in record.literal("answer")]


def _box(record: Record, options: dict[str, str]) -> list[float]:
    box = record.literal("bbox")
    if len(box) != 4 or not all(isinstance(edge, int | float) for edge in box):
        raise record.wrong("bbox", "[left, top, width, height]")
    return box


_ANSWERS: dict[str, Callable[[Record, dict[str, str]], object]] = {
    "options": _letter,
    "mmmu": _mmmu,
    "text": lambda record, options: record.get("answer"),
    "list": _texts,
    "box": _box,
    "yes_or_no": lambda record, options: record.one_of("answer", ["Yes", "No"]),
    "none": lambda record, options: record.values.get("answer") or None,
}
