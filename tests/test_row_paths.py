"""Paths that a row names stay under their root, on this machine, at an address and in an archive."""

import json

import fsspec
import pytest

from internvl3_jax.data.sources.meta import read_meta
from internvl3_jax.data.sources.row_source import RowSource
from internvl3_jax.data.sources.rows import RowError
from tests.support.official_data import encoded, make_image, read, turns, write_meta, write_tar
from tests.support.official_data import one_source as source

pytestmark = pytest.mark.smoke
TEXT = {"conversations": turns("hi", "ho")}

INSIDE = [
    "a.png",
    "./a.png",
    "sub/../a.png",
    "sub/b.png",
    "sub//b.png",
    "{root}/a.png",
    "{root}/sub/../a.png",
    "link/c.png",
]
OUTSIDE = [
    "../secret.png",
    "../root/a.png",
    "sub/../../secret.png",
    "{root}/../secret.png",
    "{root}2/a.png",
    "../root2/a.png",
    "{root}/../root2/a.png",
    "link/../../secret.png",
    "/etc/passwd",
    "//etc/passwd",
    "file:///etc/passwd",
    "local:///etc/passwd",
    "memory://x/a.png",
    "https://example.org/a.png",
    "simplecache::file:///etc/passwd",
]


def test_paths_stay_under_their_root(place):
    root = str(place / "root")
    rows = [{"image": name.format(root=root), **TEXT} for name in INSIDE]
    found = source(place, rows, root="root")
    assert [len(read(found, row).images) for row in range(len(rows))] == [1] * len(rows)
    for key, wrap in (
        ("image", str),
        ("image", lambda name: [name]),
        ("images", lambda name: [name]),
        ("video", str),
    ):
        rows = [{key: wrap(name.format(root=root)), **TEXT} for name in OUTSIDE]
        found = source(place, rows, root="root")
        for row in range(len(rows)):
            with pytest.raises(
                RowError, match=r'is outside of the source\'s root, .*"allow_outside_root": true'
            ):
                read(found, row)


def test_the_root_may_be_left_where_the_meta_file_says_so(place):
    names = [
        "../secret.png",
        str(place / "secret.png"),
        str(place / "root/a.png"),
        f"file://{place}/secret.png",
    ]
    found = source(
        place, [{"image": name, **TEXT} for name in names], root="root", allow_outside_root=True
    )
    assert [len(read(found, row).images) for row in range(4)] == [1] * 4
    # Without a root paths are whole; relative ones are beside the meta file, and stay there.
    found = source(
        place / "root",
        [{"image": name, **TEXT} for name in [str(place / "secret.png"), "a.png", "../secret.png"]],
        root="",
    )
    assert [len(read(found, row).images) for row in range(2)] == [1, 1]
    with pytest.raises(RowError, match="outside of the source's root"):
        read(found, 2)


def test_rows_from_an_address_name_no_files_of_this_machine(place, monkeypatch):
    monkeypatch.setenv("INTERNVL3_JAX_CACHE", str(place / "cache"))
    memory = fsspec.filesystem("memory")
    names = [
        "memory://paths/a.png",
        "a.png",
        str(place / "secret.png"),
        f"file://{place}/secret.png",
        "../other/a.png",
    ]
    rows = "\n".join(json.dumps({"image": name, **TEXT}) for name in names)
    memory.pipe(
        {
            "/paths/rows.jsonl": rows.encode(),
            "/paths/a.png": encoded(make_image()),
            "/other/a.png": encoded(make_image()),
        }
    )
    for root, annotation, folder in (
        ("", "rows.jsonl", "memory://paths"),
        ("memory://paths/", "memory://paths/rows.jsonl", str(place)),
    ):
        content = json.dumps({"a": {"root": root, "annotation": annotation}})
        with fsspec.open(f"{folder}/meta.json", "w") as file:
            file.write(content)
        found = RowSource(read_meta(f"{folder}/meta.json")[0])
        assert [len(read(found, row).images) for row in range(2)] == [1, 1]
        for row in (2, 3, 4):
            with pytest.raises(RowError, match="outside of the source's root"):
                read(found, row)


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("root", ["", "."])
def test_rows_of_archives_name_files_of_their_archive(place, root, outside):
    for name in ("{place}/secret.png", "secret.png", "../secret.png", "b.png", "memory://x"):
        row = {"image": name.format(place=place), **TEXT}
        write_tar(
            place / "a.tar", {"a.json": json.dumps(row).encode(), "a.png": encoded(make_image())}
        )
        meta = write_meta(
            place, a={"root": root, "annotation": "a.tar", "allow_outside_root": outside}
        )
        with pytest.raises(
            RowError, match="is not in the row's sample of the archive, which holds a.png"
        ):
            read(RowSource(read_meta(meta)[0]))


@pytest.mark.parametrize("key", ["image", "images", "video"])
@pytest.mark.parametrize(
    "value",
    [
        "data:image/png;base64," + "A" * 2_000_000,
        "x" * 2_000_000,
        "a\0b",
        {"bytes": "A" * 2_000_000},
        {"path": 5},
        [["a"]],
        {"x": 1},
        {},
        0,
        False,
        5,
    ],
    ids=lambda value: str(value)[:10],
)
def test_what_is_no_path_is_said_in_short(place, key, value):
    with pytest.raises(ValueError, match=r".") as caught:
        read(source(place, [{key: value, **TEXT}], root="root"))
    assert len(str(caught.value)) < 400 and "\0" not in str(caught.value)
