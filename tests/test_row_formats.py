"""Data as people have it: one conversation in every format is one sample, and files of rows serve
as data.source.
"""

import json
import re

import numpy as np
import pytest

from internvl3_jax.data.example import ExampleBuilder
from internvl3_jax.data.pipeline import sample_dataset, source_names
from internvl3_jax.data.sources.catalog import open_sources
from internvl3_jax.data.sources.meta import MetaError
from internvl3_jax.data.sources.row_turns import read_turns
from internvl3_jax.data.sources.rows import RowError
from tests.support.official_data import (
    PROCESSOR,
    data_config,
    encoded,
    make_image,
    tokenizer,
    turns,
    write_meta,
    write_rows,
    write_tar,
)

TEXT = {"conversations": turns("hi", "ho")}


def said(*contents, system=None):
    """Messages of user and assistant in turn."""
    messages = [
        {"role": ("user", "assistant")[number % 2], "content": content}
        for number, content in enumerate(contents)
    ]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def url(path):
    return {"type": "image_url", "image_url": {"url": path, "detail": "high"}}


def text(words):
    return {"type": "text", "text": words}


def sharegpt(names, *texts):
    return [{"from": names[n % 2], "value": words} for n, words in enumerate(texts)]


PEOPLE = ("user", "assistant")
FORMATS = {
    "one image": {
        "InternVL": {"image": "a.png", "conversations": turns("What?", "A cat.")},
        "LLaVA": {"id": "1", "image": "a.png", "conversations": turns("<image>\nWhat?", "A cat.")},
        "ShareGPT": {"images": ["a.png"], "conversations": turns("<image>\nWhat?", "A cat.")},
        "ShareGPT of user and assistant": {
            "images": ["a.png"],
            "conversations": sharegpt(PEOPLE, "<image>\nWhat?", "A cat."),
        },
        "ms-swift": {"images": ["a.png"], "messages": said("<image>\nWhat?", "A cat.")},
        "ms-swift with bytes and path": {
            "images": [{"path": "a.png", "bytes": None}],
            "messages": said("<image>\nWhat?", "A cat."),
        },
        "OpenAI": {"messages": said([url("a.png"), text("What?")], [text("A cat.")])},
        "short image_url": {
            "messages": said([{"type": "image_url", "image_url": "a.png"}, text("What?")], "A cat.")
        },
        "image part": {
            "messages": said([{"type": "image", "image": "a.png"}, text("What?")], "A cat.")
        },
        "path part": {
            "messages": said([{"type": "image", "path": "a.png"}, text("What?")], "A cat.")
        },
        "untyped parts": {"messages": said([{"image": "a.png"}, {"text": "What?"}], "A cat.")},
        "parts with nulls": {
            "messages": said(
                [
                    {"type": "image", "image": "a.png", "text": None},
                    {"type": "text", "text": "What?", "image": None},
                ],
                "A cat.",
            )
        },
        "part without a path": {
            "images": ["a.png"],
            "messages": said([{"type": "image"}, text("What?")], "A cat."),
        },
    },
    "two images and two turns": {
        "InternVL": {
            "image": ["a.png", "b.png"],
            "conversations": turns(
                "One:\n<image>\nWhat?", "A cat.", "<image>\nAnd this?", "A dog.", system="Be brief."
            ),
        },
        "ms-swift": {
            "images": ["a.png", "b.png"],
            "messages": said(
                "One:\n<image>\nWhat?", "A cat.", "<image>\nAnd this?", "A dog.", system="Be brief."
            ),
        },
        "system key": {
            "system": "Be brief.",
            "images": ["a.png", "b.png"],
            "conversations": turns(
                "One:\n<image>\nWhat?", "A cat.", "<image>\nAnd this?", "A dog."
            ),
        },
        "OpenAI": {
            "messages": said(
                [text("One:"), url("a.png"), text("What?")],
                "A cat.",
                [url("b.png"), text("And this?")],
                "A dog.",
                system=[text("Be brief.")],
            )
        },
    },
    "a video": {
        "InternVL": {"video": "frames", "conversations": turns("<video>\nWhat?", "A cat.")},
        "ms-swift": {"videos": ["frames"], "messages": said("<video>\nWhat?", "A cat.")},
        "part": {"messages": said([{"type": "video", "video": "frames"}, text("What?")], "A cat.")},
        "video_url": {
            "messages": said(
                [{"type": "video_url", "video_url": {"url": "frames"}}, text("What?")], "A cat."
            )
        },
    },
    "text": {
        "InternVL": {"conversations": turns("Write <image>.", "It is <image>.")},
        "OpenAI": {"messages": said("Write <image>.", "It is <image>.")},
        "parts": {"messages": said([text("Write <image>.")], [text("It is <image>.")])},
        "parts with nulls": {
            "messages": said([text("Write <image>.") | {"image": None}], "It is <image>.")
        },
    },
}


@pytest.fixture
def files(tmp_path):
    """Images beside the rows."""
    make_image(40, 20).save(tmp_path / "a.png")
    make_image(20, 60, seed=1).save(tmp_path / "b.png")
    (tmp_path / "frames").mkdir()
    for number in range(4):
        make_image(seed=number).save(tmp_path / "frames" / f"{number}.png")
    return tmp_path


def sample(source, row=0):
    config = data_config("", min_frames=2, max_frames=2, tokens_per_row=400)
    builder = ExampleBuilder(config, PROCESSOR, tokenizer())
    return builder.sample(source, row, np.random.default_rng(0))


@pytest.mark.parametrize("container", ["json", "jsonl", "json lines", "tar", "meta"])
@pytest.mark.parametrize("conversation", FORMATS)
def test_a_conversation_is_the_same_sample_in_every_format(files, conversation, container):
    rows = list(FORMATS[conversation].values())
    path = files / "rows.json"
    if container == "json":
        path.write_text(json.dumps(rows, indent=2))
    elif container == "tar":
        path = files / "rows.tar"
        media = {p.relative_to(files).as_posix(): p.read_bytes() for p in files.rglob("*.png")}
        if conversation == "a video":
            return  # in an archive it is one file
        write_tar(
            path,
            {
                name: content
                for number, row in enumerate(rows)
                for name, content in [
                    (f"{number}.json", json.dumps(_renamed(row, f"{number}.")).encode()),
                    *((f"{number}.{name}", media[name]) for name in ("a.png", "b.png")),
                ]
                if conversation != "text" or name.endswith(".json")
            },
        )
    else:
        path = write_rows(files / ("rows.json" if container == "json lines" else "r.jsonl"), rows)
    source = str(path)
    if container == "meta":
        source = write_meta(files, a={"annotation": path.name})
    (opened,) = open_sources(data_config(source))
    assert len(opened) == len(rows) and opened.has_images is (conversation != "text")
    wanted, *others = (sample(opened, row) for row in range(len(rows)))
    assert len(wanted["tiles"]) == {"one image": 3, "a video": 2, "text": 0}.get(conversation, 6)
    for other, name in zip(others, list(FORMATS[conversation])[1:], strict=True):
        assert other.keys() == wanted.keys()
        for key, value in wanted.items():
            np.testing.assert_array_equal(other[key], value, err_msg=f"{name}: {key}")


def _renamed(row, prefix):
    """The row with the names that its images have in an archive."""
    return json.loads(re.sub(r'"([ab]\.png)"', rf'"{prefix}\1"', json.dumps(row)))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([{"type": "audio", "audio": "a.wav"}], "part 1: type is 'audio'; expected text, image"),
        ([{"type": "input_text", "text": "a"}], "part 1: type is 'input_text'"),
        ([{"type": "image_ulr", "image_url": "a.png"}], "did you mean 'image_url'?"),
        ([{"type": ["text"], "text": "a"}], "part 1: type is ['text']"),
        ([text("a"), 5], "part 2: is 5; expected an object"),
        ([], "turn 1: its value is an empty list"),
        ([{"type": "image", "imgae": "a.png"}], "did you mean 'image'?"),
        ([{"type": "image", "image": "a.png", "path": "b.png"}], "expected one of the keys image"),
        ([{"type": "image_url", "image_url": {"uri": "a.png"}}], "expected a path"),
        ([{"type": "image_url"}], "expected a path"),
        ([{"type": "text"}], "its text is not a text but null"),
        ([{"type": "text", "text": ["a"]}], "its text is not a text but the list"),
        ([url("a.png"), text("<image> and <image>")], "has 1 parts with a path, but 3 <image>"),
        ([url("data:image/png;base64,AAAA")], "holds the data itself; save it as a file"),
        ([url("gone.png")], "gone.png: no such file"),
        ([{"type": "image"}], "has 1 image parts without a path and names 0 images"),
        ([{"type": "image"}, url("a.png")], "has 1 parts with a path, but 2 <image>"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_parts_are_named(files, content, reason):
    path = write_rows(files / "rows.jsonl", [{"messages": said(content, "b")}])
    with pytest.raises(ValueError, match=re.escape(reason)):
        sample(open_sources(data_config(str(path)))[0])


def test_images_belong_to_human_turns_and_are_named_once(files):
    with pytest.raises(RowError, match="turn 2, part 1: is .*only human turns have images"):
        read_turns({"messages": said("a", [url("a.png")])})
    row = {"images": ["b.png"], "messages": said([url("a.png")], "b")}
    path = write_rows(files / "rows.jsonl", [row])
    with pytest.raises(RowError, match="has both images and parts with a path"):
        sample(open_sources(data_config(str(path)))[0])


def test_a_system_text_of_a_pair_is_kept(files):
    row = {"system": "Be brief.", "question": "What?", "chosen": "b", "rejected": "c"}
    (source,) = open_sources(data_config(str(write_rows(files / "rows.jsonl", [row]))))
    conversation = source.conversation(0, lambda clip: None, PROCESSOR)
    assert [m["content"] for m in conversation.messages] == ["Be brief.", "What?", "b"]


# --- files of rows as data.source ----------------------------------------------------------------


def test_a_file_of_rows_is_a_source_of_its_name(files, monkeypatch):
    monkeypatch.chdir(files.parent)  # paths are relative to the file
    row = {"image": "a.png", **TEXT}
    for name, content in {
        "my.rows.jsonl": json.dumps(row),
        "list.json": json.dumps([row], indent=1),
        "lines.json": "\ufeff" + json.dumps(row) + "\n" + json.dumps(row) + "\n",
    }.items():
        (files / name).write_text(content, encoding="utf-8")
        config = data_config(str(files / name))
        (source,) = open_sources(config)
        assert source_names(config) == [source.name] == [name.partition(".")[0]]
        assert source.spec.root == str(files) and (source.repeat, source.weight) == (1.0, None)
        assert "error" not in sample_dataset(config, PROCESSOR, tokenizer())[0]
    for path, reason in [
        ("../a.png", "is outside of the source's root"),
        ("~/a.png", "no such file"),
    ]:
        write_rows(files / "rows.jsonl", [row | {"image": path}])
        (source,) = open_sources(data_config(str(files / "rows.jsonl")))
        with pytest.raises(ValueError, match=reason):
            sample(source)
    write_rows(files / "rows.jsonl", [row | {"image": str(files / "a.png")}])
    (source,) = open_sources(data_config(str(files / "rows.jsonl")))
    assert len(sample(source)["tiles"]) == 3
    with pytest.raises(MetaError, match=r"gone.jsonl: no such file"):
        open_sources(data_config("gone.jsonl"))


def test_a_pattern_of_files_of_rows(files):
    for number in range(3):
        write_rows(files / f"part{number}.jsonl", [TEXT] * (number + 1))
    for pattern in ("part*.jsonl", "part{0..2}.jsonl"):
        (source,) = open_sources(data_config(str(files / pattern)))
        assert len(source) == 6 and source.locate(5).endswith("(part2.jsonl line 3)")


def test_a_tar_of_rows(files):
    write_tar(
        files / "a.tar",
        {"1.json": json.dumps(TEXT).encode(), "1.png": encoded(make_image())},
    )
    (source,) = open_sources(data_config(str(files / "a.tar")))
    assert len(sample(source)["tiles"]) > 0
