"""Rows of a JSON list are found whatever the chunks that are read, and what is no such list is
refused.
"""

import json

import pytest

from internvl3_jax.data.sources import row_scan
from internvl3_jax.data.sources.files import FileError
from internvl3_jax.data.sources.json_list import ListScanner
from internvl3_jax.data.sources.rows import RowError, Rows

NESTED = [
    {"a": 'quotes \\" and [ { \\\\', "b": [[1, {"c": "}]"}], []]},
    {},
    {"é": '\\\\\\" ]', "image": "x.png"},
    {"n": -1.5e3, "t": True, "z": None},
]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 20])
def test_rows_of_a_list_are_found_whatever_the_chunks(tmp_path, monkeypatch, indent, size):
    monkeypatch.setattr(row_scan, "LIST_CHUNK", size)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(NESTED, indent=indent, ensure_ascii=False) + "\n \n")
    rows = Rows([str(path)])
    assert [rows[number] for number in range(len(rows))] == [(row, None) for row in NESTED]
    assert rows.has_images and rows.locate(2) == "rows.json item 3"
    text_only = tmp_path / "text.json"
    text_only.write_text(json.dumps(NESTED[:2] + NESTED[3:], indent=indent))
    assert (
        not Rows([str(text_only)]).has_images and Rows([str(text_only)]).identity != rows.identity
    )


@pytest.mark.parametrize(
    "content",
    [
        b"[{}, {}",
        b"[{}, {}]]",
        b"[{}, {}] {}",
        b"[{}, {}] x",
        b"[{} {}]",
        b"[{},, {}]",
        b"[{}, {},]",
        b"[, {}]",
        b"[{}, 5]",
        b'[{}, "a"]',
        b"[5, {}]",
        b"[{}, [1]]",
        b"[[{}]]",
        b'[{"a": "}]',
        b"[{]",
        b"[{}, {}}]",
        b"[5]",
        b"[",
        b"[" + b" " * (1 << 21) + b"{}]",
    ],
    ids=lambda content: content[:20].decode(),
)
def test_what_is_no_list_of_rows_is_refused(tmp_path, content):
    (tmp_path / "rows.json").write_bytes(content)
    with pytest.raises(FileError, match=r"rows\.json: "):
        Rows([str(tmp_path / "rows.json")])


def test_damage_inside_of_a_row_is_an_error_of_that_row(tmp_path):
    content = '[{"a": 1}, {"a" 1}, {"a": NaN}, {"a": 1, "a": 2}, {"b": 2}]'
    (tmp_path / "rows.json").write_text(content)
    rows = Rows([str(tmp_path / "rows.json")])
    assert len(rows) == 5 and rows[0][0] == {"a": 1} and rows[4][0] == {"b": 2}
    for number in (1, 2, 3):
        with pytest.raises(RowError):
            rows[number]


def test_a_row_of_a_list_has_a_limit():
    seen = []
    scanner = ListScanner("a.json", lambda start, row: seen.append((start, len(row))), 100)
    data = json.dumps([{"a": 1}, {"a": "x" * 1000}, {"b": 2}]).encode()
    for start in range(0, len(data), 64):
        scanner.feed(data[start : start + 64])
    assert scanner.finish() == len(data) - 1
    assert seen == [(1, 8), (11, 0), (data.index(b'{"b"'), 8)]
