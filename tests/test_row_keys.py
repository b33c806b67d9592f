"""What a row may say: no image, turn or text of another trainer's row is lost in silence."""

import re

import pytest

from internvl3_jax.data.sources.meta import read_meta
from internvl3_jax.data.sources.row_fields import check_keys, is_empty_answer
from internvl3_jax.data.sources.row_source import RowSource
from internvl3_jax.data.sources.row_turns import read_turns
from internvl3_jax.data.sources.rows import RowError
from tests.support.official_data import one_source as source
from tests.support.official_data import (
    read,
    turns,
    write_meta,
)

pytestmark = pytest.mark.smoke
TEXT = {"conversations": turns("hi", "ho")}
SAID = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That"}]


@pytest.mark.parametrize(
    ("row", "images"),
    [
        ({"images": ["root/a.png"], "messages": SAID}, 1),
        ({"images": "root/a.png", "messages": SAID}, 1),
        (
            {
                "images": [{"path": "root/a.png", "bytes": None}],
                "conversations": turns("<image>What?", "That"),
            },
            1,
        ),
        ({"image": {"path": "root/a.png"}, **TEXT}, 1),
        (
            {
                "images": ["root/a.png"] * 2,
                "messages": [{"role": "user", "content": "<image><image>?"}, SAID[1]],
            },
            2,
        ),
        ({"videos": ["root/frames"], "messages": SAID}, 2),
        (
            {
                "images": [],
                "videos": None,
                "system": "",
                "tools": [],
                "messages": [{"role": "system", "content": "s"}, *SAID],
            },
            0,
        ),
        (
            {
                "image": "root/a.png",
                "image_url": "http://x",
                "image_name": "x",
                "width": 3,
                "image_size": [3, 4],
                **TEXT,
            },
            1,
        ),
        (
            {
                "image_id": 5,
                "num_images": 0,
                "stage": "x",
                "page": "y",
                "usage": "z",
                "has_image": False,
                "source": "coco",
                **TEXT,
            },
            0,
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_other_spellings_are_read(place, row, images):
    found = read(source(place, [row], root="."))
    assert (
        len(found.images) == images
        and sum(m["content"].count("<image>") for m in found.messages) == images
    )
    assert [m["role"] for m in found.messages][-2:] == ["user", "assistant"]


LOOKALIKES = [
    *(
        "img",
        "imgs",
        "Images",
        "IMAGE",
        "pictures",
        "image_path",
        "image_paths",
        "imagePath",
        "image_file",
        "images_list",
        "image1",
    ),
    *(
        "image_2",
        "image_url",
        "image_base64",
        "imgae",
        "iamge",
        "imge",
        "vidoe",
        "vedio",
        "video_path",
        "videos_path",
        "clips",
    ),
    *(
        "audio",
        "audios",
        "photo",
        "media",
        "frames",
        "img_path",
        "image_name",
        "image_bytes",
        "picture_path",
        "multimodal_data",
    ),
]


@pytest.mark.parametrize("key", LOOKALIKES)
def test_keys_that_look_like_images_are_never_dropped(key):
    with pytest.raises(
        RowError, match=f"unknown key '{key}' = 'a.png'; (did you mean|images go under)"
    ):
        check_keys({key: "a.png", **TEXT})
    check_keys({key: None, **TEXT})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "a.png", "images": ["b.png"], **TEXT}, "has both image and images"),
        ({"images": ["a.png"], "videos": ["b.mp4"], **TEXT}, "has both image and video"),
        ({"videos": ["a.mp4", "b.mp4"], **TEXT}, "one for a row"),
        ({"image": "root/a.png", "image2": "b.png", **TEXT}, "unknown key 'image2'"),
        ({"image": "root/a.png", "audio": "b.wav", **TEXT}, "unknown key 'audio'"),
        (
            {"system": "Be brief.", "conversations": turns("a", "b", system="Be long.")},
            "has both the key system and a system turn",
        ),
        ({"system": ["Be brief."], **TEXT}, "system is not a text but the list"),
        ({"tools": "[]x", **TEXT}, "the key tools"),
        ({"objects": {"ref": ["a"], "bbox": [[1, 2, 3, 4]]}, **TEXT}, "the key objects"),
        ({"history": [["a", "b"]], **TEXT}, "the key history"),
        ({"rejected_response": "no", "messages": SAID}, "the key rejected_response"),
        ({"messages": SAID, **TEXT}, "has both conversations and messages"),
        ({"question": "a", "chosen": "b", "rejected": "c", **TEXT}, "has both turns and a pair"),
        (
            {"instruction": "a", "output": "b"},
            "conversations is None; expected a list of turns; it has instruction, output: write them",
        ),
        ({"messages": None}, "messages is None; expected a list of turns"),
        ({"conversations": [], "messages": []}, "messages is []; expected a list of turns"),
        ({"conversatoins": turns("a", "b")}, "did you mean 'conversations'?"),
        (
            {"messages": [{"role": "tool", "content": "a"}]},
            "turn 1 is from 'tool'; expected system, human, gpt",
        ),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "turn 1 is from ['user']"),
        (
            {"messages": [{"role": "user", "content": {"type": "text", "text": "a"}}]},
            "turn 1: its value is not a text but the object",
        ),
        (
            {"messages": [SAID[0], {**SAID[1], "loss": False}]},
            "turn 2: the key loss = False is not read",
        ),
        ({"messages": [SAID[0], {**SAID[1], "tool_calls": [1]}]}, "turn 2: the key tool_calls"),
        ({"messages": [SAID[0], {**SAID[1], "train": False}]}, "turn 2: the key train = False"),
        (
            {"messages": [SAID[0], {**SAID[1], "reasoning_content": "so"}]},
            "turn 2: the key reasoning_content = 'so' is not read",
        ),
        ({"system_prompt": "Be brief.", **TEXT}, "the key system_prompt = 'Be brief.' is not read"),
        ({"question": "a", "answer": "b"}, "it has answer, question: write them as turns"),
        (
            {"conversations": [{**turns("a")[0], "image": "a.png"}, *turns("a", "b")[1:]]},
            "turn 1: image belongs to the row",
        ),
        (
            {"conversations": turns("a", "b\ud83d")},
            r"turn 2: its value holds half a character, \ud83d at 1",
        ),
        ({"conversations": "x" * 2_000_000}, "expected a list of turns"),
        ({"conversations": [{"x" * 2_000_000: 1}]}, "turn 1 is {"),
        ({"conversations": [{"from": "x" * 2_000_000, "value": "a"}]}, "turn 1 is from 'xxx"),
        ({"question": "a", "chosen": "x" * 2_000_000, "rejected": 5}, "rejected is 5"),
        ({"question": "a", "chosen": "b", "rejected": "\udc00"}, "rejected holds half a character"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_read_is_named(place, row, reason):
    with pytest.raises(RowError, match=re.escape(reason)) as caught:
        read(source(place, [row], root="."))
    assert len(str(caught.value)) < 500


def test_empty_answers():
    assert is_empty_answer(read_turns({"conversations": turns("a", "b", "c", " \n")}).messages)
    assert not is_empty_answer(read_turns({"conversations": turns("", "b")}).messages)


def test_pairs_and_their_images(place):
    row = {"images": ["root/a.png"], "question": "What?", "chosen": "b", "rejected": "c"}
    found = read(source(place, [row], root="."))
    assert (
        len(found.images) == 1
        and found.rejected == "c"
        and found.messages[0]["content"] == "<image>\nWhat?"
    )


def test_a_file_of_rows_of_other_spellings_has_images(tmp_path):
    for number, key in enumerate(("images", "videos")):
        rows = RowSource(
            read_meta(write_meta(tmp_path, a={"rows": [TEXT, {key: ["x"], "messages": SAID}]}))[0]
        )
        assert rows.has_images, (number, key)
    assert not source(tmp_path, [{"images": [], **TEXT}]).has_images


@pytest.mark.parametrize(
    "name", ["file_name", "decoded_image", "input_image", "jpg", "path", "file", "url", "whatever"]
)
@pytest.mark.parametrize("value", ["nowhere.png", ["a/b.JPG"], {"path": "clip.mp4"}])
def test_an_image_under_another_key_is_not_dropped(name, value):
    with pytest.raises(RowError, match=f"unknown key '{name}' = "):
        check_keys({"id": 1, "conversations": [], name: value})
    check_keys({"id": 1, "image": "a.png", "conversations": [], "source_file": value})


@pytest.mark.parametrize(
    "turn", [{"image_path": "a.png"}, {"img": "a.png"}, {"images": ["a.png"]}, {"other": "a.jpeg"}]
)
def test_an_image_of_a_turn_is_not_dropped(turn):
    with pytest.raises(RowError, match="belongs to the row"):
        read_turns({"conversations": [{"from": "human", "value": "x"} | turn]})
