"""Annotation files of every kind are read by row, their index follows them, and what is wrong is
named.
"""

import json
import os

import fsspec
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from internvl3_jax.data.sources import files, row_index, row_scan
from internvl3_jax.data.sources.files import FileError
from internvl3_jax.data.sources.meta import read_meta
from internvl3_jax.data.sources.row_source import RowSource
from internvl3_jax.data.sources.rows import RowError, Rows
from tests.support.official_data import (
    encoded,
    make_image,
    read,
    turns,
    write_meta,
    write_rows,
    write_tar,
)

TEXT = {"conversations": turns("hi", "ho")}


def test_the_index_follows_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(row_index, "SETTLED", -1)
    path = write_rows(tmp_path / "a.jsonl", [{"n": number} for number in range(5)])
    assert [Rows([str(path)])[row][0]["n"] for row in range(5)] == list(range(5))
    place = tmp_path / "a.jsonl.index.npy"
    first = place.stat().st_mtime_ns, place.stat().st_ino
    assert len(Rows([str(path)])) == 5 and (place.stat().st_mtime_ns, place.stat().st_ino) == first
    write_rows(path, [{"n": 10 + number} for number in range(7)])
    assert [row["n"] for row, _ in map(Rows([str(path)]).__getitem__, range(7))] == list(
        range(10, 17)
    )
    os.utime(path, ns=(1, 1))  # same size, another time
    assert len(Rows([str(path)])) == 7 and np.load(place)[2] == 1
    place.write_bytes(place.read_bytes()[:70])  # cut short
    assert len(Rows([str(path)])) == 7
    assert [name.name for name in tmp_path.iterdir() if name.name.startswith(".")] == []


@pytest.mark.parametrize("ending", ["", "\n", "\n\n  \n"], ids=repr)
@pytest.mark.parametrize("chunk", [7, 1 << 24])
def test_lines_whatever_their_length_and_end(tmp_path, monkeypatch, ending, chunk):
    monkeypatch.setattr(row_scan, "CHUNK", chunk)
    texts = ["x" * length for length in (0, 1, 5, 40, 2)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts) + ending)
    rows = Rows([str(path)])
    assert [rows[row][0]["text"] for row in range(len(rows))] == texts
    assert not rows.has_images


@pytest.mark.parametrize("chunk", [7, 1 << 24])
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"image": "a"}, True),
        ({"video": "a"}, True),
        ({"image": []}, False),
        ({"a": {"image": "x"}}, False),
        ('{"image": "x', False),
    ],
    ids=str,
)
def test_whether_a_source_has_images(tmp_path, monkeypatch, row, expected, chunk):
    monkeypatch.setattr(row_scan, "CHUNK", chunk)
    filler = {"conversations": turns('say "image"', '"video"')}
    assert (
        Rows([str(write_rows(tmp_path / "a.jsonl", [filler, row, filler]))]).has_images == expected
    )
    assert (
        Rows([str(write_rows(tmp_path / "b.jsonl", [filler, filler, row]))]).has_images == expected
    )


def test_an_index_in_the_cache_when_the_folder_cannot_be_written(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "a.jsonl", [TEXT])
    monkeypatch.setenv("INTERNVL3_JAX_CACHE", str(tmp_path / "cache"))
    write = row_index._write

    def refuse(path, place, *rest):
        if place.parent == tmp_path:
            raise PermissionError
        return write(path, place, *rest)

    monkeypatch.setattr(row_index, "_write", refuse)
    assert len(Rows([str(path)])) == 1
    assert (
        len(list((tmp_path / "cache").iterdir())) == 1
        and not (tmp_path / "a.jsonl.index.npy").exists()
    )


def test_tar_shards_bring_their_images(tmp_path):
    image = encoded(make_image())
    for shard in range(2):
        named = {"image": ["x/0.b.png"], "conversations": turns("What?", f"{shard}")}
        content = {
            "x/0.json": json.dumps(named).encode(),
            "x/0.a.png": b"not read",
            "x/0.b.png": image,
            "1.png": image,
            "1.json": json.dumps({"conversations": turns("<image>", f"{shard} again")}).encode(),
            "2.txt": b"lost",
        }
        write_tar(tmp_path / f"{shard:02}.tar", content)
    meta = write_meta(tmp_path, a={"annotation": "{00..01}.tar", "root": ""})
    source = RowSource(read_meta(meta)[0])
    assert len(source) == 6 and source.has_images
    answers = [read(source, row).messages[1]["content"] for row in (0, 1, 3, 4)]
    assert answers == ["0", "0 again", "1", "1 again"]
    np.testing.assert_array_equal(np.asarray(read(source, 4).images[0]), np.asarray(make_image()))
    with pytest.raises(RowError, match=r"2.txt hold 0 .json"):
        read(source, 5)
    (tmp_path / "02.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(FileError, match=r"02.tar: is not an uncompressed tar archive"):
        Rows([str(tmp_path / "02.tar")])


def test_array_record(tmp_path):
    writer = ArrayRecordWriter(str(tmp_path / "a.array_record"), "")
    writer.write(json.dumps(TEXT).encode())
    archive = write_tar(
        tmp_path / "one", {"k.json": json.dumps(TEXT).encode(), "k.png": encoded(make_image())}
    )
    writer.write(archive.read_bytes())
    writer.close()
    source = RowSource(read_meta(write_meta(tmp_path, a={"annotation": "a.array_record"}))[0])
    assert len(source) == 2 and source.has_images
    assert [len(read(source, row).images) for row in range(2)] == [0, 1]


def test_addresses_go_through_fsspec(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL3_JAX_CACHE", str(tmp_path))
    memory = fsspec.filesystem("memory")
    row = {"image": "0.png", "conversations": turns("What?", "That")}
    entry = {"root": "memory://data/images", "annotation": "rows/*.jsonl"}
    memory.pipe(
        {
            "/data/rows/a.jsonl": json.dumps(row).encode(),
            "/data/images/0.png": encoded(make_image()),
        }
    )
    memory.pipe({"/data/meta.json": json.dumps({"a": entry}).encode()})
    source = RowSource(read_meta("memory://data/meta.json")[0])
    assert len(read(source).images) == 1 and len(list(tmp_path.iterdir())) == 1
    memory.rm("/data/images/0.png")
    with pytest.raises(FileError, match=r"memory://data/images/0.png: no such file"):
        read(source)
    with pytest.raises(FileError, match="abfs://bucket: needs the driver of its scheme"):
        files.read_bytes("abfs://bucket/a.jsonl")
