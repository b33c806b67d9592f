"""`python -m internvl3_jax.evaluate` with the digits model: answers, resuming, scores, report."""

import json
import pathlib
import zipfile
from xml.etree import ElementTree

import pytest

from internvl3_jax.evaluate import asking, card, command, report, scoring
from internvl3_jax.evaluate.loaders import mantis
from internvl3_jax.evaluate.task_table import TASKS
from internvl3_jax.evaluate.variant import Variant, variants
from tests.support import evaluate_world as world

MODEL = str(pathlib.Path(__file__).parent.parent / "examples" / "tiny_digits")
# One task of every loader.
NAMES = (
    "mmstar mlvu mvbench mantis docvqa pope mme mmbench_en mmiu mirb refcoco_val mmvet2 mmhal "
    "requests"
).split()


def evaluate(data, output, names, *more: str) -> int:
    return command.main(
        ["--checkpoint", MODEL, "--data", str(data), "--tasks", ",".join(names)]
        + ["--output", str(output), "--compilation_cache", "", *more]
    )


def rescore(data, output, names, *more: str) -> int:
    return command.main(
        ["--rescore", "--data", str(data), "--tasks", ",".join(names), "--output", str(output)]
        + list(more)
    )


def read_report(output) -> dict:
    return json.loads((output / "report.json").read_text())


def test_every_loader_end_to_end(tmp_path, monkeypatch, capsys):
    """Six rows of each are answered by the model; what is to be sent elsewhere is written."""
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


class StandIn:
    """In place of `asking.answer`: right answers, and a record of what was asked."""

    def __init__(self, monkeypatch, stop_after: int | None = None, wrong: tuple[str, ...] = ()):
        self.asked, self.options, self.stop_after, self.wrong = [], [], stop_after, wrong
        self.rows = {}
        monkeypatch.setattr(asking, "answer", self)
        make_question = asking.make_question

        def remember(variant, row):
            self.rows[row.where] = (variant, row)
            return make_question(variant, row)

        monkeypatch.setattr(asking, "make_question", remember)

    def __call__(self, chat, questions, options, choose=None):
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked += [question.name for question in questions]
        self.options += [options] * len(questions)
        return [{"text": self.text(question.name), "finish": "stop"} for question in questions]

    def text(self, name: str) -> str:
        variant, row = self.rows[name]
        wrong = row.id in self.wrong or (variant.frames and variant.frames < 32)
        return "?" if wrong else world.right_answer(variant.task, row)


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


def test_a_whole_group_has_an_overall(tmp_path, monkeypatch):
    names = ["blink", "mmt", "muirbench", "mantis", "mmiu", "mirb"]
    data = world.build(tmp_path / "data", [TASKS[name] for name in names])
    monkeypatch.setattr(mantis, "read_parquet", lambda path: world.MANTIS)
    StandIn(monkeypatch)
    assert evaluate(data, tmp_path / "output", ["multi_image"], "--card", "38B") == 0
    (group,) = read_report(tmp_path / "output")["groups"]
    assert group == {
        "group": "multi_image",
        "delta": "1",
        "overall": 100.0,
        "card": 66.2,
        "difference": pytest.approx(33.8),
    }
    assert "| **Several images** | delta 1 | 100.00 | 66.20 | +33.80 |" in (
        (tmp_path / "output" / "report.md").read_text()
    )


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


def test_files_for_servers_and_judges(tmp_path, monkeypatch):
    names = ["docvqa", "infovqa", "mmbench_cn", "mmbench_v11", "mmvet2", "mmhal", "mmvet"]
    data = world.build(tmp_path / "data", [TASKS[name] for name in names])
    StandIn(monkeypatch)
    monkeypatch.setattr(world, "right_answer", lambda task, row: "B. a dog")
    assert evaluate(data, tmp_path / "output", names) == 0
    folder = tmp_path / "output" / "submit"
    docvqa = json.loads((folder / "docvqa_test.json").read_text())
    assert docvqa[3] == {"questionId": 3, "answer": "B. a dog"} and len(docvqa) == 6
    infovqa = json.loads((folder / "infographicsvqa_test.json").read_text())
    assert set(infovqa[0]) == {"question", "questionId", "answer", "annotation"}
    assert json.loads((folder / "mm-vet-v2.json").read_text())["v2_5"] == "B. a dog"
    mmhal = json.loads((folder / "mmhal.json").read_text())
    assert mmhal[2] == {"question": "What 2?", "answer": "x", "model_answer": "B. a dog"}
    table = cells(folder / "mmbench_test_cn_20231003.xlsx")
    assert table[0] == ["index", "question", "A", "B", "C", "D", "prediction", "split"]
    assert table[1][6] == "B" and table[1][0] == "0"
    table = cells(folder / "internvl3_jax_MMBench_TEST_EN_V11.xlsx")
    assert table[0][-1] == "prediction" and "image" not in table[0] and table[6][-1] == "B. a dog"
    assert (folder / "internvl3_jax_MMVet.xlsx").is_file()


def cells(path) -> list[list[str]]:
    """The cells of a workbook as text."""
    with zipfile.ZipFile(path) as file:
        sheet = ElementTree.fromstring(file.read("xl/worksheets/sheet1.xml"))
    space = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
    return [
        ["".join(cell.itertext()) for cell in row.iter(f"{space}c")]
        for row in sheet.iter(f"{space}row")
    ]


def test_the_published_file_is_recognized(tmp_path, monkeypatch):
    data = world.build(tmp_path / "data", [TASKS["mmstar"]])
    path = str(data / "MMStar.tsv")
    ((name, (digest, known)),) = scoring.digests([path]).items()
    assert (name, known) == ("MMStar.tsv", False)
    monkeypatch.setitem(scoring.KNOWN_MD5, "MMStar.tsv", digest)
    assert scoring.digests([path]) == {"MMStar.tsv": (digest, True)}


def test_the_picture_shows_groups_and_steps():
    results = [
        scoring.Result(Variant(TASKS["mme"], delta), {"MME": 2415.4}, 1, 1, 0.0, 0.0, {})
        for delta in (None, "1/4")
    ]
    found = report.as_json(results, {"card": "8B", "delta": 256, "left_out": []})
    from internvl3_jax.evaluate.picture import _rows, draw

    assert _rows(found) == [
        ("MME (delta 1)", pytest.approx(80.51, abs=0.01), pytest.approx(80.51, abs=0.01)),
        ("MME (delta 1/4)", pytest.approx(80.51, abs=0.01), pytest.approx(80.51, abs=0.01)),
    ]
    assert draw(found).startswith(b"\x89PNG") and draw(found | {"tasks": [], "groups": []}) is None


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
