"""The report of a run: a table for people, report.json for programs, and an image."""

import fractions
import json
import pathlib
from collections.abc import Mapping, Sequence

from internvl3_jax.evaluate import card
from internvl3_jax.evaluate.scoring import Result, best_scores, group_scores
from internvl3_jax.evaluate.task import EXACTNESS
from internvl3_jax.io import safe_files
from internvl3_jax.positions import UNITS

OWN_STEP = "the checkpoint's"


def step_of(delta: str | None, own: int | None) -> str:
    """Returns a V2PE step as text. own: of the checkpoint, in 1/256; None if it is not known."""
    if delta is not None:
        return str(fractions.Fraction(delta))
    return OWN_STEP if own is None else str(fractions.Fraction(own, UNITS))


def as_json(results: Sequence[Result], model: Mapping) -> dict:
    """Returns the report.

    Args:
      model: what is known of the run: "checkpoint", "card" (the size of the card's row, or None),
        "delta" (the checkpoint's own step in 1/256), "left_out" and more.
    """
    size = model.get("card")
    tasks = [_task_json(result, size, model) for result in results]
    groups = []
    for delta in dict.fromkeys(result.variant.delta for result in results):
        chosen = [result for result in results if result.variant.delta == delta]
        best_of = next((result.variant.best_of for result in chosen), None)
        scores = best_scores(chosen)
        for name, overall in group_scores(scores).items():
            printed = _published(name, size, best_of).get("Overall")
            groups.append(
                {
                    "group": name,
                    "delta": step_of(delta, model.get("delta")),
                    "overall": overall,
                    "card": printed,
                    "difference": _difference(overall, printed),
                }
            )
    return dict(model) | {"tasks": tasks, "groups": groups}


def _published(group: str, size: str | None, best_of: int | None) -> dict[str, float]:
    if size is None or group not in card.GROUPS:
        return {}
    return card.GROUPS[group].published(size, best_of is not None)


def _difference(ours: float | None, printed: float | None) -> float | None:
    return None if ours is None or printed is None else ours - printed


def _task_json(result: Result, size: str | None, model: Mapping) -> dict:
    task, variant = result.variant.task, result.variant
    printed = _published(task.group, size, variant.best_of)
    return {
        "task": task.name,
        "group": task.group,
        "run": variant.name,
        "delta": step_of(variant.delta, model.get("delta")),
        "frames": variant.frames,
        "reasoning": variant.reasoning,
        "best_of": variant.best_of,
        "answered": result.answered,
        "rows": result.rows,
        "counts": result.counts,
        "scores": result.scores,
        "card": {column: printed.get(column) for column in task.columns},
        "difference": {
            column: _difference(result.scores.get(column), printed.get(column))
            for column in task.columns
        },
        "exact": task.exact,
        "program": task.program,
        "unreadable": result.unreadable,
        "cut": result.cut,
        "files": {
            name: {"md5": digest, "known": known} for name, (digest, known) in result.files.items()
        },
        "problem": result.problem,
        "written": result.written,
        "note": task.note,
    }


def as_table(report: Mapping) -> str:
    """Returns the report as a Markdown table, with remarks below it."""
    lines = [
        "| column | run | ours | card | difference | rows | unreadable | cut | data |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for task in report["tasks"]:
        for column in _columns(task):
            cells = [
                column,
                _run_text(task),
                _number(task["scores"].get(column)) or task["problem"],
                _number(task["card"].get(column)),
                _signed(task["difference"].get(column)),
                _rows_text(task, column),
                f"{task['unreadable']:.1%}",
                f"{task['cut']:.1%}",
                _data_text(task["files"]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    for group in report["groups"]:
        title = card.GROUPS[group["group"]].title
        cells = [f"**{title}**", f"delta {group['delta']}", _number(group["overall"])]
        cells += [_number(group["card"]), _signed(group["difference"]), "", "", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *_remarks(report)]) + "\n"


def _columns(task: Mapping) -> list[str]:
    """Returns the columns of a task or, of one whose metric names them itself, all scores."""
    named = any(column in task["scores"] for column in task["card"])
    return list(task["card"] if named or not task["scores"] else task["scores"])


def _run_text(task: Mapping) -> str:
    parts = [f"delta {task['delta']}"]
    parts += [f"{task['frames']} frames"] if task["frames"] else []
    parts += ["reasoning"] if task["reasoning"] else []
    parts += [f"best of {task['best_of']}"] if task["best_of"] else []
    return ", ".join(parts)


def _rows_text(task: Mapping, column: str) -> str:
    """Returns how many rows a number is of; where not all are answered, also of how many."""
    if task["answered"] < task["rows"]:
        return f"{task['counts'].get(column, task['answered'])} of {task['rows']}"
    return str(task["counts"].get(column, task["rows"]))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"


def _data_text(files: Mapping) -> str:
    known = [entry["known"] for entry in files.values()]
    if False in known:
        return "differs from the published file"
    return "the published file" if known and all(known) else "no published MD5"


def _remarks(report: Mapping) -> list[str]:
    lines = [""]
    kinds = {task["exact"] for task in report["tasks"]}
    lines += [f"- {kind}: {text}" for kind, text in EXACTNESS.items() if kind in kinds]
    for note in dict.fromkeys((task["task"], task["note"]) for task in report["tasks"]):
        lines += [f"- {note[0]}: {note[1]}"] if note[1] else []
    for task in report["tasks"]:
        more = {name: value for name, value in task["scores"].items() if name not in _columns(task)}
        if more:
            listed = ", ".join(f"{name} {_number(value)}" for name, value in more.items())
            lines.append(f"- {task['run']}: {listed}")
        if task["problem"] and task["scores"]:
            lines.append(f"- {task['run']}: {task['problem']}")
        if task["written"]:
            name = pathlib.Path(task["written"]).name
            lines.append(f"- {task['run']}: {name} can be scored elsewhere")
    unfinished = [
        task["run"]
        for task in report["tasks"]
        if task["exact"] in ("server", "judge") and task["answered"] < task["rows"]
    ]
    if unfinished:
        names = ", ".join(unfinished)
        lines.append(f"- the file to be scored is written once all rows are answered: {names}")
    if report.get("card") is None and any(task["group"] in card.GROUPS for task in report["tasks"]):
        lines.append("- no row of the card has this model's sizes; --card SIZE compares with one")
    lines += [f"- left out: {text}" for text in report.get("left_out", ())]
    return lines


def write(report: Mapping, folder: pathlib.Path) -> list[str]:
    """Writes report.json, report.md and, with matplotlib, report.png. Returns remarks."""
    safe_files.replace(folder / "report.json", json.dumps(report, indent=1) + "\n")
    safe_files.replace(folder / "report.md", as_table(report))
    try:
        from internvl3_jax.evaluate.picture import draw
    except ImportError:
        return ["no report.png: matplotlib is not installed (pip install matplotlib)"]
    picture = draw(report)
    if picture is None:
        return []
    safe_files.replace(folder / "report.png", picture)
    return []
