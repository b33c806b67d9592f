"""infer.py on a tiny checkpoint: one question, conversations, and every error as one line.

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


def start(*arguments):
    """infer.py as a program, warnings being errors."""
    command = [sys.executable, "-W", "error", str(ROOT / "infer.py"), "--compilation_cache="]
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, cwd="/", timeout=500
    )


# --- one question --------------------------------------------------------------------------------


def test_the_program_answers_what_its_json_says(ask, image_folder):
    """The same question as a program and in JSON; the answer alone is on stdout."""
    images = [str(image_folder / "wide.png"), str(image_folder / "small.png")]
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


def test_the_flags_reach_the_model(ask, image_folder):
    """Each flag changes what it should, seen in the JSON."""
    question = {
        "prompt": "Read the number.",
        "image": [str(image_folder / "wide.png")],
        "json": True,
    }
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
    two = question | {"image": [str(image_folder / "wide.png"), str(image_folder / "small.png")]}
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


def test_several_devices_answer_alike(ask, image_folder):
    question = {"prompt": "What is it?", "image": [str(image_folder / "wide.png")], "json": True}
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


def test_a_conversation(ask, monkeypatch, image_folder):
    """Two turns, a wrong image, wrong commands, a question that fails and keeps its image, a reset."""
    lines = [
        f"/image {image_folder / 'wide.png'}",
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
        f"/image '{image_folder / 'wide.png'}'",
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
        "error: there is no command /imge; did you mean '/image'? Commands: /image, /video, /pdf"
    )
    assert errors[2].startswith("error: write /quit to leave") and errors[3].startswith(
        "error: there is no adapter 'x'"
    )
    assert errors[4].startswith("error: the prompt of") and len(errors) == 5
    assert "/image PATH" in err
    assert "(0 reused)" in err.splitlines()[0] and "(0 reused)" not in err.splitlines()[1]


def test_a_conversation_ends_with_its_input(ask, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert ask().err == ""


# --- errors --------------------------------------------------------------------------------------


def test_the_program_fails_with_one_line(image_folder):
    """An image that is not there: no answer, no traceback, not even of a library."""
    flags = [
        "--checkpoint",
        tiny_checkpoint.directory(),
        "--prompt=hi",
        f"--image={image_folder}/cat.png",
    ]
    run = start(*flags)
    assert run.returncode == 1 and run.stdout == ""
    assert (
        run.stderr
        == f"error: {image_folder}/cat.png: no such file in {image_folder}; check the path\n"
    )


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
def test_errors_are_one_line(ask, monkeypatch, image_folder, values, message):
    values = {"prompt": None if "requests" in values else "hi"} | values
    if values.get("image") == ["infer.py"]:
        values["image"] = [str(ROOT / "infer.py")]
    else:
        monkeypatch.chdir(image_folder)
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
    ask, image_folder, tmp_path, flags, reason
):
    """The checkpoint does not exist: nothing has looked for it yet."""
    flags = {"prompt": "x"} | flags
    if "image" in flags:
        flags["image"] = [str(image_folder / "wide.png") for _ in flags["image"]]
    assert re.search(reason, fail(ask, checkpoint=str(tmp_path / "no model"), **flags))


def test_a_refused_output_leaves_no_other_file(ask, tmp_path):
    """A file of a checkpoint as --output, say: a lock there would make the checkpoint look changed."""
    (tmp_path / "requests.jsonl").write_text('{"prompt": "x"}\n')
    (tmp_path / "config.json").write_text('{"mine": 1}\n')
    assert "is not an answer of infer.py" in fail(
        ask, requests=str(tmp_path / "requests.jsonl"), output=str(tmp_path / "config.json")
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "requests.jsonl"]
