"""infer.py on files of questions: answers resumed, wrong questions named, a failed one alone."""

import json
import re
import shutil

import pytest

from tests.support.infer_flags import fail

FIELDS = {"text", "token_ids", "prompt_tokens", "tiles", "seconds", "finish"}


# --- files of questions --------------------------------------------------------------------------


@pytest.fixture
def requests(tmp_path, image_folder):
    """requests.jsonl with images relative to it, several of them, none, an id of its own and an
    empty line.
    """
    for name in ("wide.png", "small.png"):
        shutil.copy(image_folder / name, tmp_path / name)
    lines = [
        {"prompt": "Read the number.", "image": "wide.png", "id": "first"},
        {"prompt": "How many digits are there?"},
        {"prompt": "Which number is larger?", "image": ["small.png", "wide.png"]},
        {"prompt": "hi", "image": [str(image_folder / "small.png")], "id": {"any": 1}},
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
    assert re.search(r"5 answers, 60 new tokens in .*; .* tokens/s", err)
    assert "5 were cut off by --max_new_tokens" in err
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
        ('{"question": "hi"}', "unknown key 'question'; did you mean 'prompt'?"),
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
            "unknown key 'zzz'; put what the answer should repeat into extra",
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
    """Its error is in its place, the status says so, and when it is fixed it can be asked
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


# --- options of one request ----------------------------------------------------------------------


def test_requests_have_options_of_their_own(ask, requests):
    """Each answer is the one that the command gives with these options."""
    own = [
        {"max_new_tokens": 3},
        {"max_tiles": 1, "delta": "1/4"},
        {"temperature": 1.0, "seed": 7, "top_k": 5},
        {"system": "Answer briefly.", "max_new_tokens": 20},
    ]
    image = str(requests.with_name("wide.png"))
    lines = [{"prompt": "Read the number.", "image": image} | options for options in own]
    path = requests.with_name("own.jsonl")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = requests.with_name("own_answers.jsonl")
    settings = {"requests": str(path), "output": str(output)}
    ask(**settings, batch_size=2)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    for row, line, options in zip(rows, lines, own, strict=True):
        assert {name: row[name] for name in line} == line
        flags = options | ({"delta": [options["delta"]]} if "delta" in options else {})
        alone = json.loads(ask(prompt="Read the number.", image=[image], json=True, **flags).out)
        assert (row["token_ids"], row["tiles"]) == (alone["token_ids"], alone["tiles"])
    assert [row["tiles"] for row in rows] == [[4], [1], [4], [4]]
    # Answers to other options are not taken for these.
    lines[1]["delta"] = "1/8"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "answers to other questions than were asked (line 2" in fail(ask, **settings)


def test_wrong_options_of_one_request_are_its_error(ask, requests):
    lines = [
        {"prompt": "a", "temperature": -1},
        {"prompt": "b", "max_new_tokens": "many"},
        {"prompt": "c", "max_new_tokens": 2},
    ]
    path = requests.with_name("wrong.jsonl")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = requests.with_name("wrong_answers.jsonl")
    settings = {"requests": str(path), "output": str(output)}
    assert "2 of 3 requests could not be answered" in fail(ask, **settings)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert "wrong.jsonl line 1 (id 1): temperature is -1" in rows[0]["error"]
    assert "max_new_tokens is 'many'; it must be a whole number" in rows[1]["error"]
    assert len(rows[2]["token_ids"]) == 2
    more = settings | {"output": str(requests.with_name("best.jsonl")), "best_of": 2}
    assert "temperature of one request go with neither --best_of nor --prompt_lookup" in fail(
        ask, **more, majority=True, on_error="stop"
    )


def test_a_long_answer_holds_nothing_up(ask, requests):
    """Rows that end are taken by the next requests; the order of the output stays."""
    lines = [
        {"prompt": f"number {number}", "max_new_tokens": 60 if number == 0 else 2}
        for number in range(12)
    ]
    path = requests.with_name("mixed.jsonl")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = requests.with_name("mixed_answers.jsonl")
    ask(requests=str(path), output=str(output), batch_size=2)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in rows] == list(range(1, 13))
    assert [len(row["token_ids"]) for row in rows] == [60] + 11 * [2]
