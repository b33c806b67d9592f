"""notebooks/quickstart.ipynb runs from top to bottom on the shipped model, and says what it
promises.
"""

import json
import os
import pathlib
import re

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "tiny_digits"


@pytest.fixture(scope="module")
def cells():
    """The executed code cells; a cell that raises fails here, with its traceback."""
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    # The kernel is a program of its own: warnings in it are its own affair, and it finds the clone
    # by its path.
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    }
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": ROOT / "notebooks"}},
    )
    client.execute(env=environment)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell) -> str:
    return "".join(
        output.text
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stdout"
    )


def test_every_step_shows_something(cells):
    """Pictures where pictures are promised: the question's, tiles, positions, attention by layer
    and by token.
    """
    drawn = [
        any("image/png" in output.get("data", {}) for output in cell.outputs) for cell in cells
    ]
    assert sum(drawn) == 5
    assert all(shows or printed(cell) for cell, shows in zip(cells, drawn, strict=True))
    assert not [
        output.text for cell in cells for output in cell.outputs if output.get("name") == "stderr"
    ]


def test_answers(cells):
    """The picture that the notebook opens is read right at delta 1, and answered at every other."""
    source = "".join(cell.source for cell in cells)
    picture = "pictures/" + re.search(r'"pictures" / "([^"]+)"', source)[1]
    questions = [json.loads(line) for line in (MODEL / "questions.jsonl").read_text().splitlines()]
    expected = next(
        question["expected"] for question in questions if question["image"] == [picture]
    )
    answers = dict(
        re.findall(r"^delta (\S+) +(.*?) +\(", "".join(map(printed, cells)), re.MULTILINE)
    )
    assert list(answers) == ["1", "1/2", "1/4"]
    assert answers["1"] == expected
    assert all(re.fullmatch(r"\d{1,5}", answer) for answer in answers.values())
