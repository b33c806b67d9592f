"""Damaged training data: rows, meta JSON, shards."""

import io
import json
import pathlib
import random
import tarfile
import zlib
from collections.abc import Callable, Iterator

from tools.fuzz import programs
from tools.fuzz.case import Case, Kind
from tools.fuzz.mutate import (
    byte_changes,
    edit_bytes,
    flip_changes,
    json_changes,
    place_changes,
    set_json,
)

ROWS, SEEN, META, TAR = "data/text.jsonl", "data/seen.jsonl", "data/meta.json", "data/packed.tar"


def row_value(file: str, number: int, path: tuple, text: str) -> Callable[[pathlib.Path], None]:
    """Puts JSON text in the place of a value of a row, which may not have had it."""

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
            # The official code takes an empty text for no picture.
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


# --- meta JSON, shards, lists --------------------------------------------------------------------


def meta_cases(rng: random.Random) -> Iterator[Case]:
    kind, name = "meta", "meta.json"
    yield from (Case(kind, *change, (name,)) for change in json_changes(META, rng, 8))
    numbers = ('"x"', "[]", "{}", "true", "-1", "NaN", "1e999", "1e300", '"2"', "1" + "0" * 25)
    wrong = {
        "repeat_time": (*numbers, "0"),
        "weight": tuple(text for text in numbers if text not in ("1" + "0" * 25, "1e300")),
        "max_dynamic_patch": (*numbers, "0", "1.5", "1000000"),
        "length": tuple(text for text in numbers if text != "1" + "0" * 25),
        "data_augment": ('"no"', "[]", "{}", "5", "NaN", "0.5"),
        "root": ("5", "[]", "{}", "true", '"gone"', '"data\\u0000"', f'"{"x" * 5000}"'),
        "annotation": (
            "5",
            "null",
            "[]",
            "{}",
            "true",
            '""',
            "[5]",
            "[null]",
            '"gone.jsonl"',
            '"0.png"',
            '"meta.json"',
            '"text.jsonl.gz"',
            '"/dev/zero"',
            '"\\ud800.jsonl"',
            '"text\\u0000.jsonl"',
            '"x{0..99999999999}.jsonl"',
            '"{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}.jsonl"',
            '"{5..1}.jsonl"',
            '"{a,b}.jsonl"',
            '"{{{{{{.jsonl"',
            '"' + "{a," * 500 + "}" * 500 + '.jsonl"',
            '"' + "*/" * 400 + '.jsonl"',
        ),
    }
    for key, texts in wrong.items():
        for text in texts:
            expected = "either" if text == "1000000" else "refuse"
            yield Case(
                kind, f"{key} = {text[:40]}", expected, _entry("seen", key, text), (key, "seen")
            )
    for key in ("anotation", "repeat", "lenght"):
        yield Case(kind, f"an unknown key {key}", "refuse", _entry("seen", key, "1"), (key,))
    for text in ("null", "[]", "5", '"x"', "{}"):
        yield Case(kind, f"entry = {text}", "refuse", set_json(META, ("seen",), text), ("seen",))
    for title in ("a\tb", "a\nb", "", "x" * 5000):
        expected = (
            "refuse" if title.strip() != title or "\t" in title or "\n" in title else "either"
        )
        yield Case(kind, f"source called {title[:10]!r}", expected, _titled(title), (name, "name"))
    for title in ("\x1b[2Jx", "[/x]", "[red]x", "a/b", "..", "x\u202ey"):
        yield Case(kind, f"source called {title!r}", "either", _titled(title), (name, "name"))
    yield Case(kind, "another length", "warn", _entry("seen", "length", "99"), ("length",))


def _entry(source: str, key: str, text: str):
    def spoil(folder: pathlib.Path) -> None:
        meta = json.loads((folder / META).read_text())
        meta[source][key] = "@@"
        (folder / META).write_text(json.dumps(meta).replace('"@@"', text))

    return spoil


def _titled(title: str):
    def spoil(folder: pathlib.Path) -> None:
        meta = json.loads((folder / META).read_text())
        meta[title] = meta.pop("seen")
        (folder / META).write_text(json.dumps(meta))

    return spoil


def shard_cases(rng: random.Random) -> Iterator[Case]:
    kind, names = "shards", ("packed", "seen", "text.jsonl")
    for change, _, spoil in byte_changes(TAR, rng, "either", 10):
        if "64 GB" in change:
            continue  # a file of any size may be indexed, which takes as long as reading it
        certain = any(
            what in change
            for what in (
                "0.02",
                " missing",
                "pipe",
                "directory",
                "link",
                "device",
                "noise",
                "of text",
                "0.3",
                "0.7",
            )
        )
        yield Case(
            kind,
            change,
            "refuse" if certain and "last byte" not in change else "either",
            spoil,
            names,
        )
    for title, members in {
        "a link out": [("5.json", b"{}", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"})],
        "a hard link": [("5.json", b"", {"type": tarfile.LNKTYPE, "linkname": "0.json"})],
        "a device": [("5.json", b"", {"type": tarfile.CHRTYPE})],
        "a sparse file of 40 GiB": [
            (
                "5.json",
                b"",
                {
                    "pax_headers": {
                        "GNU.sparse.major": "1",
                        "GNU.sparse.minor": "0",
                        "GNU.sparse.realsize": str(40 << 30),
                        "GNU.sparse.name": "5.json",
                    }
                },
            )
        ],
        "a size of 32 TiB": [("5.json", b"", {"pax_headers": {"size": str(32 << 40)}})],
        "a picture without a row": [("5.png", b"x", {})],
        "two rows of one sample": [("5.json", b"{}", {}), ("5.a.json", b"{}", {})],
        "a row that names a file outside": [
            (
                "5.json",
                b'{"image": "/etc/passwd", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}',
                {},
            )
        ],
        "a row that climbs": [
            (
                "5.json",
                b'{"image": "../data/0.png", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}',
                {},
            )
        ],
        "a row that is no JSON": [("5.json", b"{", {})],
    }.items():
        yield Case(kind, title, "refuse", _append(members), names)
    yield Case(
        kind, "a member called ../../x", "either", _append([("../../x.json", b"{}", {})]), names
    )
    for name, content in {
        "empty": b"",
        "text": b"x" * 100,
        "a pickle": b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
        + b" " * 60
        + b"\n\x80\x04N.",
        "a bomb": b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', 'fortran_order': False, 'shape': (9000000000000,), }",
    }.items():
        yield Case(kind, f"an index that is {name}", "same", _stale_index(content), names)


def _append(members: list):
    def spoil(folder: pathlib.Path) -> None:
        with tarfile.open(folder / TAR, "a", format=tarfile.PAX_FORMAT) as archive:
            for name, content, fields in members:
                member = tarfile.TarInfo(name)
                member.size = len(content) if member.isreg() and "type" not in fields else 0
                for field, value in fields.items():
                    setattr(member, field, value)
                archive.addfile(member, io.BytesIO(content))

    return spoil


def _stale_index(content: bytes):
    """Where the doctor keeps an index, beside its file."""

    def spoil(folder: pathlib.Path) -> None:
        for file in (SEEN, TAR):
            (folder / f"{file}.index.npy").write_bytes(content)

    return spoil


DOCTOR = {"program": programs.doctor, "result": programs.examined}
DATA = ("data", "conv")
KINDS = [
    Kind("rows", DATA, cases=row_cases, **DOCTOR),
    Kind("meta", DATA, cases=meta_cases, **DOCTOR),
    Kind("shards", DATA, cases=shard_cases, **DOCTOR),
]
