"""Annotation files that were changed, damaged or made to do harm: each is read as it is now, or
refused in one line, within limits.
"""

import io
import json
import os
import pickle
import re
import resource
import tarfile
import time

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from internvl3_jax.data.reference_table import ReferenceError, ReferenceTable
from internvl3_jax.data.sources import files, row_index, row_scan, rows, tars
from internvl3_jax.data.sources.catalog import open_sources
from internvl3_jax.data.sources.files import ChangedError, FileError
from internvl3_jax.data.sources.meta import MetaError, read_meta, read_sources
from internvl3_jax.data.sources.mixture import read_drop_list
from internvl3_jax.data.sources.row_source import RowSource
from internvl3_jax.data.sources.rows import RowError, Rows, decode_tar
from tests.support.official_data import (
    data_config,
    encoded,
    picture,
    turns,
    write_meta,
    write_rows,
    write_tar,
)

pytestmark = pytest.mark.smoke
TEXT = {"conversations": turns("hi", "ho")}


@pytest.fixture(autouse=True)
def bounded_memory():
    """What is claimed must not be allocated."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def rewrite(path, content: bytes, stamp) -> None:
    """New content under the old time stamp."""
    path.write_bytes(content)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


# --- change --------------------------------------------------------------------------------------


@pytest.mark.parametrize("settled", [0, row_index.SETTLED])
def test_a_file_of_the_same_size_and_time_stamp_is_noticed(tmp_path, monkeypatch, settled):
    monkeypatch.setattr(row_index, "SETTLED", settled)
    path = write_rows(tmp_path / "a.jsonl", [{"n": 1}, {"n": 22}])
    before = Rows([str(path)])
    stamp = path.stat()
    time.sleep(0.02)  # the clock of the file system is coarse
    rewrite(path, b'{"n": 11}\n{"n": 2}\n', stamp)
    assert path.stat().st_size == stamp.st_size and path.stat().st_mtime_ns == stamp.st_mtime_ns
    with pytest.raises(
        ChangedError, match=r"a.jsonl: row 1 is not where its index says: the file was changed"
    ):
        before[1]
    after = Rows([str(path)])
    assert [after[row][0]["n"] for row in range(2)] == [11, 2] and after.identity != before.identity
    with pytest.raises(ChangedError, match="was changed while in use"):
        pickle.loads(pickle.dumps(before))[0]


def test_a_file_that_grows_while_in_use_is_noticed(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"n": 1}, {"n": 2}])
    before = Rows([str(path)])
    copy = pickle.loads(pickle.dumps(before))
    assert copy[1][0] == {"n": 2}
    write_rows(path, [{"n": 1}, {"n": 2}, {"n": 3}])
    for found in (before, copy):
        with pytest.raises(ChangedError, match=r"a.jsonl: was changed while in use; start again"):
            found[0]


def test_identity_is_of_rows_and_their_order(tmp_path):
    def identity(*contents):
        paths = []
        for number, content in enumerate(contents):
            paths.append(str(write_rows(tmp_path / f"{time.time_ns()}_{number}.jsonl", content)))
        return Rows(paths).identity

    one, other = [{"n": 1}, {"n": 2}], [{"n": 3}]
    assert identity(one, other) == identity(one, other) and identity(one).startswith(
        "2 rows, sha256 "
    )
    different = [
        identity(one, other),
        identity(other, one),
        identity(one),
        identity(one[::-1]),
        identity(one + other),
    ]
    assert len(set(different)) == 5
    archives = []
    for content in (b"one", b"two"):
        row = json.dumps(TEXT).encode()
        archives.append(
            Rows(
                [
                    str(
                        write_tar(
                            tmp_path / f"{content}.tar", {"a.json": row, f"a.{content}": content}
                        )
                    )
                ]
            ).identity
        )
    assert archives[0] != archives[1]
    records = []
    for number in range(2):
        writer = ArrayRecordWriter(str(tmp_path / f"{number}.array_record"), "group_size:1")
        writer.write(json.dumps({"n": number}).encode())
        writer.close()
        records.append(Rows([str(tmp_path / f"{number}.array_record")]))
    assert records[0].identity != records[1].identity and not records[0].has_images


def test_identity_of_sources(tmp_path):
    def identity(**entry):
        return RowSource(
            read_meta(write_meta(tmp_path, a={"rows": [TEXT] * 4} | entry))[0]
        ).identity

    plain = identity()
    assert plain == identity(length=4) == identity(data_augment=False)
    changed = [
        identity(data_augment=True),
        identity(repeat_time=2),
        identity(max_dynamic_patch=3),
        identity(root=""),
    ]
    assert len({plain, *changed}) == 5
    source = "examples.tiny_digits.recipe.data:sources"
    digits = [
        open_sources(data_config(source, samples=n, seed=seed))[0].identity
        for n, seed in ((4, 0), (5, 0), (4, 1))
    ]
    assert len(set(digits)) == 3


# --- JSONL ---------------------------------------------------------------------------------------


def test_lines_as_other_programs_write_them(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"t": "a\u2028b"}\r\n{"t": "c\u0085d"}\r\n\r\n{"t": "e"}'.encode())
    found = Rows([str(path)])
    assert len(found) == 4 and [found[row][0]["t"] for row in (0, 1, 3)] == [
        "a\u2028b",
        "c\u0085d",
        "e",
    ]
    for content, reason in [
        (b"  \n", "the line is empty"),
        (b'{"t": "\xff"}\n', "byte 7 is not UTF-8"),
        (b'{"t": NaN}\n', "t: NaN"),
        (b'{"t": 1, "t": 2}\n', "occurs twice"),
        (b"\0\0\n", "is not JSON"),
        (b'{"t": "half', "was it written or downloaded completely?"),
        (b'{"t":' * 100_000 + b"\n", "nested more than"),
        (b"9" * 5000 + b"\n", "5,000 digits"),
    ]:
        path.write_bytes(
            b'{"t": 1}\n' + content + (b'{"t": 1}\n' if content.endswith(b"\n") else b"")
        )
        with pytest.raises(RowError, match=re.escape(reason)) as caught:
            Rows([str(path)])[1]
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"a": 1}\n'.encode("utf-16"), "UTF-16"),
        ('{"a": 1}\n'.encode("utf-16-le"), "UTF-16"),
        ('{"a": 1}\n'.encode("utf-32"), "UTF-16 or UTF-32"),
        (b"version https://git-lfs.github.com/spec/v1\noid x\n", "git lfs pull"),
        (b'[{"a": 1},\n{"a": 2}]\n', r"jq -c '\.\[\]'"),
        (b"\x1f\x8b\x08\0\0\0", "is compressed; unpack it"),
        (b"\0" * 100, "binary"),
    ],
)
def test_files_that_hold_no_lines_of_json(tmp_path, content, reason):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(FileError, match=f"a.jsonl: .*{reason}"):
        Rows([str(tmp_path / "a.jsonl")])


def test_other_kinds_of_files_say_what_to_do(tmp_path):
    for name, reason in [("a.jsonl.gz", "unpack it"), ("a.parquet", "annotations are")]:
        (tmp_path / name).touch()
        with pytest.raises(FileError, match=reason):
            Rows([str(tmp_path / name)])
    path = tmp_path / "rows.json"
    for text, reason in [
        (json.dumps(TEXT, indent=1), "is a single row, not a meta JSON; write rows as a list"),
        ('{"root": ".", "annotation": "rows.jsonl"}', "one entry without a name"),
        ("7", "is the number 7; expected an object with a name and settings"),
    ]:
        path.write_text(text)
        with pytest.raises(MetaError, match=reason):
            read_sources(str(path))


def test_a_row_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(row_scan, "MAX_ROW", 100)
    monkeypatch.setattr(rows, "MAX_ROW", 100)
    monkeypatch.setattr(row_scan, "CHUNK", 64)
    found = Rows(
        [str(write_rows(tmp_path / "a.jsonl", [{"n": 1}, {"n": "x" * 1000}, {"image": "a.png"}]))]
    )
    assert len(found) == 3 and found.has_images and found[2][0] == {"image": "a.png"}
    with pytest.raises(RowError, match=r"has 1,0.. bytes; at most 100 are read"):
        found[1]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.tar", "a.array_record", "meta.json", "drop.tsv", "reference.jsonl"]
)
def test_pipes_devices_and_folders_are_refused(tmp_path, name):
    read = {
        "meta.json": read_meta,
        "drop.tsv": lambda path: read_drop_list(path, ["a"], [1]),
        "reference.jsonl": ReferenceTable,
    }
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)):
        path = tmp_path / make.__name__
        path.mkdir()
        make(path / name)
        with pytest.raises(ValueError, match=rf"{name}: is (not a regular file|a directory)"):
            read.get(name, lambda path: Rows([path]))(str(path / name))


# --- index ---------------------------------------------------------------------------------------


def test_a_damaged_index_is_built_again_or_named(tmp_path, monkeypatch):
    monkeypatch.setattr(row_index, "SETTLED", -1)
    path = write_rows(tmp_path / "a.jsonl", [{"n": number} for number in range(5)])
    place = tmp_path / "a.jsonl.index.npy"
    Rows([str(path)])
    good = place.read_bytes()
    bomb = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        bomb, {"descr": "<i8", "fortran_order": False, "shape": (1 << 61,)}
    )
    pickled = io.BytesIO()
    np.save(pickled, np.array([{"n": 1}], object), allow_pickle=True)
    for content in (
        b"",
        b"\x93NUMPY",
        good[:90],
        good + b"\0" * 8,
        bomb.getvalue(),
        pickled.getvalue(),
        b"PK\3\4" + good,
        b"\0" * 4096,
    ):
        place.write_bytes(content)
        assert [Rows([str(path)])[row][0]["n"] for row in range(5)] == list(range(5))
        assert place.read_bytes()[-48:] == good[-48:]
    place.unlink()
    os.mkfifo(place)
    assert len(Rows([str(path)])) == 5
    for row, wrong in ((2, 1), (2, 1 << 60), (3, -5)):  # a flipped bit among the offsets
        values = np.frombuffer(good[-8 * 6 :], np.int64).copy()
        values[row] = wrong
        place.write_bytes(good[: -8 * 6] + values.tobytes())
        with pytest.raises(
            ChangedError, match=r"the index is damaged; delete .*a.jsonl.index.npy and start again"
        ):
            [Rows([str(path)])[number] for number in range(5)]


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
        (PADDED + b"\0" * 512 + PADDED + END, "has more behind its end"),
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
        reason not in ("has more behind its end", "without an end mark")
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
                (f"{long}.png", encoded(picture())),
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
