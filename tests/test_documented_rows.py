"""Every row and meta file that docs/data.md shows is read."""

import pathlib
import re

from internvl3_jax.data.sources.catalog import open_sources
from internvl3_jax.data.sources.meta import read_meta
from tests.support.official_data import (
    data_config,
    make_image,
    read,
    turns,
    write_rows,
    write_video,
)

TEXT = {"conversations": turns("hi", "ho")}


def test_the_documented_rows_and_sources_are_read(tmp_path):
    page = (pathlib.Path(__file__).resolve().parents[1] / "docs/data.md").read_text(
        encoding="utf-8"
    )
    for name in ("0007.jpg", "a.jpg", "b.jpg", "0011.jpg", "0012.jpg"):
        make_image().save(tmp_path / name)
    write_video(tmp_path / "clip.mp4", 100)
    blocks = re.findall(r"```(jsonl?)\n(.*?)```", page, re.DOTALL)
    (meta,) = [text for kind, text in blocks if kind == "json" and text.startswith("{")]
    for kind, text in blocks:
        if text == meta:
            continue
        path = tmp_path / f"rows.{kind}"
        path.write_text(text, encoding="utf-8")
        (rows,) = open_sources(data_config(str(path)))
        for row in range(len(rows)):
            conversation = read(rows, row)
            assert conversation.messages[-1]["role"] == "assistant"
            assert len(conversation.images) == sum(
                message["content"].count("<image>") for message in conversation.messages
            )
    (tmp_path / "receipts/images").mkdir(parents=True)
    for folder in ("shards", "more"):
        (tmp_path / folder).mkdir()
    write_rows(tmp_path / "receipts/train.jsonl", [TEXT])
    for name in [f"shards/{number:03}.tar" for number in range(128)] + ["more/x.tar"]:
        (tmp_path / name).touch()
    (tmp_path / "meta.json").write_text(meta)
    specs = read_meta(str(tmp_path / "meta.json"))
    assert [len(spec.annotation) for spec in specs] == [1, 129] and specs[0].root == str(
        tmp_path / "receipts/images"
    )
    (table,) = re.findall(r"(?:^\|.*\n)*^\| `annotation` \|.*\n(?:^\|.*\n)*", page, re.MULTILINE)[
        :1
    ]
    keys = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    assert keys == {
        "root",
        "annotation",
        "data_augment",
        "repeat_time",
        "max_dynamic_patch",
        "length",
        "weight",
        "allow_outside_root",
    }
