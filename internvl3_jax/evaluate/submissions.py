"""Files for those who score what cannot be scored here: a benchmark's server, or a judge.

Each function of FORMS takes (rows, answers) and returns the bytes of the file. Tables have
VLMEvalKit's form of predictions: the columns of the data without the image, and "prediction".
"""

import io
import json
import pathlib
import zipfile
from collections.abc import Callable, Sequence
from xml.sax.saxutils import escape

from internvl3_jax.evaluate.scoring import Result
from internvl3_jax.evaluate.task import Loaded, Row
from internvl3_jax.io import safe_files
from internvl3_jax.io.terminal import UNSAFE

# Columns that MMBench's server does not take, and the place of "prediction" among the others.
_MMBENCH_LEFT_OUT = ("hint", "category", "source", "image", "comment", "l2-category")
_MMBENCH_PLACE = 6


def write(result: Result, loaded: Loaded, answers: Sequence[dict], folder: pathlib.Path) -> str:
    """Writes the file of a task, and returns its path; "" for a task that is scored here.

    A run that did not answer every row writes none.
    """
    task = result.variant.task
    if not task.file_form or not result.whole:
        return ""
    name = task.file_name
    if task.file_form == "table":
        stem = name.removesuffix(".xlsx")
        name = f"{result.variant.name.replace(task.name, f'internvl3_jax_{stem}', 1)}.xlsx"
    elif result.variant.name != task.name:
        name = f"{result.variant.name}.{name}"
    folder.mkdir(parents=True, exist_ok=True)
    texts = [answer["text"] for answer in answers]
    safe_files.replace(folder / name, FORMS[task.file_form](loaded.rows, texts))
    return str(folder / name)


def _json(value) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode("utf-8")


def docvqa(rows: Sequence[Row], answers: Sequence[str]) -> bytes:
    return _json(
        [
            {"questionId": row.values["question_id"], "answer": answer}
            for row, answer in zip(rows, answers, strict=True)
        ]
    )


def infovqa(rows: Sequence[Row], answers: Sequence[str]) -> bytes:
    return _json(
        [
            {
                "question": row.question,
                "questionId": row.values["question_id"],
                "answer": answer,
                "annotation": row.answer,
            }
            for row, answer in zip(rows, answers, strict=True)
        ]
    )


def mmvet2(rows: Sequence[Row], answers: Sequence[str]) -> bytes:
    return _json({row.id: answer for row, answer in zip(rows, answers, strict=True)})


def mmhal(rows: Sequence[Row], answers: Sequence[str]) -> bytes:
    """Returns the file's records without the image, with "model_answer", in their order."""
    return _json(
        [
            row.values | {"question": row.question, "model_answer": answer}
            for row, answer in zip(rows, answers, strict=True)
        ]
    )


def mmbench(rows: Sequence[Row], answers: Sequence[str]) -> bytes:
    """Returns the table of MMBench's server. The prediction is the choice read by our own code."""
    from internvl3_jax.evaluate.scorers.options import option_first

    columns = [name for name in rows[0].values["columns"] if name not in _MMBENCH_LEFT_OUT]
    read = [
        option_first(answer, row.options) if answer.strip() else ""
        for row, answer in zip(rows, answers, strict=True)
    ]
    return _table(rows, columns, read, min(_MMBENCH_PLACE, len(columns)))


def table(rows: Sequence[Row], answers: Sequence[str]) -> bytes:
    columns = [name for name in rows[0].values["columns"] if name != "image"]
    return _table(rows, columns, answers, len(columns))


def _table(rows: Sequence[Row], columns: list[str], answers: Sequence[str], place: int) -> bytes:
    lines = [[*columns[:place], "prediction", *columns[place:]]]
    for row, answer in zip(rows, answers, strict=True):
        # As the file has them: a loader may have parsed a printed list.
        cells = [_text(row.values.get(name)) for name in columns]
        lines.append([*cells[:place], answer, *cells[place:]])
    return workbook(lines)


def _text(value) -> str:
    return "" if value is None else value if isinstance(value, str) else str(value)


# --- workbooks ------------------------------------------------------------------------------------

_PARTS = {
    "[Content_Types].xml": (
        '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
        '<Default Extension="rels" '
        'ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        '<Default Extension="xml" ContentType="application/'
        'vnd.openxmlformats-officedocument.spreadsheetml.sheet.main+xml"/>'
        '<Override PartName="/xl/worksheets/sheet1.xml" ContentType="application/'
        'vnd.openxmlformats-officedocument.spreadsheetml.worksheet+xml"/></Types>'
    ),
    "_rels/.rels": (
        '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
        '<Relationship Id="rId1" Type="http://schemas.openxmlformats.org/officeDocument/2006/'
        'relationships/officeDocument" Target="xl/workbook.xml"/></Relationships>'
    ),
    "xl/_rels/workbook.xml.rels": (
        '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
        '<Relationship Id="rId1" Type="http://schemas.openxmlformats.org/officeDocument/2006/'
        'relationships/worksheet" Target="worksheets/sheet1.xml"/></Relationships>'
    ),
    "xl/workbook.xml": (
        '<workbook xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main" '
        'xmlns:r="http://schemas.openxmlformats.org/officeDocument/2006/relationships"><sheets>'
        '<sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>'
    ),
}
_SHEET = '<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData>'
_WHOLE_DIGITS = 15  # that a cell keeps exactly
_LONGEST_CELL = 32767  # characters, by the format


def workbook(lines: Sequence[Sequence[str]]) -> bytes:
    """Returns an XLSX file with one sheet. Whole numbers become numbers, all else stays text.

    Control characters, which the format has no place for, are left out; texts beyond the format's
    limit are cut.
    """
    rows = "".join(f"<row>{''.join(map(_cell, line))}</row>" for line in lines)
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as file:
        for name, text in {
            **_PARTS,
            "xl/worksheets/sheet1.xml": f"{_SHEET}{rows}</sheetData></worksheet>",
        }.items():
            header = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
            # With a fixed time, so that equal tables are equal files.
            file.writestr(zipfile.ZipInfo(name), (header + text).encode("utf-8"))
    return data.getvalue()


def _cell(text: str) -> str:
    if text.isascii() and text.isdigit() and len(text) <= _WHOLE_DIGITS and str(int(text)) == text:
        return f"<c><v>{text}</v></c>"
    text = escape(UNSAFE.sub("", text)[:_LONGEST_CELL])
    return f'<c t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>'


FORMS: dict[str, Callable[[Sequence[Row], Sequence[str]], bytes]] = {
    "docvqa": docvqa,
    "infovqa": infovqa,
    "mmvet2": mmvet2,
    "mmhal": mmhal,
    "mmbench": mmbench,
    "table": table,
}
