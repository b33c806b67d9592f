"""Damaged training data: meta JSON and tar shards."""

import io
import json
import pathlib
import random
import tarfile
from collections.abc import Iterator

from tools.fuzz.case import Case, Kind
from tools.fuzz.kinds_data import DATA, DOCTOR, SEEN
from tools.fuzz.mutate import byte_changes, json_changes, set_json

META, TAR = "data/meta.json", "data/packed.tar"


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
        "an image without a row": [("5.png", b"x", {})],
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
        "a row that is not JSON": [("5.json", b"{", {})],
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
    """Returns damage that leaves wrong indices where the doctor keeps them, next to each file."""

    def spoil(folder: pathlib.Path) -> None:
        for file in (SEEN, TAR):
            (folder / f"{file}.index.npy").write_bytes(content)

    return spoil


KINDS = [
    Kind("meta", DATA, cases=meta_cases, **DOCTOR),
    Kind("shards", DATA, cases=shard_cases, **DOCTOR),
]
