"""Archives that claim what they do not hold, names that hide patterns, and tables: each is read or
refused in one line, within limits.
"""

import io
import json
import os
import re
import tarfile
import time

import pytest

from internvl3_jax.data.reference_table import ReferenceError, ReferenceTable
from internvl3_jax.data.sources import files, row_scan, rows, tars
from internvl3_jax.data.sources.files import FileError
from internvl3_jax.data.sources.meta import MetaError, read_meta
from internvl3_jax.data.sources.mixture import read_drop_list
from internvl3_jax.data.sources.rows import RowError, Rows, decode_tar
from tests.support.official_data import encoded, make_image, turns, write_meta, write_rows

pytestmark = [pytest.mark.smoke, pytest.mark.usefixtures("bounded_memory")]
TEXT = {"conversations": turns("hi", "ho")}


# --- tar -----------------------------------------------------------------------------------------


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, pax: dict | None = None) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.pax_headers = size, kind, pax or {}
    return member.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT)


def sparse_header(name: str, size: int) -> bytes:
    """An old GNU sparse file without data."""
    block = bytearray(header(name, 0, tarfile.GNUTYPE_SPARSE))
    block[386 : 386 + 24] = b"%011o\0%011o\0" % (0, 0)
    block[483:495] = b"\x80" + size.to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def negative(name: str) -> bytes:
    block = bytearray(header(name, 0))
    block[124:136] = (-512).to_bytes(12, "big", signed=True)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


ROW = json.dumps(TEXT).encode()
PADDED = header("a.json", len(ROW)) + ROW.ljust(512, b"\0")
END = b"\0" * 1024


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (PADDED + sparse_header("a.png", 40 << 30) + END, "sparse"),
        (
            PADDED + header("a.png", 5, pax={"size": str(1 << 45)}) + END,
            "claims 35,184,372,088,832 bytes",
        ),
        (PADDED + header("a.png", 1 << 40) + END, "claims 1,099,511,627,776 bytes"),
        (
            PADDED + header("././@LongLink", 1 << 40, tarfile.GNUTYPE_LONGNAME) + END,
            "claims 1,099,511,627,776 bytes",
        ),
        (PADDED + header("x", 1 << 42, tarfile.XHDTYPE) + END, "claims"),
        (PADDED + header("a.png", 0, tarfile.SYMTYPE) + END, "is a link, pipe or device"),
        (PADDED + header("a.png", 0, tarfile.LNKTYPE) + END, "is a link, pipe or device"),
        (PADDED + header("a.png", 0, tarfile.FIFOTYPE) + END, "is a link, pipe or device"),
        (PADDED + header("a.png", 0, tarfile.CHRTYPE) + END, "is a link, pipe or device"),
        (PADDED + negative("a.png") + END, "the archive is damaged"),
        (
            PADDED + header("b.json", 9).replace(b"b.json", b"c.json") + b"\0" * 512 + END,
            "damaged at byte 1,024",
        ),
        (PADDED + b"\0" * 512 + PADDED + END, "has more after its end"),
        (PADDED, "without an end mark"),
        (PADDED[:700], "damaged|completely"),
        (PADDED + header("b.json", 600) + b"x" * 100, "claims 600 bytes"),
        (b"no archive" * 100, "is not an uncompressed tar archive"),
    ],
)
def test_archives_that_claim_what_they_do_not_hold(tmp_path, content, reason):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(FileError, match=rf"a.tar: .*({reason})") as caught:
        Rows([str(tmp_path / "a.tar")])
    assert len(str(caught.value)) < 400
    if (
        reason not in ("has more after its end", "without an end mark")
        and "completely" not in reason
    ):
        with pytest.raises(RowError, match="its part of the tar archive: "):
            decode_tar(content)


def test_samples_have_limits(tmp_path, monkeypatch):
    twice = (
        PADDED
        + header("a.png", 1)
        + b"x".ljust(512, b"\0")
        + header("a.png", 1)
        + b"y".ljust(512, b"\0")
    )
    with pytest.raises(RowError, match="two files 'a.png'"):
        decode_tar(twice)
    monkeypatch.setattr(rows, "MAX_MEMBERS", 3)
    with pytest.raises(RowError, match="more than 3 files"):
        decode_tar(PADDED + b"".join(header(f"a.{n}.png", 0) for n in range(5)))
    monkeypatch.setattr(row_scan, "MAX_ROW", 10)
    monkeypatch.setattr(tars, "MAX_HEADER", 10)
    (tmp_path / "a.tar").write_bytes(PADDED + END)
    with pytest.raises(FileError, match="at most"):
        Rows([str(tmp_path / "a.tar")])


def test_good_archives_of_every_format(tmp_path):
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        long = "d" * 90 + "/" + "e" * 60
        with tarfile.open(tmp_path / f"{kind}.tar", "w", format=kind) as archive:
            directory = tarfile.TarInfo("folder/")
            directory.type = tarfile.DIRTYPE
            archive.addfile(directory)
            for name, content in (
                (f"{long}.json", ROW),
                (f"{long}.png", encoded(make_image())),
                ("b.json", ROW),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        found = Rows([str(tmp_path / f"{kind}.tar")])
        assert len(found) == 2 and list(found[0][1]) == [f"{long}.png"] and found[1] == (TEXT, {})


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [
        "x{0..99999999999}.jsonl",
        "x{0..99}{0..99}{0..99}{0..99}{0..99}{0..99}",
        "{a,b}" * 40,
        "{9..0}.jsonl",
        "{0..%s}" % ("9" * 5000),
    ],
    ids=lambda text: text[:20],
)
def test_braces_are_counted_before_they_are_expanded(tmp_path, pattern):
    began = time.monotonic()
    with pytest.raises(MetaError, match="entry 'a': annotation: ") as caught:
        read_meta(write_meta(tmp_path, a={"annotation": pattern}))
    assert time.monotonic() - began < 1 and len(str(caught.value)) < 400 + len(str(tmp_path)) + (
        len(pattern) if len(pattern) > 1000 else 0
    )


def test_braces_stars_and_brackets_in_names(tmp_path):
    folder = tmp_path / "data [v2] {x} ~ 100%"
    folder.mkdir()
    for name in ("a1.jsonl", "a2.jsonl", "a10.jsonl", "{b,c}.jsonl"):
        write_rows(folder / name, [TEXT])
    (folder / "a1.jsonl.index.npy").write_bytes(b"")

    def found(pattern):
        return [
            os.path.basename(path)
            for path in read_meta(write_meta(folder, a={"annotation": pattern}))[0].annotation
        ]

    assert found("a*") == ["a1.jsonl", "a2.jsonl", "a10.jsonl"] and found("a{1..2}.jsonl") == [
        "a1.jsonl",
        "a2.jsonl",
    ]
    assert found("{b,c}.jsonl") == ["{b,c}.jsonl"] and found(["a10.jsonl", "a1.jsonl"]) == [
        "a10.jsonl",
        "a1.jsonl",
    ]
    # a missing file is an error wherever it stands
    for pattern in ("a{2..3}.jsonl", "a{0..1}.jsonl"):
        with pytest.raises(MetaError, match=r"a[03].jsonl is missing"):
            found(pattern)
    assert files.expand(str(folder / "a?.jsonl")) == []


@pytest.mark.parametrize(
    "name", ["", " ", "a\tb", "a\nb", "\x1b[2Jx", "#a", "x" * 300, "\udce9", "a\u202eb"]
)
def test_names_that_no_table_and_no_list_can_hold(tmp_path, name):
    write_rows(tmp_path / "a.jsonl", [TEXT])
    (tmp_path / "meta.json").write_text(json.dumps({name: {"root": "", "annotation": "a.jsonl"}}))
    with pytest.raises(MetaError, match="a name must have") as caught:
        read_meta(str(tmp_path / "meta.json"))
    assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)


# --- lists and tables ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"a\t\xff", "line 2 is not UTF-8"),
        ("a\t\u00b2\tx".encode(), "line 2: a has no row"),
        (b"a\t-1\tx", "line 2: a has no row '-1'"),
        (b"b\t1", "line 2: there is no source 'b'"),
        (b"a\t4", "line 2: a has no row '4'; it has 4"),
        (b"a\t" + b"9" * 5000, "line 2: a has no row"),
        (b"only", "line 2: only has no row ''"),
    ],
)
def test_drop_lists_name_the_line(tmp_path, line, reason):
    (tmp_path / "drop.tsv").write_bytes(b"a\t1\twhy\x0b\xc2\x85not\n" + line + b"\n")
    with pytest.raises(ValueError, match=f"drop.tsv:? {re.escape(reason)}") as caught:
        read_drop_list(str(tmp_path / "drop.tsv"), ["a"], [4])
    assert len(str(caught.value)) < 400
    (tmp_path / "drop.tsv").write_bytes(b"\xef\xbb\xbf# x\r\na\t1\twhy\r\n\r\n")
    assert read_drop_list(str(tmp_path / "drop.tsv"), ["a"], [4]) == {0: {1}}


def test_tables_of_the_reference_name_the_line(tmp_path):
    path = tmp_path / "reference.jsonl"
    lines = [
        '{"reference": "runs/a", "hash": "1", "dtype": "float32"}',
        '{"key": "00ff", "chosen": -1.5, "rejected": -2}',
    ]
    path.write_text("\n".join(lines) + "\n")
    table = ReferenceTable(str(path))
    assert (
        table.keys.tolist() == [255]
        and table.values.tolist() == [[-1.5, -2.0]]
        and table.identity.startswith("sha256 ")
    )
    for wrong, reason in [
        ("", "line 3: is not JSON"),
        ('{"key": "x", "chosen": 1, "rejected": 1}', "line 3: key is 'x'"),
        ('{"key": "1", "chosen": NaN, "rejected": 1}', "line 3: chosen: NaN"),
        ('{"key": "1", "chosen": 1e300, "rejected": 1}', "line 3: chosen is 1e+300"),
        ('{"key": "1", "chosen": "1", "rejected": 1}', "line 3: chosen is the text '1'"),
        ('{"key": "1", "cho', "line 3: is not JSON"),
    ]:
        path.write_text("\n".join([*lines, wrong, lines[1]]))
        with pytest.raises(ReferenceError, match=re.escape(reason)):
            ReferenceTable(str(path))
    path.write_text("")
    with pytest.raises(ReferenceError, match="reference.jsonl line 1: is not JSON"):
        ReferenceTable(str(path))
