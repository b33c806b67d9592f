"""Meta JSON and rows in every form, and each kind of bad entry and row named."""

import re

import pytest

from internvl3_jax.config import ProcessorConfig
from internvl3_jax.data.sources.catalog import open_sources
from internvl3_jax.data.sources.meta import MetaError, read_meta
from internvl3_jax.data.sources.row_source import RowSource, insert_frames
from internvl3_jax.data.sources.rows import RowError
from tests.support.official_data import (
    data_config,
    make_image,
    one_source,
    read,
    turns,
    write_meta,
    write_rows,
)

TEXT = {"conversations": turns("hi", "ho")}


# --- rows ----------------------------------------------------------------------------------------


def test_rows_of_every_kind(tmp_path):
    for number in range(3):
        make_image(20 + number, 20).save(tmp_path / f"{number}.png")
    (tmp_path / "frames").mkdir()
    for number in range(4):
        make_image(seed=number).save(tmp_path / "frames" / f"{number}.jpg")
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
    make_image().save(tmp_path / "0.png")
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
    labeled = insert_frames(messages, 2, "{0} %s {a} {}} ")
    assert labeled[0]["content"] == "{0} %s {a} 1} <image>\n{0} %s {a} 2} <image>\nWhat?"
    for label in ("Frame: ", "{}-{}: ", "{0}: ", "Frame-{}<image>: "):
        with pytest.raises(ValueError, match="processor.frame_label is .*must have {} once"):
            ProcessorConfig(frame_label=label)


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


def test_roots_matter_only_for_images(tmp_path):
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
    make_image(20, 20).save(tmp_path / "metas/a.png")
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


def test_a_length_that_disagrees_is_a_warning(tmp_path):
    meta = write_meta(
        tmp_path, a={"rows": [TEXT] * 3, "length": 3}, b={"rows": [TEXT] * 3, "length": 5}
    )
    with pytest.warns(
        UserWarning, match=r"entry 'b': length is 5, but the annotation has 3 rows"
    ) as caught:
        open_sources(data_config(meta))
    assert len(caught) == 1
