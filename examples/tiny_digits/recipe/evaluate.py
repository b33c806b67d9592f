"""Scores a run of configs/tiny_digits.py on unseen handwriting, and writes RUN/report.json.

    python examples/tiny_digits/recipe/evaluate.py runs/tiny_digits

The questions are written to RUN/held_out/PER_TASK and run as any benchmark, by
internvl3_jax.evaluate; its answers and report are in step_STEP of that folder.
"""

import argparse
import json
import pathlib
import platform
import sys

import jax

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from examples.tiny_digits.recipe import data
from internvl3_jax import Chat, Checkpoint
from internvl3_jax.evaluate import asking, command
from internvl3_jax.evaluate.task_table import TASKS
from internvl3_jax.io import jsonl, safe_files
from internvl3_jax.training.run_log import LOG, read_rows

_BATCH = 50
_TASK = TASKS["requests"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=pathlib.Path, help="the --workdir of the training")
    parser.add_argument(
        "--per_task", type=int, default=500, help="questions per task (%(default)s)"
    )
    options = parser.parse_args(arguments)
    step = last_row(options.run)["step"]
    folder = options.run / "held_out" / str(options.per_task)
    results, questions = folder / f"step_{step}", data.held_out(options.per_task)
    write_questions(folder, questions)
    status = command.main(
        ["--checkpoint", str(options.run), "--data", str(folder), "--tasks", _TASK.name]
        + ["--output", str(results), "--batch_size", str(_BATCH)]
    )
    if status:
        sys.exit(status)
    rows = jsonl.read_objects(results / "answers" / f"{_TASK.name}.jsonl")
    scores = score(questions, [row.get("text", str) for row in rows])
    write(options.run, scores, options.per_task)
    print(f"digits read: {100 * scores['digit']:.2f} %")


def write_questions(folder: pathlib.Path, questions: list[data.Question]) -> None:
    """Writes questions.jsonl and its images, in the form of infer.py --requests."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, question in enumerate(questions):
        names = [f"pictures/{number}_{place}.png" for place in range(len(question.images))]
        for name, image in zip(names, question.images, strict=True):
            image.save(folder / name)
        text = question.messages[0]["content"]
        lines.append(
            {"id": number, "task": question.task, "prompt": text, "image": names}
            | {"expected": question.answer}
        )
    jsonl.rewrite(folder / _TASK.files[0], [jsonl.dumps(line) for line in lines])


def evaluate(checkpoint: Checkpoint, per_task: int, delta: int | None = None) -> dict[str, float]:
    """Returns task -> fraction of correct greedy answers, and "digit" -> fraction of correct digits
    in "read".

    delta: V2PE step in units of 1/256; None is the processor's.
    """
    chat, questions = Chat(checkpoint), data.held_out(per_task)
    options = {"max_new_tokens": _TASK.max_new_tokens}
    options |= {} if delta is None else {"delta": f"{delta}/256"}
    asked = [
        asking.Question(question.messages[0]["content"], question.images, f"question {number}")
        for number, question in enumerate(questions)
    ]
    answers = asking.answer(chat, asked, options, _BATCH)
    return score(questions, [row["text"] for row in answers])


def score(questions: list[data.Question], answers: list[str]) -> dict[str, float]:
    scores = {}
    for task in data.TASKS:
        right = [
            data.is_right(q.task, q.answer, a)
            for q, a in zip(questions, answers, strict=True)
            if q.task == task
        ]
        scores[task] = sum(right) / len(right)
    read = [(q.answer, a) for q, a in zip(questions, answers, strict=True) if q.task == "read"]
    hits = sum(
        digit == answered_digit
        for expected, answered in read
        for digit, answered_digit in zip(expected, answered, strict=False)
    )
    digits = sum(max(len(expected), len(answered)) for expected, answered in read)
    return scores | {"digit": hits / digits}


def write(run: pathlib.Path, scores: dict[str, float], per_task: int) -> None:
    """Writes RUN/report.json: scores, steps, seconds, machine and versions."""
    last = last_row(run)
    report = {
        "held_out": {name: round(value, 4) for name, value in scores.items()},
        "questions_per_task": per_task,
        "steps": last["step"],
        "last_loss": last["loss"],
        "training_seconds": round(last["seconds"], 1),
        "machine": f"{platform.machine()}, {jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }
    safe_files.replace(run / "report.json", json.dumps(report, indent=1) + "\n")


def last_row(run: pathlib.Path) -> dict:
    """Returns the last row of the run's log that has a loss."""
    return [row for row in read_rows(run / LOG) if "loss" in row][-1]


if __name__ == "__main__":
    main()
