"""Tab-separated tables as pandas writes them: VLMEvalKit's data sets.

The images of a table are read when they are asked for; until then the table remembers where their
rows begin, so that a file of many gigabytes needs little memory.
"""

import ast
import base64
import binascii
import contextlib
import csv
import functools
import os
import pathlib
from collections.abc import Iterator, Sequence

from internvl3_jax.io.safe_files import FileError, open_regular
from internvl3_jax.io.terminal import excerpt, one_line

# Texts that pandas takes as missing: the kit leaves such options and hints out.
MISSING = frozenset(
    (
        "|#N/A|#N/A N/A|#NA|-1.#IND|-1.#QNAN|-NaN|-nan|1.#IND|1.#QNAN|<NA>|N/A|NA|NULL|NaN|None|n/a"
        "|nan|null"
    ).split("|")
)
_LONGEST_REFERENCE = 64  # characters of the index of another row, in place of an image
_LARGEST_FIELD = 1 << 30


class Record:
    """One row.

    Attributes:
      number: from 1, without the header.
      values: column -> text, without "image".
      where: "FILE row N (index X)".
    """

    def __init__(self, table: "Table", number: int, offset: int, values: dict[str, str]):
        self.table, self.number, self.offset = table, number, offset
        image = values.pop("image", "")
        self.reference = image if len(image) <= _LONGEST_REFERENCE else ""
        self.has_image = bool(image) and image not in MISSING
        self.values = values
        index = f" (index {excerpt(values['index'])[1:-1]})" if "index" in values else ""
        self.where = f"{table.name} row {number}{index}"

    @property
    def is_imageless(self) -> bool:
        """Returns whether the table has images, and this row none."""
        has_path = self.present("image_path") is not None
        return "image" in self.table.columns and not self.has_image and not has_path

    def get(self, column: str) -> str:
        """Returns a text; FileError if it is empty."""
        value = self.values.get(column, "")
        if not value.strip():
            raise FileError(f"{self.where}: column {column} is empty; was the file changed?")
        return value

    def number_of(self, column: str, kind: type = float):
        """Returns a number; FileError if it is none."""
        try:
            return kind(self.get(column))
        except ValueError as error:
            raise self.wrong(column, "a number") from error

    def literal(self, column: str, kind: type = list):
        """Returns a printed Python list (or another `kind`); FileError if it is none."""
        try:
            value = ast.literal_eval(self.get(column))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = None
        if not isinstance(value, kind):
            raise self.wrong(column, f"a printed {kind.__name__}")
        return value

    def one_of(self, column: str, choices: Sequence[str]) -> str:
        """Returns a text that is one of `choices`."""
        if self.get(column) not in choices:
            raise self.wrong(column, f"one of {', '.join(choices)}")
        return self.values[column]

    def wrong(self, column: str, expected: str) -> FileError:
        return FileError(
            f"{self.where}: column {column} is {excerpt(self.values.get(column))}; expected "
            f"{expected}"
        )

    def present(self, column: str) -> str | None:
        """Returns a text, or None where pandas reads a missing value."""
        value = self.values.get(column, "")
        return None if value in MISSING else value

    def options(self, letters: str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ") -> dict[str, str]:
        """Returns letter -> text of the options that are not missing."""
        found = {letter: self.present(letter) for letter in letters}
        return {letter: text for letter, text in found.items() if text is not None}

    def images(self) -> list[bytes | str]:
        """Returns the bytes of the row's images, or their paths."""
        return self.table.images(self)

    def names(self) -> list[str]:
        """Returns the names in image_path; [] if the table has none."""
        return _listed(self.values["image_path"]) if self.present("image_path") else []

    def check(self) -> None:
        """Raises FileError if the row has no image, or one that does not exist."""
        self.table.source(self)


class Table:
    """The rows of a file.

    Args:
      path: the file.
      columns: those that it must have; "image" stands for either image or image_path.

    Raises:
      FileError: the file is missing, incomplete or lacks a column, or an index occurs twice.
    """

    def __init__(self, path: str | os.PathLike, columns: Sequence[str] = ()):
        self.path = pathlib.Path(path)
        self.name = one_line(self.path.name)
        self.columns: list[str] = []
        self.records = [
            Record(self, number, offset, values)
            for number, (offset, values) in enumerate(self._read(), 1)
        ]
        if not self.records:
            raise FileError(f"{self.name}: has no rows; was it downloaded completely?")
        for column in columns:
            known = self.columns
            if column not in known and not (column == "image" and "image_path" in known):
                raise FileError(f"{self.name}: has no column {column}; it has {', '.join(known)}")

    @functools.cached_property
    def by_index(self) -> dict[str, Record]:
        """Returns index -> row; FileError if an index occurs twice."""
        found: dict[str, Record] = {}
        for record in self.records:
            index = record.get("index")
            if index in found:
                raise FileError(
                    f"{record.where}: column index is that of row {found[index].number}, too"
                )
            found[index] = record
        return found

    def _read(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Yields (offset, column -> text) of each row."""
        with open_regular(self.path) as file, _large_fields():
            lines = _Lines(file, self.name)
            reader = csv.reader(lines, delimiter="\t", strict=True)
            start = 0
            for fields in _rows(reader, lines, self.name):
                if not self.columns:
                    self.columns = [name.removeprefix("\ufeff") for name in fields]
                elif fields:
                    if len(fields) != len(self.columns):
                        raise FileError(
                            f"{self.name} line {lines.number}: {len(fields)} fields, the header "
                            f"has {len(self.columns)}; was the file downloaded completely?"
                        )
                    yield start, dict(zip(self.columns, fields, strict=True))
                start = lines.offset

    def _image_field(self, record: Record) -> str:
        with open_regular(self.path) as file, _large_fields():
            file.seek(record.offset)
            fields = next(csv.reader(_Lines(file, self.name), delimiter="\t", strict=True))
        return dict(zip(self.columns, fields, strict=True))["image"]

    def images(self, record: Record) -> list[bytes | str]:
        source = self.source(record)
        if isinstance(source, list):
            return source
        return [_decode(text, record.where) for text in _listed(self._image_field(source))]

    def source(self, record: Record) -> "list[str] | Record":
        """Returns the paths of a row's images, or the row that holds them."""
        if "image" not in self.columns or not record.has_image:
            if record.present("image_path") is None:
                raise FileError(f"{record.where}: column image is empty")
            return [self._find(name, record) for name in _listed(record.values["image_path"])]
        if record.reference:
            target = self.by_index.get(record.reference)
            if target is None or target.reference or not target.has_image:
                raise FileError(
                    f"{record.where}: column image is {excerpt(record.reference)}; expected an "
                    "image in base64, or the index of a row that has one"
                )
            return target
        return record

    def _find(self, name: str, record: Record) -> str:
        folder, stem = self.path.parent, self.path.stem.removesuffix("_local")
        for place in (folder / name, folder / "images" / stem / name):
            if place.is_file():
                return str(place)
        raise FileError(
            f"{record.where}: column image_path: there is no {one_line(name)} in "
            f"{one_line(str(folder))} or its images/{stem}"
        )


class _Lines:
    """Lines of a binary file as text. offset: of the next line; number: of the last one."""

    def __init__(self, file, name: str):
        self.file, self.name, self.number, self.offset = file, name, 0, file.tell()

    def __iter__(self):
        return self

    def __next__(self) -> str:
        line = self.file.readline()
        if not line:
            raise StopIteration
        self.number, self.offset = self.number + 1, self.offset + len(line)
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FileError(f"{self.name} line {self.number}: is not UTF-8") from error


def _rows(reader, lines: _Lines, name: str) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise FileError(
            f"{name} line {lines.number}: {error}; was the file downloaded completely?"
        ) from error


@contextlib.contextmanager
def _large_fields():
    """Lets `csv` read fields of any length; the limit is the whole program's."""
    before = csv.field_size_limit(_LARGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _listed(text: str) -> list[str]:
    """Returns the texts of a printed list, or the text itself."""
    if text.startswith("["):
        try:
            listed = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [text]
        return [str(item) for item in listed]
    return [text]


def _decode(text: str, where: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise FileError(
            f"{where}: column image is {excerpt(text)}, which is not base64 ({error}); was the "
            "file downloaded completely?"
        ) from error
