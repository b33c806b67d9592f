"""jsonl.py: files that people wrote and files that a kill tore."""

import gzip
import json
import os

import pytest

from internvl3_jax.inference.requests import read_requests
from internvl3_jax.io import jsonl
from internvl3_jax.io.safe_files import FileError

pytestmark = pytest.mark.smoke


@pytest.fixture
def path(tmp_path):
    return tmp_path / "some.jsonl"


def test_byte_order_mark_and_both_line_ends(path):
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": "x\xe2\x80\xa8y"}\n  \n3')
    assert list(jsonl.read(path)) == [
        (f"{path} line 1", {"a": 1}),
        (f"{path} line 3", {"a": "x\u2028y"}),
        (f"{path} line 5", 3),
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"a": 1}\n'.encode("utf-16"), "is UTF-16 or UTF-32 text, or binary; save it as UTF-8"),
        ('{"a": 1}\n'.encode("utf-16-le"), "is UTF-16 or UTF-32 text, or binary; save it as UTF-8"),
        (b'{"a": 1}\n{"a": "\xff"}\n', "line 2 is not UTF-8"),
        (b'{"a": 1}\n{"a": \n', "line 2: is not JSON"),
        (b'{"a": NaN}\n', "line 1: a: NaN is not a JSON number"),
        (b'{"a": 1, "a": 2}\n', "line 1: the key 'a' occurs twice"),
        (b"[" * 100_000, "line 1: is nested more than"),
    ],
)
def test_errors_name_file_and_line(path, content, said):
    path.write_bytes(content)
    with pytest.raises(FileError) as caught:
        list(jsonl.read(path))
    assert (
        str(path) in str(caught.value)
        and said in str(caught.value)
        and "\n" not in str(caught.value)
    )


def test_objects_only(path):
    path.write_text('{"a": 1}\n[1]\n')
    rows = jsonl.read_objects(path)
    assert next(rows).get("a", int) == 1
    with pytest.raises(FileError, match=r"line 2: is the list \[1\]; expected an object"):
        next(rows)


def test_a_pipe_and_a_folder_are_refused(path, tmp_path):
    os.mkfifo(path)
    for name, said in (
        (path, "not a regular file"),
        (tmp_path, "a directory"),
        (tmp_path / "none", "No such file"),
    ):
        with pytest.raises(FileError, match=said):
            list(jsonl.read(name))
    with pytest.raises(FileError, match="not a regular file"), jsonl.Appender(path, 0):
        pass


def test_whole_lines_end_before_what_was_torn(path):
    text = '{"a": "书\u2028"}\n'.encode()
    for cut in range(len(text)):
        path.write_bytes(text + text[:cut])
        assert jsonl.whole_lines(path) == [text]
    assert jsonl.parse([text], path)[0].get("a", str) == "书\u2028"
    with pytest.raises(FileError, match="some.jsonl line 2: is not JSON"):
        jsonl.parse([text, b"{\n"], path)


def test_appending_cuts_what_was_torn_and_nothing_else(path):
    path.write_bytes(b'{"a": 1}\n{"a": ')
    with jsonl.Appender(path, len(b'{"a": 1}\n')) as file:
        file.write(['{"a": 2}'])
        assert path.read_bytes() == b'{"a": 1}\n{"a": 2}\n'
        file.write(['{"a": 3}', '{"a": 4}'])
    assert [value["a"] for _, value in jsonl.read(path)] == [1, 2, 3, 4]
    with pytest.raises(FileExistsError), jsonl.Appender(path, None):
        pass
    jsonl.rewrite(path, ['{"a": 5}'])
    assert path.read_bytes() == b'{"a": 5}\n'


def test_a_full_disk_is_named(path, monkeypatch):
    def full(descriptor, data):
        raise OSError(28, "No space left on device")

    with jsonl.Appender(path, None) as file:
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError) as caught:
            file.write(["1"])
    assert caught.value.filename == str(path)


def test_dumps_keeps_the_value_and_drives_no_terminal():
    value = {"text": "书\x1b]52;c;\x07 \x7f\x9b\u2028\u202e\udce9 é"}
    line = jsonl.dumps(value)
    assert json.loads(line) == value and "书" in line and "é" in line
    assert not any(character in line for character in "\x1b\x07\x7f\x9b\u2028\u202e\udce9")
    line.encode("utf-8")
    with pytest.raises(ValueError):
        jsonl.dumps(float("nan"))


@pytest.mark.parametrize("content, reason", [
    (b"", "has no requests"), (b"\n \n", "has no requests"), (b'[\n{"prompt": "a"}\n]\n', "is one JSON list"),
    (gzip.compress(b"{}", mtime=0), "is compressed"),
    ('{"prompt": "a"}'.encode("utf-16"), "is UTF-16"), (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
])  # fmt: skip
def test_requests_in_other_forms_are_named(tmp_path, content, reason):
    path = tmp_path / "requests.jsonl"
    path.write_bytes(content)
    with pytest.raises(FileError, match=f"requests.jsonl: {reason}"):
        read_requests(path)
