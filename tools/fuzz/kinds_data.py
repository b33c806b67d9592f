"""Damaged training data: the rows of JSONL files."""

import json
import pathlib
import random
import zlib
from collections.abc import Callable, Iterator

from tools.fuzz import programs
from tools.fuzz.case import Case, Kind
from tools.fuzz.mutate import (
    byte_changes,
    edit_bytes,
    flip_changes,
    place_changes,
)

ROWS, SEEN = "data/text.jsonl", "data/seen.jsonl"


def row_value(file: str, number: int, path: tuple, text: str) -> Callable[[pathlib.Path], None]:
    """Returns damage that sets a value of a row, which may not have had it, to JSON text."""

    def spoil(folder: pathlib.Path) -> None:
        lines = (folder / file).read_text().splitlines()
        if path:
            row = parent = json.loads(lines[number])
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = "@@"
            lines[number] = json.dumps(row).replace('"@@"', text)
        else:
            lines[number] = text
        (folder / file).write_text(
            "".join(f"{line}\n" for line in lines), encoding="utf-8", errors="surrogateescape"
        )

    return spoil


def row_cases(rng: random.Random) -> Iterator[Case]:
    kind, names = "rows", ("seen row 2", "seen.jsonl line 3")
    for text in (
        "",
        "null",
        "[]",
        "5",
        '"x"',
        "{",
        "{}",
        "NaN",
        '{"a": ' * 5000,
        "[" * 100_000,
        '{"conversations": []}',
        "\x00",
        "\udcff",
    ):
        yield Case(kind, f"row is {text[:20]!r}", "refuse", row_value(SEEN, 2, (), text), names)
    wrong = {
        ("image",): (
            "5",
            "{}",
            "[5]",
            "[null]",
            '""',
            '"gone.png"',
            '"../data/0.png"',
            '"/etc/passwd"',
            '"0.png\\u0000"',
            '"text.jsonl"',
            "true",
            '"data:image/png;base64,AAAA"',
            '{"bytes": "AAAA"}',
            '"http://127.0.0.1:9/x.png"',
            '"\\ud800.png"',
            f'"{"x" * 5000}.png"',
            '["0.png", "1.png"]',
        ),
        ("images",): ('["0.png"]', '"0.png"'),
        ("conversations",): (
            "null",
            "[]",
            "{}",
            '"x"',
            "5",
            "[5]",
            "[null]",
            "[[]]",
            "[{}]",
            '[{"from": "human"}]',
            '[{"value": "x"}]',
        ),
        ("conversations", 0, "from"): ("5", "null", '"gpt"', '"robot"', "[]", "true"),
        ("conversations", 0, "value"): ("5", "null", "[]", "{}", '"<image><image>"', "true"),
        ("conversations", 1, "value"): ("5", "null", "[]", "true", f'"{"long " * 3000}"'),
        ("conversations", 1, "from"): ('"human"', "null", "7"),
    }
    for path, texts in wrong.items():
        for text in texts:
            key = ".".join(map(str, path))
            # The official code takes an empty text for no image.
            # And a second <image> beside one image stays text there.
            expected = "either" if text in ('""', '"<image><image>"') else "refuse"
            yield Case(
                kind, f"{key} = {text[:40]}", expected, row_value(SEEN, 2, path, text), names
            )
    for key in ("imgae", "videos"):
        yield Case(
            kind,
            f"one key more: {key}",
            "warn",
            row_value(SEEN, 2, (key,), '"0.png"'),
            (key, *names),
        )
    yield Case(kind, "NaN for the id", "refuse", row_value(SEEN, 2, ("id",), "NaN"), names)
    for text in ("null", "1.5", '"x"', "[]", "{}", "true", '"\\u001b[2J"'):
        yield Case(
            kind, f"id = {text}", "either", row_value(SEEN, 2, ("id",), text), (*names, "id")
        )
    file = "seen.jsonl"
    yield Case(
        kind,
        "byte order mark",
        "same",
        edit_bytes(SEEN, lambda data: b"\xef\xbb\xbf" + data),
        (file,),
    )
    yield Case(
        kind, "CRLF", "same", edit_bytes(SEEN, lambda data: data.replace(b"\n", b"\r\n")), (file,)
    )
    yield Case(
        kind, "no last line break", "same", edit_bytes(SEEN, lambda data: data[:-1]), (file,)
    )
    yield Case(
        kind,
        "blank lines at the end",
        "same",
        edit_bytes(SEEN, lambda data: data + b"\n\n"),
        (file,),
    )
    yield Case(
        kind,
        "a blank line within",
        "refuse",
        edit_bytes(SEEN, lambda data: data.replace(b"\n", b"\n\n", 1)),
        ("seen",),
    )
    yield Case(
        kind,
        "UTF-16",
        "same",
        edit_bytes(SEEN, lambda data: data.decode().encode("utf-16")),
        ("seen",),
    )
    yield Case(
        kind,
        "Latin-1",
        "refuse",
        edit_bytes(SEEN, lambda data: data.replace(b"Noise", b"No\xefse")),
        ("seen",),
    )
    yield Case(
        kind,
        "no line break at all",
        "refuse",
        edit_bytes(SEEN, lambda data: data.replace(b"\n", b" ")),
        ("seen",),
    )
    yield Case(
        kind,
        "gzip",
        "refuse",
        edit_bytes(SEEN, lambda data: zlib.compress(data, wbits=31)),
        ("seen",),
    )
    yield from (
        Case(kind, *change, (file, "seen"))
        for change in place_changes(SEEN)
        if "64 GB" not in change[0]
    )
    yield from (
        Case(kind, *change, (file, "seen")) for change in flip_changes(SEEN, rng, 10, "either")
    )
    yield from (
        Case(kind, *change, ("0.png",)) for change in byte_changes("data/0.png", rng, "either", 2)
    )


DOCTOR = {"program": programs.doctor, "result": programs.examined}
DATA = ("data", "conv")
KINDS = [
    Kind("rows", DATA, cases=row_cases, **DOCTOR),
]
