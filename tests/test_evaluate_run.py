"""`python -m internvl3_jax.evaluate` with the digits model: answers, resuming, scores, report."""

import json
import pathlib

import pytest

from internvl3_jax.evaluate import asking, card, command
from internvl3_jax.evaluate.loaders import mantis
from internvl3_jax.evaluate.task_table import TASKS
from internvl3_jax.evaluate.variant import Variant, variants
from internvl3_jax.reward.best_of_n import Candidate, Choice
from tests.support import evaluate_world as world
from tests.support.evaluate_runs import StandIn, evaluate, read_report, rescore

# One task of every loader.
NAMES = (
    "mmstar mlvu mvbench mantis docvqa pope mme mmbench_en mmiu mirb refcoco_val mmvet2 mmhal "
    "requests"
).split()


def test_every_loader_end_to_end(tmp_path, monkeypatch, capsys):
    """Six rows of each are answered by the model; what is scored elsewhere is written."""
    data = world.build(tmp_path / "data", [TASKS[name] for name in NAMES])
    output = tmp_path / "output"
    monkeypatch.setattr(mantis, "read_parquet", lambda path: world.MANTIS)
    # batches of one size, so that few programs are compiled
    more = ["--frames", "2", "--card", "1B", "--limit", "6", "--batch_size", "6"]
    more += ["--max_new_tokens", "4"]
    assert evaluate(data, output, NAMES, *more) == 0
    printed = capsys.readouterr().out
    found = {task["task"]: task for task in read_report(output)["tasks"]}
    assert list(found) == NAMES
    undefined = ("mmiu", "mirb", "mme")  # tasks are missing; no answer is a yes or a no
    for name, task in found.items():
        rows = len(command.load(TASKS[name], data).rows)
        lines = (output / "answers" / f"{task['run']}.jsonl").read_text().splitlines()
        assert task["answered"] == len(lines) == 6 and task["rows"] == rows
        assert all(json.loads(line)["new_tokens"] <= 4 for line in lines)
        assert bool(task["written"]) == (TASKS[name].scorer == "none")
        assert bool(task["problem"]) == (name in undefined or bool(task["written"]))
        for column in TASKS[name].columns:
            assert f"| {column} | " in printed or name == "requests"
    assert {pathlib.Path(task["written"]).name for task in found.values()} == {
        "",
        "docvqa_test.json",
        "mmbench_test_en_20231003.xlsx",
        "mm-vet-v2.json",
        "mmhal.json",
    }
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "report.md").read_text() == printed
    assert found["mmstar"]["card"] == {"MMStar": 51.5}
    assert "differs from the published file" in printed and "no published MD5" in printed


# --- with answers of a stand-in -------------------------------------------------------------------


def test_a_stopped_run_asks_nothing_twice(tmp_path, monkeypatch, capsys):
    data = world.build(tmp_path / "data", [TASKS["mmstar"], TASKS["pope"]])
    output, more = tmp_path / "output", ("--batch_size", "2", "--card", "8B")
    first = StandIn(monkeypatch, stop_after=8)
    assert evaluate(data, output, ["mmstar", "pope"], *more) == 130
    assert len(first.asked) == 8
    # A kill may also leave half of a line.
    with open(output / "answers" / "pope.jsonl", "ab") as file:
        file.write(b'{"id": "2", "pro')
    second = StandIn(monkeypatch)
    assert evaluate(data, output, ["mmstar", "pope"], *more) == 0
    assert not set(first.asked) & set(second.asked)
    assert len(first.asked) + len(second.asked) == 2 * world.ROWS
    found = read_report(output)["tasks"]
    assert [task["scores"][name] for task, name in zip(found, ("MMStar", "POPE"), strict=True)] == [
        100,
        100,
    ]
    assert found[0]["card"] == {"MMStar": 68.2}
    assert found[0]["difference"]["MMStar"] == pytest.approx(31.8)
    third = StandIn(monkeypatch)
    assert evaluate(data, output, ["mmstar", "pope"], *more) == 0
    assert third.asked == [] and read_report(output)["tasks"] == found
    assert "are cut off" in capsys.readouterr().err


def test_other_data_or_settings_are_refused(tmp_path, monkeypatch, capsys):
    data = world.build(tmp_path / "data", [TASKS["mmstar"]])
    StandIn(monkeypatch)
    assert evaluate(data, tmp_path / "output", ["mmstar"]) == 0
    path = data / "MMStar.tsv"
    text = path.read_text()
    path.write_text(text.replace("a red car", "a blue car"))
    assert evaluate(data, tmp_path / "output", ["mmstar"]) == 1
    assert "holds answers of another model or other settings: data is" in capsys.readouterr().err
    path.write_text(text.replace("Question 2", "Question two"))
    assert rescore(data, tmp_path / "output", ["mmstar"]) == 1
    assert "holds answers to other questions than were asked (line 3" in capsys.readouterr().err


def test_rescoring_needs_no_model(tmp_path, monkeypatch, capsys):
    data, output = world.build(tmp_path / "data", [TASKS["mmstar"]]), tmp_path / "output"
    assert rescore(data, output, ["mmstar"]) == 1
    assert "has no answers of these tasks; run it without --rescore" in capsys.readouterr().err
    StandIn(monkeypatch, wrong=("0", "1", "2"))
    assert evaluate(data, output, ["mmstar"], "--card", "2B", "--limit", "4") == 0
    whole = read_report(output)
    assert whole["tasks"][0]["scores"] == {"MMStar": 25.0} and whole["tasks"][0]["answered"] == 4
    monkeypatch.setattr("internvl3_jax.evaluate.running.answer_all", None)
    assert rescore(data, output, ["mmstar"]) == 0
    assert read_report(output) == whole
    # More rows continue the same file.
    answers = output / "answers" / "mmstar.jsonl"
    answers.write_text(answers.read_text().replace('"?"', '"A"', 1))
    assert rescore(data, output, ["mmstar"]) == 0
    assert read_report(output)["tasks"][0]["scores"] == {"MMStar": 50.0}


def test_steps_are_compared_and_recorded(tmp_path, monkeypatch, capsys):
    data, output = world.build(tmp_path / "data", [TASKS["mmstar"]]), tmp_path / "output"
    stand_in = StandIn(monkeypatch)
    assert evaluate(data, output, ["mmstar"], "--delta", "1", "1/4", "--card", "8B") == 0
    found = read_report(output)["tasks"]
    assert [(task["delta"], task["run"]) for task in found] == [
        ("1", "mmstar.delta_1"),
        ("1/4", "mmstar.delta_1_4"),
    ]
    assert [options["delta"] for options in stand_in.options] == ["1"] * 6 + ["1/4"] * 6
    assert evaluate(data, output, ["mmstar"]) == 0
    assert read_report(output)["tasks"][0]["delta"] == "1"  # the checkpoint's own, written out
    assert rescore(data, output, ["mmstar"], "--delta", "1/4") == 0
    assert [task["run"] for task in read_report(output)["tasks"]] == ["mmstar.delta_1_4"]
    assert evaluate(data, output, ["mmstar"], "--delta", "1/3") == 1
    assert "delta '1/3' is not a multiple of 1/256" in capsys.readouterr().err


def test_the_best_number_of_frames_counts(tmp_path, monkeypatch):
    data, output = world.build(tmp_path / "data", [TASKS["mlvu"]]), tmp_path / "output"
    stand_in = StandIn(monkeypatch)
    assert evaluate(data, output, ["mlvu"], "--frames", "16", "32") == 0
    found = read_report(output)["tasks"]
    assert [(task["frames"], task["scores"]["MLVU"]) for task in found] == [(16, 0.0), (32, 100.0)]
    assert {options["max_tiles"] for options in stand_in.options} == {1}
    assert rescore(data, output, ["mlvu"]) == 0 and read_report(output)["tasks"] == found
    assert rescore(data, output, ["mlvu"], "--frames", "32", "48", "64") == 0
    assert read_report(output)["left_out"] == [
        "mlvu.48_frames, mlvu.64_frames: there are no answers"
    ]
    assert [run.frames for run in variants([TASKS["mlvu"]])] == [16, 32, 48, 64]


def test_a_group_leaves_out_what_has_no_files(tmp_path, monkeypatch, capsys):
    data, output = world.build(tmp_path / "data", [TASKS["pope"], TASKS["crpe"]]), tmp_path / "o"
    StandIn(monkeypatch)
    assert evaluate(data, output, ["hallucination"]) == 0
    found = read_report(output)
    assert [task["task"] for task in found["tasks"]] == ["crpe", "pope"] and found["groups"] == []
    assert [text.split(":")[0] for text in found["left_out"]] == ["hallusionbench", "mmhal"]
    assert "- left out: mmhal: " in (output / "report.md").read_text()
    assert evaluate(data, output, ["ocr"]) == 1
    assert "no task of ocr has its files in" in capsys.readouterr().err


def test_reasoning_as_in_the_cards_runs():
    tasks = [TASKS["mmmu"], TASKS["mmstar"]]
    for size, mode, best_of, expected in (
        ("8B", "auto", None, True),
        ("2B", "auto", None, False),
        ("2B", "on", None, True),
        ("8B", "off", None, False),
        ("1B", "auto", 8, True),
        (None, "auto", None, True),
    ):
        found = variants(tasks, reasoning=mode, size=size, best_of=best_of)
        assert [run.reasoning for run in found] == [expected, False]
    assert Variant(TASKS["mmmu"], "1/4", None, True, 8).name == "mmmu.reasoning.best_of_8.delta_1_4"


def test_one_of_several_answers_is_chosen():
    """The seam to the model hands questions, images and options on, and says how it ended."""

    def choose(pairs, names, **options):
        assert (pairs, names, options) == ([("a?", ["b.png"])], ["row 1"], {"max_tiles": 6})
        candidates = [Candidate("x", "x", 1), Candidate("y", "y", 1, finish="length")]
        return [Choice(candidates, 1, 10, [1], 4, 0.5)]

    question = asking.Question("a?", ["b.png"], "row 1")
    (row,) = asking.choose_best(choose, [question], {"max_tiles": 6})
    assert (row["text"], row["finish"], row["best"], row["new_tokens"]) == ("y", "length", 1, 4)


def test_a_row_that_cannot_be_asked_is_named(tmp_path, capsys):
    """What was asked before it is answered and stays."""
    data, output = world.build(tmp_path / "data", [TASKS["mmstar"]]), tmp_path / "output"
    lines = (data / "MMStar.tsv").read_text().split("\n")
    lines[6] = lines[6].replace("\tiVBOR", "\tiVB0R")
    (data / "MMStar.tsv").write_text("\n".join(lines))
    more = ["--batch_size", "6", "--max_new_tokens", "4"]
    assert evaluate(data, output, ["mmstar"], *more) == 1
    assert "MMStar.tsv row 6 (index 5)" in capsys.readouterr().err
    assert len((output / "answers" / "mmstar.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("--checkpoint X", 2, "--data is missing"),
        ("--data . --output . --tasks mmstar", 2, "give --checkpoint, or --rescore"),
        ("--data . --output . --tasks mmstar --checkpoint X --best_of 8", 2, "go together"),
        ("--data . --output . --tasks mmstar --checkpoint X --limit 0", 2, "--limit is 0; it must"),
        ("--data . --output . --tasks mmster --checkpoint X", 1, "did you mean 'mmstar'"),
        ("--data . --output . --tasks mmstar --checkpoint X", 1, "MMStar.tsv: no such file"),
    ],
)
def test_wrong_options_are_named(arguments, status, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main(arguments.split()) == status
    assert message in capsys.readouterr().err


def test_the_list_has_every_task(capsys):
    assert command.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines[4:]} == set(TASKS)
    assert [line.split(":")[0] for line in lines[:4]] == ["rule", "reasoning", "server", "judge"]
    assert set(card.GROUPS) <= {line.split()[1] for line in lines[4:]}
