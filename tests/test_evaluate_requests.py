"""The task `requests`: one's own questions, in the form of infer.py --requests."""

import json

import pytest
from PIL import Image

from internvl3_jax.evaluate import asking, marks, prompts
from internvl3_jax.evaluate.command import load
from internvl3_jax.evaluate.task_table import TASKS
from internvl3_jax.io.safe_files import FileError
from internvl3_jax.io.strict_json import JsonError
from internvl3_jax.reward.best_of_n import Candidate, Choice
from tests.support import evaluate_world as world
from tests.support.evaluate_runs import StandIn, evaluate

TASK = TASKS["requests"]


def test_expected_texts_and_boxes(tmp_path):
    rows = [{"prompt": "Where?", "expected": "<ref>7</ref><box>[[0, 0, 10, 10]]</box>"}] * 2
    world.write_lines(tmp_path / "questions.jsonl", rows)
    row = load(TASK, tmp_path).rows[0]
    for answer, value in (
        ("<ref>7</ref><box>[[0, 0, 10, 8]]</box>", 1.0),
        ("<ref>8</ref><box>[[0, 0, 10, 10]]</box>", 0.0),
        ("<ref>7</ref><box>[[5, 5, 15, 15]]</box>", 0.0),
        ("7", 0.0),
    ):
        assert marks.mark("text_or_box", row, answer).value == value
    assert json.loads(row.id) == 1 and prompts.build(TASK, row, 0) == "Where?"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"expected": None}, JsonError, "line 1: expected is missing; write the right answer"),
        ({"expected": 7}, JsonError, "line 1: expected is 7, not a text"),
        ({"task": 3}, JsonError, "line 1: task is 3; expected a text"),
        ({"video": "a.mp4"}, JsonError, "line 1: has a video, and this task asks about images"),
        ({"delta": "1/4"}, JsonError, "line 1: delta cannot differ between questions"),
        ({"images": "0.png"}, JsonError, "line 1: unknown key 'images'; did you mean 'image'"),
        ({"image": "none.png"}, FileError, "line 1: image: there is no .*none.png"),
    ],
)
def test_a_wrong_line_is_named(changes, error, message, tmp_path):
    world.write_lines(
        tmp_path / "questions.jsonl", [{"prompt": "Where?", "expected": "here"} | changes]
    )
    with pytest.raises(error, match=f"questions.jsonl {message}"):
        load(TASK, tmp_path)


def test_a_line_limits_the_tiles_of_its_images(tmp_path, capsys):
    """The answers say how many tiles each image had, and the position of the question's end."""
    Image.new("RGB", (4 * world.SIZE, world.SIZE)).save(tmp_path / "wide.png")
    row = {"prompt": "Read the number.", "image": "wide.png", "expected": "7"}
    world.write_lines(tmp_path / "questions.jsonl", [row, row | {"max_tiles": 2}])
    output, more = tmp_path / "output", ["--max_new_tokens", "4", "--delta", "1", "1/4"]
    assert evaluate(tmp_path, output, ["requests"], *more) == 0
    found = {}
    for delta in ("1", "1_4"):
        lines = (output / "answers" / f"requests.delta_{delta}.jsonl").read_text().splitlines()
        found[delta] = [json.loads(line) for line in lines]
        assert [answer["tiles"] for answer in found[delta]] == [[4 + 1], [2 + 1]]
    for answer, quarter in zip(found["1"], found["1_4"], strict=True):
        # A tile has 4 tokens, which advance by 4 or by 1.
        assert answer["position"] == answer["prompt_tokens"] - 1
        assert quarter["position"] == answer["position"] - 3 * sum(answer["tiles"])
    world.write_lines(tmp_path / "questions.jsonl", [row | {"max_tiles": 0}])
    assert evaluate(tmp_path, tmp_path / "other", ["requests"]) == 1
    assert "questions.jsonl line 1" in capsys.readouterr().err


def test_the_report_counts_the_rows_of_each_task(tmp_path, monkeypatch, capsys):
    StandIn(monkeypatch)
    asked = {"prompt": "Where?", "expected": "here"}
    rows = [asked | {"task": task} for task in ("a", "b", "b")]
    world.write_lines(tmp_path / "questions.jsonl", rows)
    monkeypatch.setattr(world, "right_answer", lambda task, row: "here")
    for more, found in (((), ["1", "2"]), (("--limit", "2"), ["1 of 3", "1 of 3"])):
        assert evaluate(tmp_path, tmp_path / f"output{len(more)}", ["requests"], *more) == 0
        printed = capsys.readouterr().out
        for task, count in zip("ab", found, strict=True):
            assert f"| {task} | delta 1 | 100.00 |  |  | {count} |" in printed


def test_the_best_of_several_answers_keeps_the_options_of_a_line():
    calls = []

    def choose(pairs, names, **options):
        calls.append((names, options))
        return [Choice([Candidate(name, name, 1)], 0, 10, [1], 1, 0.5) for name in names]

    asked = [
        asking.Question("a?", [], name, changes)
        for name, changes in (("1", {}), ("2", {}), ("3", {"max_tiles": 2}), ("4", {}))
    ]
    rows = asking.choose_best(choose, asked, {"delta": "1"})
    assert [row["text"] for row in rows] == ["1", "2", "3", "4"]
    assert calls == [
        (["1", "2"], {"delta": "1"}),
        (["3"], {"delta": "1", "max_tiles": 2}),
        (["4"], {"delta": "1"}),
    ]
