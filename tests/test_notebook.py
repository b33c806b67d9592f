"""The notebooks run from top to bottom on the shipped model, and what is stored of them is what they
promise.
"""

import functools
import json
import os
import pathlib
import re

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
MODEL = ROOT / "examples" / "tiny_digits"
# Figures of each notebook.
FIGURES = {"quickstart": 6, "v2pe": 5, "finetune": 3}
# What makes a notebook short enough for the tests.
SHORTER = {
    "finetune": {"STEPS = 200": "STEPS = 2", "1000, rng": "24, rng", "40, rng": "8, rng"},
}


def stored(name: str):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


@functools.cache
def executed(name: str):
    """The code cells after running; a cell that raises fails here, with its traceback."""
    notebook = stored(name)
    for old, new in SHORTER.get(name, {}).items():
        assert sum(old in cell.source for cell in notebook.cells) == 1, old
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new)
    # The kernel is a separate program: it finds the clone by its path.
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    resources = {"metadata": {"path": FOLDER}}
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources)
    client.execute(env=os.environ | {"PYTHONPATH": path})
    return code_cells(notebook)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell, stream: str = "stdout") -> str:
    outputs = [output for output in cell.outputs if output.output_type == "stream"]
    return "".join(output.text for output in outputs if output.name == stream)


def draws(cell) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.outputs)


def check_shown(name: str, cells) -> None:
    """As many figures as promised, no warnings, and no cell but the imports that shows nothing."""
    assert sum(map(draws, cells)) == FIGURES[name]
    assert [printed(cell, "stderr") for cell in cells if printed(cell, "stderr")] == []
    assert all(draws(cell) or printed(cell) for cell in cells[1:])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "quickstart" else pytest.mark.slow)
        for name in FIGURES
    ],
)
def test_every_step_shows_something(name):
    check_shown(name, executed(name))


@pytest.mark.parametrize("name", FIGURES)
def test_outputs_are_stored(name):
    """GitHub shows them. They are of a complete run in order."""
    cells = code_cells(stored(name))
    check_shown(name, cells)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert str(ROOT.parent) not in json.dumps(stored(name)["cells"])  # no path of a machine


def test_every_notebook_is_listed():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == FIGURES.keys()


def test_quickstart_answers():
    """The image that the notebook opens is read right at delta 1, and answered at every other."""
    cells = executed("quickstart")
    source = "".join(cell.source for cell in cells)
    image = "pictures/" + re.search(r'"pictures" / "([^"]+)"', source)[1]
    questions = [json.loads(line) for line in (MODEL / "questions.jsonl").read_text().splitlines()]
    expected = next(row["expected"] for row in questions if row["image"] == [image])
    pattern = re.compile(r"^delta (\S+) +(.*?) +\(", re.M)
    answers = dict(pattern.findall("".join(map(printed, cells))))
    assert list(answers) == ["1", "1/2", "1/4"]
    assert answers["1"] == expected
    assert all(re.fullmatch(r"\d{1,5}", answer) for answer in answers.values())


def test_the_stored_training_learned():
    """Before, the model has never seen a price tag; after, it reads nearly all of the unseen ones."""
    text = "".join(map(printed, code_cells(stored("finetune"))))
    before, after = (
        int(re.search(rf"^{when}: +(\d+) of 40 are right", text, re.M)[1])
        for when in ("before", "after")
    )
    assert before <= 2 and after >= 36
