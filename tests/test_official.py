"""Meta JSON and annotation files in every form, and each kind of bad entry, row and file named."""

import json
import os
import re

import fsspec
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from internvl3_jax.config import ProcessorConfig
from internvl3_jax.data.media.video import middle_frames
from internvl3_jax.data.sources import files, row_index, row_scan
from internvl3_jax.data.sources.catalog import open_sources
from internvl3_jax.data.sources.files import FileError
from internvl3_jax.data.sources.meta import MetaError, read_meta
from internvl3_jax.data.sources.row_source import RowSource, insert_frames
from internvl3_jax.data.sources.rows import RowError, Rows
from tests.support.official_data import (
    PROCESSOR,
    data_config,
    encoded,
    picture,
    turns,
    write_meta,
    write_rows,
    write_tar,
)

TEXT = {"conversations": turns("hi", "ho")}


def read(source, row=0):
    return source.conversation(
        row, lambda clip: lambda footage: middle_frames(footage, 2, clip), PROCESSOR
    )


def one_source(folder, rows, **entry):
    return RowSource(read_meta(write_meta(folder, a={"rows": rows} | entry))[0])


# --- rows ----------------------------------------------------------------------------------------


def test_rows_of_every_kind(tmp_path):
    for number in range(3):
        picture(20 + number, 20).save(tmp_path / f"{number}.png")
    (tmp_path / "frames").mkdir()
    for number in range(4):
        picture(seed=number).save(tmp_path / "frames" / f"{number}.jpg")
    rows = [
        {
            "id": 7,
            "conversations": turns("hi", "<image> here is text", "and?", "so", system="Be brief."),
        },
        {
            "image": "0.png",
            "width": 20,
            "conversations": turns("What?", "That <ref>x</ref><box>[[1, 2, 3, 4]]</box>"),
        },
        {"image": "1.png", "conversations": turns("hi", "ho", "<image>\nWhat?", "That")},
        {
            "image": ["0.png", str(tmp_path / "2.png")],
            "conversations": turns("Image-1: <image>\nImage-2: <image>\nWhich?", "2"),
        },
        {"image": [], "video": None, "conversations": turns("hi", "ho")},
        {"video": "frames", "conversations": turns("What <video>\nmoves?", "That")},
        {"video": "frames/", "conversations": turns("What moves?", "That")},
    ]
    source = one_source(tmp_path, rows, data_augment=True, max_dynamic_patch=8)
    found = [read(source, row) for row in range(len(rows))]
    users = [next(m["content"] for m in c.messages if m["role"] == "user") for c in found]
    assert (
        users[:3] == ["hi", "<image>\nWhat?", "hi"]
        and users[3] == "Image-1: <image>\nImage-2: <image>\nWhich?"
    )
    assert users[5] == "What Frame-1: <image>\nFrame-2: <image>\nmoves?"
    assert users[6] == "Frame-1: <image>\nFrame-2: <image>\nWhat moves?"
    assert [len(c.images) for c in found] == [0, 1, 1, 2, 0, 2, 2]
    assert [c.max_tiles for c in found] == [8, 8, 8, 4, 8, 1, 1]
    assert (
        found[0].messages[0] == {"role": "system", "content": "Be brief."}
        and found[0].id == "7"
        and found[1].id is None
    )
    assert all(c.augment for c in found) and source.has_images and found[5].is_video


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "is not JSON"),
        ("", "the line is empty"),
        ("[1]", "is the list [1]; expected an object"),
        ({"id": 1}, "conversations is None; expected a list of turns"),
        (
            {"conversations": [{"from": "human", "text": "hi"}]},
            'expected {"from": ..., "value": ...}',
        ),
        ({"conversations": [{"from": "robot", "value": "hi"}]}, "turn 1 is from 'robot'"),
        (
            {"conversations": [{"from": "human", "value": 3}]},
            "turn 1: its value is not a text but the number 3",
        ),
        ({"image": "gone.png", **TEXT}, "gone.png: no such file"),
        ({"image": 5, **TEXT}, "image is 5; expected a path"),
        ({"image": "a.png", "video": "b.mp4", **TEXT}, "both image and video"),
        ({"video": ["a.png"], **TEXT}, "expected the path of a file or of a folder"),
        ({"video": "gone.mp4", **TEXT}, "gone.mp4: no such file"),
        ({"video": ".", "conversations": turns("<video><video>", "x")}, "2 <video> tags"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_rows_say_what_is_wrong(tmp_path, row, reason):
    picture().save(tmp_path / "0.png")
    source = one_source(tmp_path, [TEXT, row, TEXT])
    with pytest.raises(ValueError, match=re.escape(reason)):
        read(source, 1)
    assert source.locate(1) == "a row 1 (a.jsonl line 2)"
    assert read(source, 2).messages[1]["content"] == "ho"


def test_a_video_tag_belongs_to_the_first_human_turn():
    messages = [{"role": "user", "content": "hi"}, {"role": "user", "content": "<video>"}]
    with pytest.raises(RowError, match="first human turn"):
        insert_frames(messages, 2, "Frame-{}: ")


def test_a_frame_label_is_text_but_for_its_number():
    messages = [{"role": "user", "content": "<video>What?"}, {"role": "assistant", "content": "A"}]
    labelled = insert_frames(messages, 2, "{0} %s {a} {}} ")
    assert labelled[0]["content"] == "{0} %s {a} 1} <image>\n{0} %s {a} 2} <image>\nWhat?"
    for label in ("Frame: ", "{}-{}: ", "{0}: ", "Frame-{}<image>: "):
        with pytest.raises(ValueError, match="processor.frame_label is .*must have {} once"):
            ProcessorConfig(frame_label=label)


# --- annotation files ----------------------------------------------------------------------------


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


def test_tar_shards_bring_their_pictures(tmp_path):
    image = encoded(picture())
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
    np.testing.assert_array_equal(np.asarray(read(source, 4).images[0]), np.asarray(picture()))
    with pytest.raises(RowError, match=r"2.txt hold 0 .json"):
        read(source, 5)
    (tmp_path / "02.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(FileError, match=r"02.tar: is not an uncompressed tar archive"):
        Rows([str(tmp_path / "02.tar")])


def test_array_record(tmp_path):
    writer = ArrayRecordWriter(str(tmp_path / "a.array_record"), "")
    writer.write(json.dumps(TEXT).encode())
    archive = write_tar(
        tmp_path / "one", {"k.json": json.dumps(TEXT).encode(), "k.png": encoded(picture())}
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
        {"/data/rows/a.jsonl": json.dumps(row).encode(), "/data/images/0.png": encoded(picture())}
    )
    memory.pipe({"/data/meta.json": json.dumps({"a": entry}).encode()})
    source = RowSource(read_meta("memory://data/meta.json")[0])
    assert len(read(source).images) == 1 and len(list(tmp_path.iterdir())) == 1
    memory.rm("/data/images/0.png")
    with pytest.raises(FileError, match=r"memory://data/images/0.png: no such file"):
        read(source)
    with pytest.raises(FileError, match="abfs://bucket: needs the driver of its scheme"):
        files.read_bytes("abfs://bucket/a.jsonl")


# --- meta JSON -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"repeat_tme": 2}, "unknown key 'repeat_tme' = 2; did you mean 'repeat_time'?"),
        ({"repeat_time": 0}, "repeat_time is 0; expected a number above 0"),
        ({"repeat_time": True}, "repeat_time is the truth value True; expected a number"),
        ({"repeat_time": 1e300}, "repeat_time is 1e+300; expected at most 1000000"),
        ({"weight": -1}, "weight is -1; expected from 0"),
        ({"allow_outside_root": 1}, "allow_outside_root is the number 1; expected true or false"),
        ({"data_augment": "yes"}, "data_augment is the text 'yes'; expected true or false"),
        (
            {"max_dynamic_patch": 1.5},
            "max_dynamic_patch is the number 1.5; expected a whole number",
        ),
        ({"root": None}, "root is missing"),
        ({"annotation": "gone.jsonl"}, "annotation: no such file"),
        ({"annotation": []}, "annotation is []"),
        ({"annotation": "{a,gone}.jsonl"}, "gone.jsonl is missing"),
    ],
    ids=str,
)
def test_bad_entries_are_named(tmp_path, entry, reason):
    meta = write_meta(tmp_path, a={"rows": [TEXT]} | entry) if "annotation" not in entry else None
    if meta is None:
        write_rows(tmp_path / "a.jsonl", [TEXT])
        meta = write_meta(tmp_path, a=entry)
    with pytest.raises(MetaError, match=r"meta.json, entry 'a': .*" + re.escape(reason)):
        read_meta(meta)


def test_bad_meta_files(tmp_path):
    path = tmp_path / "meta.json"
    for content, reason in [
        ("{", "is not JSON"),
        ("{}", "expected an object"),
        ('{"a": {}, "a": {}}', "the key 'a' occurs twice"),
    ]:
        path.write_text(content)
        with pytest.raises(MetaError, match=reason):
            read_meta(str(path))
    with pytest.raises(
        MetaError, match=r"data.source: letters: .*file of rows, or MODULE:FUNCTION"
    ):
        read_meta("letters")


def test_roots_matter_only_for_pictures(tmp_path):
    assert len(one_source(tmp_path, [TEXT], root="gone")) == 1
    with pytest.raises(MetaError, match="entry 'a': root: no such file"):
        one_source(tmp_path, [{"image": "a.png", **TEXT}], root="gone")
    with pytest.raises(MetaError, match="has no rows"):
        one_source(tmp_path, [])
    with pytest.raises(MetaError, match="has no rows"):
        (tmp_path / "a.json").write_text("[]")
        RowSource(read_meta(write_meta(tmp_path, a={"annotation": "a.json"}))[0])


def test_paths_are_relative_to_the_meta_file(tmp_path, monkeypatch):
    (tmp_path / "metas").mkdir()
    monkeypatch.chdir(tmp_path)
    # never read: the one beside the meta file is meant
    write_rows(tmp_path / "a.jsonl", [TEXT, TEXT])
    picture(20, 20).save(tmp_path / "metas/a.png")
    row = {"image": "a.png", **TEXT}
    for root in (".", "", "./", "../metas", str(tmp_path / "metas")):
        source = one_source(tmp_path / "metas", [row], root=root)
        assert source.spec.annotation == (str(tmp_path / "metas/a.jsonl"),)
        assert len(source) == len(read(source).images) == 1
    for entry in (
        {"annotation": "here.jsonl"},
        {"annotation": "her*.jsonl"},
        {"rows": [row], "root": "pictures"},
    ):
        write_rows(tmp_path / "here.jsonl", [TEXT])
        (tmp_path / "pictures").mkdir(exist_ok=True)
        with pytest.raises(
            MetaError, match="in the working directory, but paths are relative to the meta file"
        ):
            RowSource(read_meta(write_meta(tmp_path / "metas", b=entry))[0])


def test_a_length_that_disagrees_is_told(tmp_path):
    meta = write_meta(
        tmp_path, a={"rows": [TEXT] * 3, "length": 3}, b={"rows": [TEXT] * 3, "length": 5}
    )
    with pytest.warns(
        UserWarning, match=r"entry 'b': length is 5, but the annotation has 3 rows"
    ) as caught:
        open_sources(data_config(meta))
    assert len(caught) == 1
