"""Runs the benchmarks of the InternVL3 model card, and compares with its numbers.

    python -m internvl3_jax.evaluate --checkpoint DIR --data DIR --tasks mmstar,ai2d --output DIR
    python -m internvl3_jax.evaluate --checkpoint DIR --data DIR --tasks ocr,grounding --output DIR
    python -m internvl3_jax.evaluate --checkpoint DIR --data DIR --tasks mmstar --delta 1 1/4 \\
        --output DIR
    python -m internvl3_jax.evaluate --data DIR --tasks mmstar --output DIR --rescore
    python -m internvl3_jax.evaluate --list

--data is the folder with VLMEvalKit's tables (MMStar.tsv) and the files of InternVL's own programs
(chartqa/test_human.jsonl); docs/evaluation.md lists them. Nothing is downloaded. Answers go to
OUTPUT/answers; the same command continues a run that was stopped, and asks nothing twice. The
report is OUTPUT/report.md, report.json and report.png; files for a benchmark's server or for a
judge go to OUTPUT/submit.
"""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Sequence

from internvl3_jax.evaluate import card, judging, marks, report, scoring, submissions
from internvl3_jax.evaluate.loaders.places import has_files
from internvl3_jax.evaluate.loaders.registry import LOADERS
from internvl3_jax.evaluate.task import EXACTNESS, Loaded, Task
from internvl3_jax.evaluate.task_table import TASKS, find_tasks
from internvl3_jax.evaluate.variant import Variant, answers_path, variants
from internvl3_jax.io import command_line, safe_files, strict_json
from internvl3_jax.io.command_line import UsageError
from internvl3_jax.io.terminal import one_line
from internvl3_jax.positions import parse_delta

MODEL_FILE = "model.json"  # of the output: what is known of the model, for --rescore


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; returns its exit status."""
    options = _parser().parse_args(arguments)
    return command_line.call(lambda: run(options))


def _parser() -> argparse.ArgumentParser:
    parser = command_line.Parser("evaluate", description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the tasks and end")
    what = parser.add_argument_group("What to run")
    what.add_argument("--checkpoint", help="directory, training run, released directory or hub id")
    what.add_argument("--data", type=command_line.expanded, help="folder of the benchmarks' files")
    what.add_argument(
        "--tasks", help="names of tasks or groups, with commas between; card: all of the card"
    )
    what.add_argument("--output", type=command_line.expanded, help="folder for answers and report")
    what.add_argument("--limit", type=int, help="only the first LIMIT rows of each task")
    what.add_argument(
        "--rescore", action="store_true", help="score the answers in OUTPUT again, without a model"
    )
    how = parser.add_argument_group("How to ask")
    how.add_argument(
        "--delta", nargs="+", help="V2PE steps to compare, such as 1 1/4 (the checkpoint's own)"
    )
    how.add_argument(
        "--frames", nargs="+", type=int, help="frames of a video (the task's; the best one counts)"
    )
    how.add_argument(
        "--reasoning",
        choices=("auto", "on", "off"),
        default="auto",
        help="ask for reasoning in the reasoning tasks; auto: above 2B, as for the card (auto)",
    )
    how.add_argument(
        "--max_new_tokens", type=int, help="longest answer, where the task's limit is higher"
    )
    how.add_argument("--best_of", type=int, help="answers that --critic chooses among; the card: 8")
    how.add_argument("--critic", help="checkpoint of the critic")
    model = parser.add_argument_group("Model")
    model.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of parameters and computation (float32 on a CPU, elsewhere as stored)",
    )
    model.add_argument("--batch_size", type=int, default=8, help="answers together (%(default)s)")
    model.add_argument("--devices", type=int, help="number of devices to shard the model over (1)")
    model.add_argument(
        "--fsdp", type=int, default=1, help="of these, to shard the width over (%(default)s)"
    )
    model.add_argument("--hosts", action="store_true", help="use all devices of all hosts")
    model.add_argument("--coordinator", default="", help="HOST:PORT of process 0, with --hosts")
    model.add_argument("--processes", type=int, default=-1, help="their number, with --hosts")
    model.add_argument("--process", type=int, default=-1, help="index of this one, with --hosts")
    model.add_argument(
        "--compilation_cache",
        default="~/.cache/internvl3_jax/xla",
        help="directory that keeps compiled programs; empty: none (%(default)s)",
    )
    more = parser.add_argument_group("Report")
    more.add_argument(
        "--card", choices=card.SIZES, help="row of the card to compare with (by the model's sizes)"
    )
    more.add_argument(
        "--judge", help="address of a server with OpenAI's interface, up to /v1, for judged tasks"
    )
    more.add_argument("--judge_model", help="its model")
    return parser


def check(options: argparse.Namespace) -> None:
    """Raises UsageError for options that do not go together."""
    missing = [name for name in ("data", "tasks", "output") if getattr(options, name) is None]
    if missing:
        raise UsageError(f"--{missing[0]} is missing")
    if (options.checkpoint is None) != options.rescore:
        raise UsageError("give --checkpoint, or --rescore for answers that are there already")
    if bool(options.best_of) != bool(options.critic) and not options.rescore:
        raise UsageError("--best_of N and --critic DIR go together")
    if bool(options.judge) != bool(options.judge_model):
        raise UsageError("--judge URL and --judge_model NAME go together")
    for name in ("limit", "best_of", "batch_size", "max_new_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} is {value}; it must be at least 1")
    if options.frames and min(options.frames) < 1:
        raise UsageError(f"--frames is {min(options.frames)}; it must be at least 1")
    for delta in options.delta or ():
        parse_delta(delta)


def run(options: argparse.Namespace) -> int:
    """Does what the options say, and returns the exit status."""
    if options.list:
        print(listed())
        return 0
    check(options)
    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    tasks, left_out = present_tasks(names, options.data)
    for task in tasks:
        marks.check(task.scorer)
    loaded = {task.name: load(task, options.data) for task in tasks}
    files = {name: scoring.digests(data.files) for name, data in loaded.items()}
    (options.output / "answers").mkdir(parents=True, exist_ok=True)
    if options.rescore:
        model, runs, unanswered = _recorded(options, tasks)
        left_out += unanswered
        answers = {run.name: _stored(options, run, loaded[run.task.name]) for run in runs}
    else:
        # Imported here, since jax takes seconds to import.
        from internvl3_jax.evaluate.running import answer_all

        model, runs, answers = answer_all(options, tasks, loaded, files)
        if answers is None:  # on another host than the first
            return 0
        safe_files.replace(options.output / MODEL_FILE, json.dumps(model, indent=1) + "\n")
    results = []
    left_out += [
        f"{name}: {data.imageless} rows without an image, as in VLMEvalKit"
        for name, data in loaded.items()
        if data.imageless
    ]
    for variant in runs:
        data, given = loaded[variant.task.name], answers[variant.name]
        result = scoring.score(variant, data, given, files[variant.task.name])
        result.written = submissions.write(result, data, given, options.output / "submit")
        if options.judge and variant.task.name in judging.RULES:
            path = options.output / "judge" / f"{variant.name}.jsonl"
            judge = judging.Judge(options.judge, options.judge_model)
            score, unread = judging.judged(judge, variant.task.name, data, given, path)
            result.scores, result.unreadable = {variant.task.columns[0]: score}, unread
            result.problem = f"marks of {judge.model}, not the card's judge"
        results.append(result)
    found = report.as_json(results, model | {"left_out": left_out})
    print(report.as_table(found), end="")
    for remark in report.write(found, options.output):
        print(f"note: {remark}", file=sys.stderr)
    print(f"the report is in {one_line(str(options.output))}", file=sys.stderr)
    return 0


def present_tasks(names: Sequence[str], data: pathlib.Path) -> tuple[list[Task], list[str]]:
    """Returns the tasks of `names`, and a line for each that a group names and has no files."""
    tasks, left_out = [], []
    for task in find_tasks(names):
        if task.name in names or has_files(data, task.files):
            tasks.append(task)
        else:
            left_out.append(f"{task.name}: {task.files[0]} is not in --data")
    if not tasks:
        raise ValueError(
            f"no task of {', '.join(names)} has its files in {one_line(str(data))}; {left_out[0]}"
        )
    return tasks, left_out


def load(task: Task, data: pathlib.Path) -> Loaded:
    """Returns the rows of a task, after checking that their images and videos exist."""
    loaded = LOADERS[task.loader](task, data)
    seen: dict[str, str] = {}
    for row in loaded.rows:
        if row.id in seen:
            raise ValueError(f"{row.where}: its id {row.id} is that of {seen[row.id]}, too")
        seen[row.id] = row.where
        if row.check is not None:
            row.check()
    return loaded


def listed() -> str:
    """Returns a line per task: name, group, columns, exactness and files."""
    lines = [f"{kind}: {text}" for kind, text in EXACTNESS.items()]
    for task in TASKS.values():
        columns, more = ", ".join(task.columns), len(task.files) - 1
        files = task.files[0] + (f" and {more} more" if more else "")
        lines.append(f"{task.name:22} {task.group:14} {task.exact:9} {columns}: {files}")
    return "\n".join(lines)


def _recorded(
    options: argparse.Namespace, tasks: Sequence[Task]
) -> tuple[dict, list[Variant], list[str]]:
    """Returns what an earlier run noted of its model, the runs that it had answers of, and a line
    for each task that lacks some.
    """
    path = options.output / MODEL_FILE
    model = strict_json.read_object(path).values if path.is_file() else {}
    size, reasoning = options.card or model.get("card"), options.reasoning
    asked = variants(
        tasks,
        options.delta or model.get("deltas") or [None],
        options.frames or model.get("frames") or (),
        model.get("reasoning", reasoning) if reasoning == "auto" else reasoning,
        size,
        options.best_of or model.get("best_of"),
    )
    runs = [run for run in asked if answers_path(options.output, run).is_file()]
    if not runs:
        raise ValueError(
            f"{one_line(str(options.output / 'answers'))} has no answers of these tasks; run it "
            "without --rescore first"
        )
    unanswered: dict[str, list[str]] = {}
    for run in asked:
        if run not in runs:
            unanswered.setdefault(run.task.name, []).append(run.name)
    lines = [f"{', '.join(names)}: there are no answers" for names in unanswered.values()]
    return model | {"card": size}, runs, lines


def _stored(options: argparse.Namespace, variant: Variant, loaded: Loaded) -> list[dict]:
    """Returns the answers of a file, after checking that they answer these rows."""
    from internvl3_jax.inference.answer_file import read_answers

    names = ("image", "video", "document")
    requests = [
        dict.fromkeys(names, []) | {"asked": {"id": row.id, "prompt": row.question}}
        for row in loaded.rows
    ]
    rows = read_answers(os.fspath(answers_path(options.output, variant)), requests).rows
    return rows[: options.limit]
