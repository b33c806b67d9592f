"""One place reads JSON: what it takes, and what it refuses by name."""

import json
import os

import pytest

from internvl3_jax.io.strict_json import JsonError, Object, loads, read

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize(
    "text",
    [
        '{"a": [1, -2.5, "x\\u2028", true, null], "b": {"c": {}}}',
        "[]",
        "0",
        '"{[{["',
        "[" * 64 + "]" * 64,
        '{"a": "' + "[" * 500 + '"}',
    ],
)
def test_json_reads_as_pythons_parser_reads_it(text):
    assert loads(text, "f.json") == json.loads(text)
    assert loads(b"\xef\xbb\xbf" + text.encode(), "f.json") == json.loads(text)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "empty"),
        (b"{", "not JSON"),
        (b'{"a": NaN}', "a: NaN"),
        (b'{"a": {"b": [0, 1e999]}}', "a: b: the number 1e999"),
        (b"[-Infinity]", "Infinity"),
        (b"[1e999]", "1e999"),
        (b"[" + b"9" * 5000 + b"]", "5,000 digits"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b"[" * 65 + b"]" * 65, "nested"),
        (b"[" * 200_000, "nested"),
        (b'{"a":' * 100_000, "nested"),
        (b'{"a":\n\n"\xff"}', "line 3 is not UTF-8"),
        ("{}".encode("utf-16"), "UTF-16"),
        ("{}".encode("utf-16-le"), "UTF-16"),
        (b"\x80\x04\x95", "not UTF-8"),
    ],
)
def test_json_that_is_refused_names_the_file_and_the_reason(data, word):
    with pytest.raises(JsonError) as caught:
        loads(data, "some/f.json")
    assert str(caught.value).startswith("some/f.json: ") and word in str(caught.value)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_a_file_is_read_only_up_to_its_limit_and_only_if_it_is_regular(tmp_path):
    path = tmp_path / "f.json"
    path.write_text("[1, 2]")
    assert read(path) == [1, 2]
    with pytest.raises(ValueError, match="f.json: has 6 bytes; at most 5"):
        read(path, max_bytes=5)
    with pytest.raises(ValueError, match="nothing.json: cannot be read"):
        read(tmp_path / "nothing.json")
    with pytest.raises(ValueError, match="is a directory"):
        read(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: is not a regular file"):
        read(tmp_path / "pipe")
    with pytest.raises(ValueError, match="cannot be read"):
        read("null\0character")


FIELDS = {
    "text": "x",
    "flag": True,
    "count": 3,
    "ratio": 0.5,
    "whole": 2,
    "list": [1, 2],
    "object": {"a": 1},
    "null": None,
}


def test_keys_are_read_with_their_types():
    fields = Object(FIELDS, "f.json")
    assert fields.get("text", str) == "x" and fields.get("flag", bool) is True
    assert fields.get("count", int, low=1, high=3) == 3 and fields.get("whole", float) == 2
    assert fields.get("null", int, 7) == 7 and fields.get("absent", str, None) is None
    assert fields.list_of("list", int, length=2, low=1) == [1, 2]
    assert fields.object("object").get("a", int) == 1 and fields.object("nothing", None) is None
    fields.get("ratio", (float, str))
    fields.finish()


@pytest.mark.parametrize(
    ("read_key", "words"),
    [
        (lambda f: f.get("text", int), ["text", "'x'", "a whole number"]),
        (lambda f: f.get("flag", int), ["flag", "True", "a whole number"]),
        (lambda f: f.get("flag", float), ["flag", "a number"]),
        (lambda f: f.get("ratio", int), ["ratio", "0.5"]),
        (lambda f: f.get("count", bool), ["count", "true or false"]),
        (lambda f: f.get("count", int, high=2), ["count", "3", "at most 2"]),
        (lambda f: f.get("list", list, low=3), ["list", "at least 3 elements"]),
        (lambda f: f.get("list", list, low=3, high=3), ["list", "expected 3 elements"]),
        (lambda f: f.get("text", str, low=2), ["text", "at least 2 characters"]),
        (
            lambda f: f.get("text", str, choices=("y", "xx")),
            ["text", "'y', 'xx'", "did you mean 'xx'"],
        ),
        (lambda f: f.get("lsit", list), ["lsit is missing", "did you mean 'list'"]),
        (lambda f: f.list_of("list", str), ["list[0]", "a text"]),
        (lambda f: f.list_of("list", int, length=3), ["2 elements", "expected 3"]),
        (lambda f: f.object("object").get("a", str), ["object: a", "a text"]),
        (lambda f: f.finish(["text", "flags"]), ["unknown key 'flag'", "did you mean 'flags'"]),
    ],
)
def test_wrong_types_and_ranges_are_named(read_key, words):
    with pytest.raises(JsonError) as caught:
        read_key(Object(FIELDS, "f.json"))
    assert all(word in str(caught.value) for word in ["f.json", *words])


def test_messages_stay_short_and_harmless():
    with pytest.raises(JsonError) as caught:
        Object({"image": "\x1b[2J" + "A" * 2_000_000}, "f.json").get("image", int)
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 300
    with pytest.raises(JsonError, match="null; expected an object"):
        Object(None, "f.json")


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ('{"a": {"b": [1, {"c": NaN}]}}', "a: b: c: NaN"),
        ('{"a": 1, "b": [0, [-Infinity]]}', "b: -Infinity"),
        ('[{"a": 1}, {"b": 1e999}]', "b: the number 1e999 is too large"),
        ("[NaN]", "NaN is not a JSON number"),
        ("Infinity", "Infinity is not a JSON number"),
    ],
)
def test_what_is_no_number_is_named_with_the_keys_that_lead_to_it(text, path):
    with pytest.raises(JsonError) as caught:
        loads(text, "f.json")
    assert str(caught.value).startswith(f"f.json: {path}")
