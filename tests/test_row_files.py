"""Annotation files that were changed, damaged or made to do harm: each is read as it is now, or
refused in one line, within limits.
"""

import io
import json
import os
import pickle
import re
import time

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from internvl3_jax.data.reference_table import ReferenceTable
from internvl3_jax.data.sources import row_index, row_scan, rows
from internvl3_jax.data.sources.catalog import open_sources
from internvl3_jax.data.sources.files import ChangedError, FileError
from internvl3_jax.data.sources.meta import MetaError, read_meta, read_sources
from internvl3_jax.data.sources.mixture import read_drop_list
from internvl3_jax.data.sources.row_source import RowSource
from internvl3_jax.data.sources.rows import RowError, Rows
from tests.support.official_data import data_config, turns, write_meta, write_rows, write_tar

pytestmark = [pytest.mark.smoke, pytest.mark.usefixtures("bounded_memory")]
TEXT = {"conversations": turns("hi", "ho")}


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
