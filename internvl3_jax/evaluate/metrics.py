"""Turns the marks of a task into the card's numbers: one function for each way of averaging.

Each function of METRICS takes (task, rows, answers, marks) and returns name -> number, on the scale
of the card. The names are the task's columns; further ones are subtotals for the report.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from internvl3_jax.evaluate.scorers import yes_no
from internvl3_jax.evaluate.scorers.options import MIRB_GROUPS, crpe_row
from internvl3_jax.evaluate.task import Mark, Row, Task

Scores = dict[str, float]
MMIU_TASKS = (
    "point_tracking ravens_progressive_matrices single_object_tracking threed_cad_recognition "
    "threed_indoor_recognition Egocentric_Video_QuestionAnswering Homography_estimation "
    "Icon_Question_Answering_with_Spatial_Context Image_Captioning_with_Spatial_Context "
    "Image_Spatial_Transformation_Estimation Image_text_retrieval_with_Spatial_Context "
    "Multiview_Action_Recognition Multiview_reasoning jigsaw_puzzle_solving "
    "threeD_Depth_Estimation threeD_Object_Detection threeD_Object_Tracking threeD_Pose_Estimation "
    "threeD_Scene_Reconstruction threeD_question_answering"
).split()
WEMATH_PROBLEMS = 525
_ROTATION = 1_000_000  # rows whose index differs by a multiple are one question
_CRPE_ROWS = 4  # of one question
_VSI_COLUMNS = {
    "VSI count": ["object_counting"],
    "VSI abs. distance": ["object_abs_distance"],
    "VSI object size": ["object_size_estimation"],
    "VSI room size": ["room_size_estimation"],
    "VSI rel. distance": ["object_rel_distance"],
    "VSI rel. direction": [f"object_rel_direction_{level}" for level in ("easy", "medium", "hard")],
    "VSI route": ["route_planning"],
    "VSI order": ["obj_appearance_order"],
}


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    if not values:
        raise ValueError("there is nothing to average")
    return float(np.mean(values))


def _by(key: Callable[[Row], str], rows: Sequence[Row], marks: Sequence[Mark]) -> Scores:
    """Returns part -> mean of the marks in it."""
    parts: dict[str, list[float]] = {}
    for row, mark in zip(rows, marks, strict=True):
        if mark.value is not None:
            parts.setdefault(key(row), []).append(mark.value)
    return {name: _mean(values) for name, values in parts.items()}


def _percent(scores: Scores) -> Scores:
    return {name: 100 * value for name, value in scores.items()}


def mean(task: Task, rows, answers, marks) -> Scores:
    """Returns the mean over rows in percent; rows whose mark is None do not count."""
    return {task.columns[0]: 100 * _mean(m.value for m in marks if m.value is not None)}


def mean_of_parts(task: Task, rows, answers, marks) -> Scores:
    """Returns the mean of the parts' means (ChartQA), and that by the corrected tolerance."""
    parts = _by(lambda row: row.values["part"], rows, marks)
    corrected = [Mark(mark.values[1]) for mark in marks]
    other = _by(lambda row: row.values["part"], rows, corrected)
    name = task.columns[0]
    return _percent(
        {name: _mean(parts.values()), f"{name} (5 % of the reference)": _mean(other.values())}
        | {f"{name} {part}": value for part, value in parts.items()}
    )


def circular(task: Task, rows, answers, marks) -> Scores:
    """Returns the share of questions that are right in every rotation of their options."""
    return {
        task.columns[0]: 100
        * circular_mean([(row.id, m.value) for row, m in zip(rows, marks, strict=True)])
    }


def circular_mean(rows: Sequence[tuple[str, float]]) -> float:
    """Returns the mean over questions of (index, mark) pairs. Indices that are equal modulo
    1,000,000 belong to one question.
    """
    questions: dict[int, list[float]] = {}
    for index, value in rows:
        questions.setdefault(int(index) % _ROTATION, []).append(value)
    return _mean(min(values) for values in questions.values())


def mmiu(task: Task, rows, answers, marks) -> Scores:
    """Returns the mean over the 20 tasks that count."""
    scores = _by(lambda row: row.values["task"], rows, marks)
    if missing := [name for name in MMIU_TASKS if name not in scores]:
        raise ValueError(f"no row of {missing[0]}, one of the 20 tasks that count")
    return _percent({task.columns[0]: _mean(scores[name] for name in MMIU_TASKS)} | scores)


def mirb(task: Task, rows, answers, marks) -> Scores:
    """Returns the mean of the four groups' means of their tasks."""
    scores = _by(lambda row: row.values["task"], rows, marks)
    names = [name for group in MIRB_GROUPS.values() for name in group]
    if missing := [name for name in names if name not in scores]:
        raise ValueError(f"no row of {missing[0]}, one of the 11 tasks that count")
    groups = {group: _mean(scores[name] for name in names) for group, names in MIRB_GROUPS.items()}
    return _percent({task.columns[0]: _mean(groups.values())} | groups | scores)


def ocrbench(task: Task, rows, answers, marks) -> Scores:
    """Returns the number of right answers."""
    return {task.columns[0]: sum(mark.value for mark in marks)}


def mme(task: Task, rows, answers, marks) -> Scores:
    """Returns the sum of the tasks' scores."""
    parts: dict[str, list[tuple[str, str]]] = {}
    for row, answer in zip(rows, answers, strict=True):
        parts.setdefault(row.values["task"], []).append((row.answer, answer))
    scores = {}
    for name, pairs in parts.items():
        try:
            scores[name] = yes_no.mme_score(pairs)
        except ValueError as error:
            raise ValueError(f"task {name}: {error}") from error
    return {task.columns[0]: sum(scores.values())} | scores


def pope(task: Task, rows, answers, marks) -> Scores:
    """Returns the mean of the categories' F1 scores."""
    parts: dict[str, tuple[list[str], list[str]]] = {}
    for row, answer in zip(rows, answers, strict=True):
        texts, labels = parts.setdefault(row.values["category"], ([], []))
        texts.append(answer)
        labels.append(row.answer)
    try:
        scores = {name: yes_no.pope_f1(*part) for name, part in parts.items()}
    except ZeroDivisionError as error:
        raise ValueError("a category has no right yes, so that its F1 is not defined") from error
    return {task.columns[0]: _mean(scores.values())} | scores


def hallusion(task: Task, rows, answers, marks) -> Scores:
    """Returns the mean of aAcc, fAcc and qAcc."""
    scores = yes_no.hallusion(
        [
            (row.id, row.values["l2-category"], bool(mark.value))
            for row, mark in zip(rows, marks, strict=True)
        ]
    )
    names = ("aAcc", "fAcc", "qAcc")
    return {task.columns[0]: _mean(scores)} | dict(zip(names, scores, strict=True))


def crpe(task: Task, rows, answers, marks) -> Scores:
    """Returns the share of questions, four rows each, with all rows right."""
    groups = _crpe_groups([m.value for m in marks], [row.values["category"] for row in rows])
    scores = {name: _mean(values) for name, values in groups.items()}
    return _percent({task.columns[0]: scores.pop("total")} | scores)


def crpe_group(rows: Sequence[tuple[str, str, str]]) -> Scores:
    """Returns category -> share of right questions, and "total", of (reference, answer, category).

    Raises:
      ValueError: the number of rows is not a multiple of four.
    """
    right = [crpe_row(reference, answer) for reference, answer, _ in rows]
    groups = _crpe_groups(right, [category for *_, category in rows])
    return {name: _mean(values) for name, values in groups.items()}


def _crpe_groups(right: Sequence[float], categories: Sequence[str]) -> dict[str, list[bool]]:
    if len(right) % _CRPE_ROWS:
        raise ValueError(f"{len(right)} rows; every question of CRPE has {_CRPE_ROWS}")
    groups: dict[str, list[bool]] = {"total": []}
    for start in range(0, len(right), _CRPE_ROWS):
        value = all(right[start : start + _CRPE_ROWS])
        groups["total"].append(value)
        groups.setdefault(categories[start], []).append(value)
    return groups


def vcr(task: Task, rows, answers, marks) -> Scores:
    """Returns the means of exact match and Jaccard index over covered texts."""
    scores = [pair for mark in marks for pair in mark.values]
    return _percent(
        {name: _mean(pair[k] for pair in scores) for k, name in enumerate(task.columns)}
    )


def mme_realworld(rows: Sequence[tuple[str, float]]) -> Scores:
    """Returns the means over the questions of all, of Perception and of Reasoning; 0 for a half
    without questions. rows: (category, mark).
    """
    halves = {
        name: [value for category, value in rows if category.split("/")[0] == name]
        for name in ("Perception", "Reasoning")
    }
    return {"Overall": _mean(value for _, value in rows)} | {
        name: _mean(values) if values else 0.0 for name, values in halves.items()
    }


def dynamath_worst(rows: Sequence[tuple[str, float]]) -> Scores:
    """Returns the mean over rows and the share of questions that are right in all variants.
    rows: (question, mark).
    """
    questions: dict[str, list[float]] = {}
    for question, value in rows:
        questions.setdefault(question, []).append(value)
    return {
        "Average": _mean(value for _, value in rows),
        "Worst Case": _mean(min(values) for values in questions.values()),
    }


def dynamath(task: Task, rows, answers, marks) -> Scores:
    """Returns the worst case and the average."""
    scores = dynamath_worst(
        [(row.values["qid"], m.value) for row, m in zip(rows, marks, strict=True)]
    )
    name = task.columns[0]
    return _percent({name: scores["Worst Case"], f"{name} average": scores["Average"]})


def wemath_scores(
    problems: Sequence[Sequence[float]], total: int = WEMATH_PROBLEMS
) -> tuple[float, float]:
    """Returns the (strict, loose) score of WeMath (Qiao et al. 2024).

    Args:
      problems: marks of the steps of each problem, then that of the whole problem.
      total: number that the points are divided by; the kit's is that of the whole data set.
    """
    lost_strict = lost_loose = 0.0
    for *steps, whole in problems:
        if whole:
            # Right as a whole in spite of a wrong step: rote memorization.
            lost_strict += not all(steps)
            lost_loose += not any(steps)
        else:
            # Inadequate generalization, or insufficient knowledge.
            lost = 0.5 if all(steps) else 1.0
            lost_strict, lost_loose = lost_strict + lost, lost_loose + lost
    return 1 - lost_strict / total, 1 - lost_loose / total


def wemath(task: Task, rows, answers, marks) -> Scores:
    """Returns the strict and the loose score."""
    problems: dict[str, dict[str, float]] = {}
    for row, mark in zip(rows, marks, strict=True):
        problems.setdefault(row.values["ID"], {})[row.values["key"].split("_")[1]] = mark.value
    for name, parts in problems.items():
        if "multi" not in parts or sorted(parts)[:-1] != [
            str(k + 1) for k in range(len(parts) - 1)
        ]:
            raise ValueError(f"problem {name} lacks a step or the full problem")
    ordered = [
        [*(value for key, value in sorted(parts.items()) if key != "multi"), parts["multi"]]
        for parts in problems.values()
    ]
    strict, loose = wemath_scores(ordered)
    return _percent({task.columns[0]: strict, f"{task.columns[0]} (loose)": loose})


def vsi(task: Task, rows, answers, marks) -> Scores:
    """Returns the mean of each kind of question; directions count easy, medium and hard alike."""
    scores = _by(lambda row: row.values["question_type"], rows, marks)
    found = {
        column: _mean(scores[kind] for kind in kinds)
        for column, kinds in _VSI_COLUMNS.items()
        if all(kind in scores for kind in kinds)
    }
    return _percent(found)


def by_task(task: Task, rows, answers, marks) -> Scores:
    """Returns the mean of each of the file's own tasks."""
    return _percent(_by(lambda row: row.values["task"], rows, marks))


METRICS: dict[str, Callable[..., Scores]] = {
    "mean": mean,
    "mean_of_parts": mean_of_parts,
    "circular": circular,
    "mmiu": mmiu,
    "mirb": mirb,
    "ocrbench": ocrbench,
    "mme": mme,
    "pope": pope,
    "hallusion": hallusion,
    "crpe": crpe,
    "vcr": vcr,
    "dynamath": dynamath,
    "wemath": wemath,
    "vsi": vsi,
    "by_task": by_task,
}
