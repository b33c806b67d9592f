"""What a run of the evaluation writes: files for servers and judges, Overalls, the image."""

import json
import zipfile
from xml.etree import ElementTree

import pytest

from internvl3_jax.evaluate import report, scoring
from internvl3_jax.evaluate.loaders import mantis
from internvl3_jax.evaluate.picture import _rows, draw
from internvl3_jax.evaluate.task_table import TASKS
from internvl3_jax.evaluate.variant import Variant
from tests.support import evaluate_world as world
from tests.support.evaluate_runs import StandIn, evaluate, read_report


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


def test_what_is_missing_is_said(tmp_path, monkeypatch, capsys):
    names = ["docvqa", "mmvet", "mmstar"]
    data = world.build(tmp_path / "data", [TASKS[name] for name in names])
    StandIn(monkeypatch)
    monkeypatch.setattr(world, "right_answer", lambda task, row: "B. a dog")
    assert evaluate(data, tmp_path / "output", names, "--limit", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "- the file to be scored is written once all rows are answered: docvqa, mmvet" in lines
    assert "- no row of the card has this model's sizes; --card SIZE compares with one" in lines
    assert not (tmp_path / "output" / "submit").exists()
    assert evaluate(data, tmp_path / "output", names, "--card", "1B") == 0
    printed = capsys.readouterr().out
    assert "once all rows" not in printed and "no row of the card" not in printed
    assert len(list((tmp_path / "output" / "submit").iterdir())) == 2


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


def test_the_image_shows_groups_and_steps():
    results = [
        scoring.Result(Variant(TASKS["mme"], delta), {"MME": 2415.4}, 1, 1, 0.0, 0.0, {})
        for delta in (None, "1/4")
    ]
    found = report.as_json(results, {"card": "8B", "delta": 256, "left_out": []})
    assert _rows(found) == [
        (
            "Comprehensive",
            "MME (delta 1)",
            pytest.approx(80.51, abs=0.01),
            pytest.approx(80.51, abs=0.01),
        ),
        (
            "Comprehensive",
            "MME (delta 1/4)",
            pytest.approx(80.51, abs=0.01),
            pytest.approx(80.51, abs=0.01),
        ),
    ]
    assert draw(found).startswith(b"\x89PNG") and draw(found | {"tasks": [], "groups": []}) is None
