"""infer.py on a tiny checkpoint: one question, files of questions, conversations, and every error
as one line.

Most runs are in this process, through `infer.run` with its flags set; a few start the program.
"""

import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import infer
from internvl3_jax.io.terminal import printable
from tests.support import tiny_checkpoint
from tests.support.infer_flags import fail

ROOT = pathlib.Path(infer.__file__).parent
FIELDS = {"text", "token_ids", "prompt_tokens", "tiles", "seconds", "finish"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A directory with wide.png (three tiles and a thumbnail) and small.png (one tile)."""
    directory = tmp_path_factory.mktemp("pictures")
    tiny_checkpoint.picture(40, 16, 1).save(directory / "wide.png")
    tiny_checkpoint.picture(16, 16, 2).save(directory / "small.png")
    return directory


def start(*arguments):
    """infer.py as a program, warnings being errors."""
    command = [sys.executable, "-W", "error", str(ROOT / "infer.py"), "--compilation_cache="]
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, cwd="/", timeout=500
    )


# --- one question --------------------------------------------------------------------------------


def test_the_program_answers_what_its_json_says(ask, pictures):
    """The same question as a program and in JSON; the answer alone is on stdout."""
    images = [str(pictures / "wide.png"), str(pictures / "small.png")]
    prompt = "Image-1: <image>\nImage-2: <image>\nWhich number is larger?"
    flags = [f"--image={image}" for image in images] + [
        "--prompt",
        prompt,
        "--max_new_tokens=12",
        "--stats",
    ]
    run = start("--checkpoint", tiny_checkpoint.directory(), *flags)
    assert run.returncode == 0, run.stderr
    times = r"compiled in \d+\.\d{3} s; first token \d+\.\d{3} s, then \d+\.\d ms per token; "
    assert re.match(times, run.stderr) and run.stderr.count("\n") == 2
    assert (
        "finish: length\nthe answer was cut off after 12 tokens; --max_new_tokens allows more\n"
        in run.stderr
    )
    assert "(0 reused), tiles [4, 1]" in run.stderr
    answer = json.loads(ask(image=images, prompt=prompt, json=True).out.splitlines()[-1])
    assert set(answer) == FIELDS
    assert run.stdout.strip() == printable(answer["text"])
    assert answer["tiles"] == [4, 1] and len(answer["token_ids"]) <= 12 and answer["seconds"] > 0
    assert answer["finish"] == "length"
    # A typed \\n is a line break.
    typed = json.loads(ask(image=images, prompt=prompt.replace("\n", "\\n"), json=True).out)
    assert (typed["token_ids"], typed["prompt_tokens"]) == (
        answer["token_ids"],
        answer["prompt_tokens"],
    )
    # <image> is put in front where the prompt has none, so this is the same question.
    again = json.loads(ask(image=images, prompt="Which number is larger?", json=True).out)
    assert (again["token_ids"], again["prompt_tokens"]) == (
        answer["token_ids"],
        answer["prompt_tokens"],
    )


def test_the_flags_reach_the_model(ask, pictures):
    """Each flag changes what it should, seen in the JSON."""
    question = {"prompt": "Read the number.", "image": [str(pictures / "wide.png")], "json": True}
    plain = json.loads(ask(**question).out)
    assert plain["tiles"] == [4] and len(plain["token_ids"]) == 12
    assert ask(**question | {"json": False}).out.strip() == printable(plain["text"])

    def differs(field, **values):
        answer = json.loads(ask(**question | values).out)
        return answer[field] != plain[field]

    assert not differs("token_ids")
    assert differs("token_ids", delta=["1/16"]) and not differs("prompt_tokens", delta=["1/16"])
    assert differs("prompt_tokens", system="Answer.")
    assert json.loads(ask(**question, max_tiles=1).out)["tiles"] == [1]
    two = question | {"image": [str(pictures / "wide.png"), str(pictures / "small.png")]}
    assert json.loads(ask(**two, tiles="shared").out)["tiles"] == [3, 1]
    assert json.loads(ask(**two, max_total_tiles=2).out)["tiles"] == [1, 1]
    assert (
        json.loads(ask(**question | {"max_new_tokens": 5}).out)["token_ids"]
        == plain["token_ids"][:5]
    )
    assert (
        json.loads(ask(**question, stop=[plain["text"][3]]).out)["text"]
        == plain["text"].split(plain["text"][3])[0].strip()
    )
    assert differs("token_ids", temperature=3.0, seed=1)


def test_text_only_and_other_dtypes(ask):
    assert json.loads(ask(prompt="hi", json=True).out)["tiles"] == []
    answer = json.loads(ask(prompt="hi", json=True, dtype="bfloat16").out)
    assert len(answer["token_ids"]) == 12


def test_several_devices_answer_alike(ask, pictures):
    question = {"prompt": "What is it?", "image": [str(pictures / "wide.png")], "json": True}
    alone, split = (json.loads(ask(**question, devices=devices).out) for devices in (1, 4))
    assert alone["token_ids"] == split["token_ids"]
    wide = json.loads(ask(**question, devices=4, fsdp=2).out)
    assert wide["token_ids"] == alone["token_ids"]
    assert fail(ask, **question, devices=9).startswith(
        "error: --devices is 9; there are 8: [CpuDevice(id=0)"
    )
    for fsdp in (3, 0, -2):
        assert fail(ask, **question, devices=4, fsdp=fsdp).startswith(
            f"error: --fsdp is {fsdp}; it must be a positive number"
        )
    for adapter in ("=", "a=", "=x"):
        assert fail(ask, **question, adapter=[adapter]).startswith(
            f"error: --adapter is {adapter!r}; it must be a directory"
        )


def test_a_conversation(ask, monkeypatch, pictures):
    """Two turns, a wrong image, wrong commands, a question that fails and keeps its image, a reset."""
    lines = [
        f"/image {pictures / 'wide.png'}",
        "Read the number.",
        "And now?",
        "/image nowhere.png",
        "",
        "/imge x",
        "quit",
    ]
    lines += [
        "/help",
        "/adapter x",
        "/reset",
        f"/image '{pictures / 'wide.png'}'",
        "number " * 2100,
        "Read the number.",
        "/quit",
    ]
    lines += ["not asked"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    out, err = ask(json=True, stats=True)
    answers = [
        json.loads(line.removeprefix("> ").lstrip("> ")) for line in out.splitlines() if "{" in line
    ]
    assert len(answers) == 3
    assert (
        answers[0]["token_ids"] == answers[2]["token_ids"]
        and answers[1]["prompt_tokens"] > answers[0]["prompt_tokens"]
    )
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert errors[0] == f"error: nowhere.png: no such file in {os.getcwd()}; check the path"
    assert errors[1].startswith(
        "error: there is no command /imge; did you mean '/image'?; there are /image, /images, /forget"
    )
    assert errors[2].startswith("error: /quit leaves") and errors[3].startswith(
        "error: there is no adapter 'x'"
    )
    assert errors[4].startswith("error: the prompt of") and len(errors) == 5
    assert "/image PATH" in err
    assert "(0 reused)" in err.splitlines()[0] and "(0 reused)" not in err.splitlines()[1]


def test_a_conversation_ends_with_its_input(ask, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert ask().err == ""


# --- files of questions --------------------------------------------------------------------------


@pytest.fixture
def requests(tmp_path, pictures):
    """requests.jsonl with pictures relative to it, several of them, none, an id of its own and an
    empty line.
    """
    for name in ("wide.png", "small.png"):
        shutil.copy(pictures / name, tmp_path / name)
    lines = [
        {"prompt": "Read the number.", "image": "wide.png", "id": "first"},
        {"prompt": "How many digits are there?"},
        {"prompt": "Which number is larger?", "image": ["small.png", "wide.png"]},
        {"prompt": "hi", "image": [str(pictures / "small.png")], "id": {"any": 1}},
        {"prompt": "And\u2028now?", "image": None},  # ends a line of text, but not of JSONL
    ]
    text = [json.dumps(line, ensure_ascii=False) for line in lines]
    (tmp_path / "requests.jsonl").write_text(
        "\n".join([*text[:2], "", *text[2:]]) + "\n", encoding="utf-8"
    )
    return tmp_path / "requests.jsonl"


def answers_in(path):
    """The lines of an output file without what differs from run to run."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    for row in rows:
        assert (
            set(row) - {"image", "image_sha256"} == FIELDS | {"id", "prompt", "run"}
            and row.pop("seconds") > 0
        )
    return rows


def test_a_file_of_questions_is_resumed(ask, requests):
    output = requests.with_name("answers.jsonl")
    settings = {"requests": str(requests), "output": str(output), "batch_size": 2}
    out, err = ask(**settings, stats=True)
    assert out == "" and err.splitlines()[-1] == f"5 answers written to {output}"
    assert "5 answers, 60 new tokens in" in err and "5 were cut off by --max_new_tokens" in err
    whole = answers_in(output)
    # line numbers where there is no id
    assert [row["id"] for row in whole] == ["first", 2, 4, {"any": 1}, 6]
    assert [row["tiles"] for row in whole] == [[4], [], [1, 4], [1], []]
    alone = json.loads(
        ask(prompt="Read the number.", image=[str(requests.with_name("wide.png"))], json=True).out
    )
    assert (alone["text"], alone["token_ids"]) == (whole[0]["text"], whole[0]["token_ids"])
    # Cut in the middle of the fourth line, as a killed run leaves it.
    lines = output.read_text().splitlines(keepends=True)
    lines[1] = lines[1].replace('"text": "', '"text": "\u2028')
    whole[1]["text"] = "\u2028" + whole[1]["text"]
    output.write_text("".join(lines[:3]) + lines[3][:20])
    err = ask(**settings).err
    assert (
        f"{output} holds 3 of 5 answers; resuming with the rest" in err
        and f"2 answers written to {output}" in err
    )
    assert answers_in(output) == whole
    assert output.read_text().startswith("".join(lines[:3]))
    assert ask(**settings).err.splitlines()[-1] == f"0 answers written to {output}"
    assert answers_in(output) == whole
    # Another file's answers are not mixed with this one's.
    output.write_text("".join(lines[1:3]))
    assert "answers.jsonl holds answers to other questions than" in fail(ask, **settings)
    for damaged in ("no json\n", '{"text": "hi"}\n', "[1]\n"):
        output.write_text(damaged)
        assert "answers.jsonl line 1" in fail(ask, **settings)
    assert output.read_text() == damaged


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "hi"', "requests.jsonl line 2: is not JSON"),
        ('{"question": "hi"}', "requests.jsonl line 2: prompt is missing"),
        ('["hi"]', "requests.jsonl line 2: is the list ['hi']; expected an object"),
        ('{"prompt": "hi", "image": 5}', "requests.jsonl line 2: image is the number 5"),
        (
            '{"prompt": "hi", "image": ["wide.png", 5]}',
            "requests.jsonl line 2: image is ['wide.png', 5]; expected a path or a list",
        ),
        ('{"prompt": "hi", "image": "nowhere.png"}', "nowhere.png does not exist"),
        (
            '{"prompt": "hi", "images": ["wide.png"]}',
            "requests.jsonl line 2: unknown key 'images'; did you mean 'image'?",
        ),
        (
            '{"prompt": "hi", "promt": "x"}',
            "requests.jsonl line 2: unknown key 'promt'; did you mean 'prompt'?",
        ),
        (
            '{"prompt": "hi", "messages": []}',
            "requests.jsonl line 2: unknown key 'messages'; did you mean 'one prompt'?",
        ),
        (
            '{"prompt": "hi", "zzz": []}',
            "unknown key 'zzz'; what is to be kept beside the answer goes into extra",
        ),
        (
            '{"prompt": "<image>", "image": ["wide.png", "wide.png"]}',
            "line 2 (id 2): 2 images, but 1 <image> tags",
        ),
        ('{"prompt": 5}', "requests.jsonl line 2: prompt is the number 5; expected a text"),
    ],
)
def test_wrong_questions_are_named(ask, requests, line, message):
    requests.write_text(f'{{"prompt": "hi"}}\n{line}\n')
    output = requests.with_name("answers.jsonl")
    error = fail(ask, requests=str(requests), output=str(output), on_error="stop")
    assert message in error and error.count("\n") == 0
    assert not output.exists() or output.read_text() == ""


def test_a_poisoned_request_fails_alone(ask, requests):
    """Its error stands in its place, the status says so, and when it is fixed it can be asked
    again.
    """
    broken = requests.with_name("broken.png")
    broken.write_bytes(requests.with_name("wide.png").read_bytes()[:80])
    lines = [
        {"prompt": "one", "id": "a"},
        {"prompt": "What?", "image": "broken.png", "id": "b"},
        {"prompt": "three"},
    ]
    lines.append({"prompt": "What?", "image": "wide.png"})
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = requests.with_name("answers.jsonl")
    settings = {"requests": str(requests), "output": str(output), "batch_size": 2}
    error = fail(ask, **settings)
    assert (
        "answers.jsonl: 1 of 4 requests could not be answered" in error
        and "line 2 (id 'b')" in error
    )
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert "broken.png" in rows[1].pop("error") and rows[1].keys() == {
        "id",
        "prompt",
        "image",
        "image_sha256",
        "run",
    }
    assert [row["id"] for row in rows] == ["a", "b", 3, 4] and rows[0]["text"]
    assert fail(ask, **settings) == error
    assert "line 2 (id 'b'): " in fail(
        ask, **settings | {"output": str(requests.with_name("other.jsonl")), "on_error": "stop"}
    )
    shutil.copy(requests.with_name("wide.png"), broken)
    assert "1 requests with an error were asked again" in ask(**settings, retry_errors=True).err
    again = [json.loads(line) for line in output.read_text().splitlines()]
    assert (again[0], again[2]) == (rows[0], rows[2])
    assert (again[1]["tiles"], again[1]["token_ids"]) == ([4], again[3]["token_ids"])


@pytest.mark.parametrize(
    "changed", [{"temperature": 1.0}, {"system": "Hm."}, {"max_tiles": 1}, {"dtype": "bfloat16"}]
)
def test_answers_of_other_settings_are_refused(ask, requests, changed):
    output = requests.with_name("answers.jsonl")
    settings = {"requests": str(requests), "output": str(output), "max_new_tokens": 2}
    ask(**settings)
    output.write_text(output.read_text().split("\n")[0] + "\n")
    before = output.read_bytes()
    error = fail(ask, **settings | changed)
    assert (
        "answers of another model or other settings: " in error
        and f"{next(iter(changed))} " in error
    )
    assert output.read_bytes() == before


# --- errors --------------------------------------------------------------------------------------


def test_a_tag_without_an_image_is_remarked(ask, requests):
    note = "no image for <image>: it is sent to the model as text"
    assert ask(prompt="What is <image>?").err.startswith(f"note: --prompt: {note}\n")
    assert "note: " not in ask(prompt="What is it?").err
    requests.write_text('{"prompt": "hi"}\n{"prompt": "<image>"}\n')
    output = requests.with_name("answers.jsonl")
    err = ask(requests=str(requests), output=str(output)).err
    assert err.startswith(f"note: {requests} line 2 (id 2): {note}\n")


def test_an_image_that_changed_meanwhile_is_refused(ask, requests):
    output = requests.with_name("answers.jsonl")
    settings = {"requests": str(requests), "output": str(output), "max_new_tokens": 2}
    ask(**settings)
    lines = output.read_text().split("\n")
    output.write_text("\n".join(lines[:3]) + "\n")
    shutil.copy(requests.with_name("small.png"), requests.with_name("wide.png"))
    error = fail(ask, **settings)
    assert f"{output} line 1 (id 'first') was answered for another image: " in error
    assert output.read_text() == "\n".join(lines[:3]) + "\n"


def test_the_program_fails_with_one_line(pictures):
    """A picture that is not there: no answer, no traceback, not even of a library."""
    flags = [
        "--checkpoint",
        tiny_checkpoint.directory(),
        "--prompt=hi",
        f"--image={pictures}/cat.png",
    ]
    run = start(*flags)
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr == f"error: {pictures}/cat.png: no such file in {pictures}; check the path\n"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"checkpoint": "/nowhere/at/all"},
            "/nowhere/at/all does not exist; give a checkpoint directory",
        ),
        (
            {"checkpoint": str(ROOT / "tests")},
            "tests is not a checkpoint. Expected one of: internvl3_jax.json and params/",
        ),
        ({"checkpoint": __file__}, "test_infer.py is not a checkpoint"),
        (
            {"prompt": "<image>", "image": ["small.png", "small.png"]},
            "2 images, but 1 <image> tags",
        ),
        (
            {"prompt": "hi", "image": ["infer.py"]},
            "infer.py: is not an image of pixels that Pillow can read",
        ),
        ({"prompt": "number " * 2100}, "the model knows 2,048"),
        ({"prompt": "hi", "delta": ["1/3"]}, "delta '1/3' is not a multiple of 1/256"),
        ({"prompt": "hi", "delta": ["1", "1/2"]}, "2 deltas for 0 images"),
        ({"prompt": "hi", "top_p": 1.5}, "top_p is 1.5; it must be above 0 and at most 1"),
        ({"prompt": "hi", "seed": 2**32}, "seed is 4294967296"),
        (
            {"requests": "/nowhere.jsonl", "output": "answers.jsonl"},
            "/nowhere.jsonl: cannot be read (No such file",
        ),
        (
            {"prompt": "hi", "use": "other"},
            "--use is 'other'; there is no such --adapter: none is given",
        ),
        ({"prompt": "@nowhere.txt"}, "nowhere.txt: cannot be read (No such file"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_errors_are_one_line(ask, monkeypatch, pictures, values, message):
    values = {"prompt": None if "requests" in values else "hi"} | values
    if values.get("image") == ["infer.py"]:
        values["image"] = [str(ROOT / "infer.py")]
    else:
        monkeypatch.chdir(pictures)
    error = fail(ask, **values)
    assert message in error and error.count("\n") == 0


def test_a_checkpoint_that_contradicts_itself_is_named(ask, tmp_path):
    """The tile rule in its configuration was changed after it was made."""
    shutil.copytree(tiny_checkpoint.directory(), tmp_path / "changed")
    path = tmp_path / "changed" / "internvl3_jax.json"
    manifest = json.loads(path.read_text())
    manifest["processor"]["max_tiles"] = 2
    path.write_text(json.dumps(manifest))
    error = fail(ask, checkpoint=str(tmp_path / "changed"), prompt="hi")
    assert "max_tiles: made with 4, now 2" in error and "--accept_fingerprint" in error
    assert "Traceback" not in error
    assert ask(
        checkpoint=str(tmp_path / "changed"), prompt="hi", accept_fingerprint=True
    ).out.strip()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"requests": "a.jsonl"}, "--requests needs --output"),
        (
            {"requests": "a.jsonl", "output": "b.jsonl", "prompt": "hi"},
            "takes prompts and images from the file alone",
        ),
        ({"image": ["a.png"]}, "--image needs --prompt"),
        ({"arguments": ["hi"]}, "what is 'hi'"),
        ({"output": "b.jsonl"}, "--output is for the answers to --requests"),
        ({"hosts": True}, "--hosts needs --prompt or --requests"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_flags_that_do_not_go_together(ask, capsys, values, message):
    with pytest.raises(SystemExit) as stopped:
        ask(**values)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize("flags, reason", [
    ({"adapter": ["nowhere"]}, "nowhere does not exist; give a checkpoint directory"),
    ({"adapter": ["~nobody/a"]}, "/a does not exist"),
    ({"best_of": 2, "critic": "nowhere"}, "nowhere does not exist"),
    ({"best_of": 2, "critic": __file__}, "test_infer.py is a file"),
    ({"max_tiles": 999_999_999}, "max_tiles is 999999999; it must be at least 1 and below 10,001"),
    ({"compilation_cache": __file__}, "compilation_cache .*test_infer.py"),
    ({"image": ["WIDE", "WIDE"], "prompt": "<image> what?"}, "2 images, but 1 <image> tags in --prompt"),
    ({"image": ["WIDE"], "delta": ["1/4", "1/8"]}, "2 deltas for 1 images"),
])  # fmt: skip
def test_what_can_be_seen_without_a_model_is_checked_before_one_is_read(
    ask, pictures, tmp_path, flags, reason
):
    """The checkpoint does not exist: nothing has looked for it yet."""
    flags = {"prompt": "x"} | flags
    if "image" in flags:
        flags["image"] = [str(pictures / "wide.png") for _ in flags["image"]]
    assert re.search(reason, fail(ask, checkpoint=str(tmp_path / "no model"), **flags))


def test_a_refused_output_leaves_nothing_beside_it(ask, tmp_path):
    """A file of a checkpoint as --output, say: a lock there would make the checkpoint look changed."""
    (tmp_path / "requests.jsonl").write_text('{"prompt": "x"}\n')
    (tmp_path / "config.json").write_text('{"mine": 1}\n')
    assert "is no answer of infer.py" in fail(
        ask, requests=str(tmp_path / "requests.jsonl"), output=str(tmp_path / "config.json")
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "requests.jsonl"]
