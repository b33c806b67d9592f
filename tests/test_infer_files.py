"""infer.py --requests and --output without a model: what is refused before one is loaded, what is
never touched, and what is resumed.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from internvl3_jax.inference import answer_file, prompts
from internvl3_jax.inference.answer_file import AnswerFile, read_answers
from internvl3_jax.inference.requests import (
    check_requests,
    image_hashes,
    read_requests,
    tag_remarks,
)
from internvl3_jax.io.safe_files import FileError

pytestmark = pytest.mark.smoke
SETTINGS = {"weights": "abc", "temperature": 0.0, "system": None, "stop": ()}


@pytest.fixture
def asked(tmp_path):
    """Three requests as read from a file."""
    path = tmp_path / "q.jsonl"
    (tmp_path / "a.png").write_bytes(b"")
    lines = [
        {"prompt": "one", "id": "a", "expected": "1"},
        {"prompt": "two", "image": "a.png"},
        {"prompt": "three"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_requests(path)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "answers.jsonl"


def answered(asked, count: int) -> list[dict]:
    return [
        request["asked"] | {"text": f"书 {number}"} for number, request in enumerate(asked[:count])
    ]


def fill(output, asked, count: int = 3, settings=SETTINGS) -> bytes:
    """The file after so many answers, from wherever it is."""
    with AnswerFile(output) as file:
        file.check(asked, {"temperature": settings["temperature"]})
        file.start(asked, settings)
        for row in answered(asked, count)[len(file.answers) :]:
            file.add([row])
    return output.read_bytes()


# --- requests ------------------------------------------------------------------------------------


def test_what_an_answer_repeats(asked, tmp_path):
    assert [request["asked"] for request in asked] == [
        {"id": "a", "prompt": "one", "expected": "1"},
        {"id": 2, "prompt": "two", "image": "a.png"},
        {"id": 3, "prompt": "three"},
    ]
    assert (
        asked[1]["image"] == [str(tmp_path / "a.png")]
        and asked[1]["where"] == f"{tmp_path}/q.jsonl line 2"
    )


def test_files_of_other_systems(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "x"}\r\n\r\n{"prompt": "y\xe2\x80\xa8z"}\r\n')
    assert [(request["prompt"], request["id"]) for request in read_requests(path)] == [
        ("x", 1),
        ("y\u2028z", 3),
    ]
    for encoding in ("utf-16", "utf-32"):
        path.write_bytes('{"prompt": "x"}\n'.encode(encoding))
        with pytest.raises(FileError, match="q.jsonl: is UTF-16 or UTF-32 text"):
            read_requests(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(FileError, match="q.jsonl: is not a regular file"):
        read_requests(path)


def test_missing_images(asked):
    asked[1]["image"] = ["/nowhere/a.png"]
    with pytest.raises(ValueError, match=r"q.jsonl line 2 \(id 2\): /nowhere/a.png does not exist"):
        check_requests(asked, "note")  # no request has its images: the paths are wrong
    asked[2]["image"] = [__file__]
    check_requests(asked, "note")
    with pytest.raises(ValueError, match=r"line 2 \(id 2\)"):
        check_requests(asked, "stop")


def test_tags_without_images_are_remarked(asked):
    assert tag_remarks(asked) == ""
    asked[0]["prompt"], asked[2]["prompt"] = "<image> what?", "<video>"
    assert tag_remarks(asked).endswith(
        "q.jsonl line 1 (id 'a'): no image for <image>: it is sent to the model as text, and so for "
        "1 more"
    )
    remark = "1 image for 3 <image>: the last is sent to the model as text"
    assert prompts.tag_remark("<image> <image> <image>", 1) == remark
    assert prompts.tag_remark("<image> <image>", 2) == prompts.tag_remark("what?", 2) == ""


# --- the output ----------------------------------------------------------------------------------


def test_killed_anywhere_it_is_resumed_as_if_it_had_not_been(asked, output):
    whole = fill(output, asked)
    assert [json.loads(line)["run"] for line in whole.splitlines()] == [
        answer_file.settings_hash(SETTINGS)
    ] * 3
    sidecar = output.with_name("answers.jsonl.settings.json").read_bytes()
    for cut in range(0, len(whole) + 1, 7):
        output.write_bytes(whole[:cut])
        assert fill(output, asked) == whole
    assert output.with_name("answers.jsonl.settings.json").read_bytes() == sidecar


@pytest.mark.parametrize("tail", [b"\0" * 4096, b'{"id": "a"\0\0', b"\0\0 5}\n", b"\0\n\0\0\n"])
def test_nul_bytes_of_a_power_failure_are_cut_off(asked, output, capsys, tail):
    complete = fill(output, asked)
    first = complete.index(b"\n") + 1
    for kept in (complete[:first], b""):
        output.write_bytes(kept + tail)
        assert fill(output, asked) == complete
        assert capsys.readouterr().err == (
            f"{output}: the last {len(tail):,} bytes, after line {1 if kept else 0}, are a torn row "
            "(the program or the machine stopped while writing); they are cut off and the row is "
            "made again\n"
        )
    # Within the file they are damage.
    content = complete[:first] + tail.rstrip(b"\n") + b"\n" + complete[first:]
    output.write_bytes(content)
    with pytest.raises(FileError, match="line 2: has NUL bytes, with complete lines after it"):
        fill(output, asked)
    # Without recorded settings a file of NUL bytes may be anything.
    output.write_bytes(tail)
    output.with_name("answers.jsonl.settings.json").unlink()
    with pytest.raises(FileError, match="is not an answer of infer.py|every line should be"):
        fill(output, asked)
    assert output.read_bytes() == tail


def test_a_blank_line_is_named(asked, output):
    complete = fill(output, asked)
    first = complete.index(b"\n") + 1
    for blank in (b"\n", b" \r\n"):
        output.write_bytes(complete[:first] + blank + complete[first:])
        with pytest.raises(FileError, match="answers.jsonl line 2: is blank; remove the line"):
            fill(output, asked)


def test_an_image_that_was_replaced_is_noticed(asked, output, tmp_path):
    """Under the same path; an error row may be about the image as it was."""
    image = tmp_path / "a.png"
    with AnswerFile(output) as file:
        file.start(asked, SETTINGS)
        hashes = {"image_sha256": image_hashes(asked[1]["image"])}
        rows = answered(asked, 3)
        file.add([rows[0], rows[1] | hashes, rows[2]])
    assert hashes == {"image_sha256": ["e3b0c44298fc1c14"]}  # of an empty file
    fill(output, asked)
    image.write_bytes(b"other")
    before = output.read_bytes()
    with pytest.raises(FileError, match=r"line 2 \(id 2\) was answered for another image: .*a.png"):
        fill(output, asked)
    assert output.read_bytes() == before
    with AnswerFile(output.with_name("errors.jsonl")) as file:
        file.start(asked, SETTINGS)
        file.add([rows[0], asked[1]["asked"] | hashes | {"error": "broken"}])
        assert len(read_answers(file.path, asked).rows) == 2


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"temperature": 1.0}, "temperature is 0.0 in the file, 1.0 now"),
        ({"weights": "def"}, "weights is 'abc' in the file, 'def' now"),
        (
            {"system": "Talk like a pirate."},
            "system is None in the file, 'Talk like a pirate.' now",
        ),
        ({"tiles": "shared"}, "tiles is 'not recorded' in the file, 'shared' now"),
    ],
)
def test_answers_of_other_settings_are_not_added(asked, output, changed, said):
    before = fill(output, asked, 2)
    with pytest.raises(FileError, match=said):
        fill(output, asked, settings=SETTINGS | changed)
    assert output.read_bytes() == before
    output.with_name("answers.jsonl.settings.json").unlink()  # the lines say it, too
    with pytest.raises(FileError, match="answered by another model or with other settings"):
        fill(output, asked, settings=SETTINGS | changed)
    assert output.read_bytes() == before


def test_answers_that_were_moved_away_bind_nothing(asked, output):
    fill(output, asked, 2)
    output.rename(output.with_name("older.jsonl"))
    other = SETTINGS | {"temperature": 1.0}
    assert answer_file.settings_hash(other).encode() in fill(output, asked, settings=other)


def test_a_setting_that_a_later_version_adds_changes_nothing(asked, output):
    before = fill(output, asked, 2)
    assert fill(output, asked, settings=SETTINGS | {"new": None, "newer": False}).startswith(before)


FOREIGN = [
    b"line one\nline two",
    b"line one",
    b'{"scores": [1, 2, 3]}',
    b'{"scores": [1, 2, 3]}\n',
    b'{"id": 1, "prompt": "one"',
    b'{"id": "a", "prompt": "one"}\n',
    b'{"id": "a", "prompt": "other", "text": "x"}\n',
    b'{"id": "a", "prompt": "one", "text": "x"}\nmine',
    b"\xff\xfe\x00",
    b"\x89PNG\r\n\x1a\n\x00",
    b"[1]\n",
    b"\n\n",
]


@pytest.mark.parametrize("content", FOREIGN)
def test_a_file_of_somebody_else_stays_as_it_is(asked, output, content):
    output.write_bytes(content)
    for _ in range(2):
        with pytest.raises(FileError, match="answers.jsonl"):
            fill(output, asked)
        assert output.read_bytes() == content
    with pytest.raises(FileError, match="answers.jsonl"):
        read_answers(output, asked)


def test_a_foreign_sidecar_stays_as_it_is(asked, output):
    sidecar = output.with_name("answers.jsonl.settings.json")
    for content in (b'{"font": 12}', b"", b"[]", b'{"kind": '):
        sidecar.write_bytes(content)
        with pytest.raises(FileError, match="settings.json.*name another --output"):
            fill(output, asked)
        assert sidecar.read_bytes() == content and not output.exists()


def test_places_that_are_refused(asked, output, tmp_path):
    source = tmp_path / "q.jsonl"
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(source)
    os.link(source, tmp_path / "hard")
    (tmp_path / "nothing").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    for path, said in [
        (source, "which is read; name another file"),
        (tmp_path / "folder" / ".." / "q.jsonl", "which is read"),
        (tmp_path / "link", "which is read"),
        (tmp_path / "hard", "which is read"),
        (tmp_path / "folder", "is a folder"),
        (tmp_path / "nowhere" / "a.jsonl", "there is no folder"),
        (tmp_path / "nothing", "is a link to nothing"),
        (tmp_path / "pipe", "is not a regular file"),
        (pathlib.Path("/dev/null"), "is not a regular file"),
        (pathlib.Path("a\0b"), "null character"),
    ]:
        with pytest.raises(FileError, match=said):
            AnswerFile(path, [source])
    assert len(read_requests(source)) == 3


def test_one_process_at_a_time(asked, output, tmp_path):
    other = tmp_path / "other"
    with AnswerFile(output):
        other.symlink_to(output)
        output.touch()
        for name in (output, other):
            code = f"from internvl3_jax.inference.answer_file import AnswerFile\nwith AnswerFile({str(name)!r}): pass"
            run = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
            )
            assert (
                "is in use by another process (process" in run.stderr
                and str(os.getpid()) in run.stderr
            )
    fill(output, asked)


# --- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        (
            r"Image-1: <image>\nImage-2: <image>\nWhat differs?",
            "Image-1: <image>\nImage-2: <image>\nWhat differs?",
        ),
        (r"print(\\n)", r"print(\n)"),
        (r"a\\\nb", r"a\\nb"),
        (r"$\nabla f \neq \nu$, \not\in \newline", r"$\nabla f \neq \nu$, \not\in \newline"),
        (r"one\nnot \newest\nnew", "one\nnot \newest\nnew"),
        ("C:\\temp\\x", "C:\\temp\\x"),
        ("", ""),
        (r"\@me", "@me"),
    ],
)
def test_typed_prompts(text, meant):
    assert prompts.read_prompt(text) == meant


def test_prompts_from_a_file_and_from_stdin(tmp_path, monkeypatch):
    path = tmp_path / "question.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\\n two\n\n")
    assert prompts.read_prompt(f"@{path}") == "one\n\\n two\n"
    with path.open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert prompts.read_prompt("-") == "one\n\\n two\n"
    path.write_bytes(b"\xff")
    with pytest.raises(FileError, match="question.txt: line 1 is not UTF-8"):
        prompts.read_prompt(f"@{path}")


def test_an_error_is_replaced_in_its_place(asked, output):
    whole = fill(output, asked)
    output.unlink()
    with AnswerFile(output) as file:
        file.start(asked, SETTINGS)
        rows = answered(asked, 3)
        file.add([rows[0], asked[1]["asked"] | {"error": "no"}])
        file.correct({1: rows[1]})
        file.add([rows[2]])
    assert output.read_bytes() == whole
