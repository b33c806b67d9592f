"""Makes results.json, results.md and curves.png of the variants and seeds that have scores."""

import json
import os
import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the clone

from examples.experiment import markdown_table, read_jsonl

VARIANTS = ("native", "text_only", "delta_one")
STAGES = ("pretrain", "sft")
DELTAS = ("1", "1/2", "1/4", "1/8")
SEARCH = "find_"  # begins the name of a source of long.json; its number of images follows


def summarize(output: pathlib.Path) -> str:
    """Writes the three files; returns the text of results.md."""
    results: dict[str, list[dict]] = {}
    for variant in VARIANTS:
        folders = [path.parent for path in (output / variant).glob("seed_*/scores.json")]
        if folders:
            results[variant] = [collect(folder) for folder in sorted(folders, key=seed_of)]
    content = {"machine": machine(), "variants": results}
    (output / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    text = as_text(results)
    (output / "results.md").write_text(text, encoding="utf-8")
    draw(output / "curves.png", results)
    return text


def read_scores(evaluation: pathlib.Path, questions: pathlib.Path) -> dict[str, dict]:
    """Reads what internvl3_jax.evaluate wrote about the questions.

    Returns:
      "held_out" and "long" (the search among images) -> delta -> "SOURCE/TASK" -> {"right":
      fraction of correct answers, "questions": number, "position": median of the prompts' last
      positions}.
    """
    tasks = [question["task"] for question in read_jsonl(questions)]
    scores: dict[str, dict] = {"held_out": {}, "long": {}}
    for run in json.loads((evaluation / "report.json").read_text())["tasks"]:
        positions: dict[str, list[float]] = {}
        answers = read_jsonl(evaluation / "answers" / f"{run['run']}.jsonl")
        for task, answer in zip(tasks, answers, strict=True):
            positions.setdefault(task, []).append(answer["position"])
        for task, found in positions.items():
            meta = "long" if task.startswith(SEARCH) else "held_out"
            scores[meta].setdefault(run["delta"], {})[task] = {
                "right": round(run["scores"][task] / 100, 6),
                "questions": len(found),
                "position": statistics.median(found),
            }
    return scores


def seed_of(folder: pathlib.Path) -> int:
    return int(folder.name.removeprefix("seed_"))


def machine() -> dict:
    import jax

    return {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cores": os.cpu_count(),
        "jax": jax.__version__,
    }


def collect(folder: pathlib.Path) -> dict:
    """Returns seed, scores, and of each stage the steps, seconds and log rows with eval losses."""
    stages = {}
    for stage in STAGES:
        rows = read_jsonl(folder / stage / "log.jsonl")
        last = [row for row in rows if "seconds" in row][-1]
        stages[stage] = {
            "steps": last["step"],
            "seconds": round(last["seconds"], 1),
            "evals": [row for row in rows if "eval_loss" in row],
        }
    scores = json.loads((folder / "scores.json").read_text())
    return {"seed": seed_of(folder)} | scores | {"stages": stages}


# --- tables --------------------------------------------------------------------------------------


def as_text(results: dict) -> str:
    seeds = ", ".join(f"{name} {len(runs)}" for name, runs in results.items())
    intro = f"Seeds: {seeds}. For several seeds: the mean, with the lowest and highest in brackets."
    tables = [tasks_table(results), means_table(results), long_table(results), cost_table(results)]
    return "\n\n".join([intro, *tables]) + "\n"


def tasks_table(results: dict) -> str:
    """Returns every task at delta 1, by variant."""
    scores = [run["held_out"]["1"] for runs in results.values() for run in runs]
    counts = sorted({task["questions"] for tasks in scores for task in tasks.values()})
    rows = []
    for name in dict.fromkeys(name for tasks in scores for name in tasks):
        cells = [right([run["held_out"]["1"][name] for run in runs]) for runs in results.values()]
        rows.append([name, *cells])
    number = " or ".join(map(str, counts))
    title = f"Correct answers to unseen questions, {number} of each task, delta 1:"
    return f"{title}\n\n" + markdown_table(["source/task", *results], rows)


def means_table(results: dict) -> str:
    """Returns the mean over the tasks with images, by variant and delta."""
    rows = []
    for name, runs in results.items():
        cells = []
        for delta in DELTAS:
            means = [
                statistics.mean(task["right"] for task in run["held_out"][delta].values())
                for run in runs
            ]
            cells.append(spread([100 * mean for mean in means], ".1f", " %"))
        rows.append([name, *cells])
    title = "Mean of these tasks, by the delta of the questions:"
    return f"{title}\n\n" + markdown_table(["variant", *DELTAS], rows)


def long_table(results: dict) -> str:
    """Returns the search among more and more images, by variant and delta, below the prompts'
    positions.
    """
    first = next(iter(results.values()))[0]["long"]
    rows = []
    for delta in DELTAS:
        positions = [f"{task['position']:.0f}" for task in first[delta].values()]
        rows.append(["position of the question", delta, *positions])
    for name, runs in results.items():
        for delta in DELTAS:
            cells = [right([run["long"][delta][task] for run in runs]) for task in first[delta]]
            rows.append([name, delta, *cells])
    reach = ", ".join(
        f"{name} {spread([run['reach'] for run in runs], '.0f')}" for name, runs in results.items()
    )
    title = f"The number among so many images; the largest position in training: {reach}"
    head = ["", "delta", *map(str, image_counts(first["1"]))]
    return f"{title}\n\n" + markdown_table(head, rows)


def cost_table(results: dict) -> str:
    """Returns steps, time, and the eval loss of the text after each stage."""
    rows = []
    for name, runs in results.items():
        for stage in STAGES:
            costs = [run["stages"][stage] for run in runs]
            losses = [
                row["eval_loss/test_book"]
                for cost in costs
                for row in cost["evals"][-1:]
                if "eval_loss/test_book" in row
            ]
            seconds = spread([cost["seconds"] for cost in costs], ",.0f")
            loss = spread(losses, ".3f") if losses else ""
            rows.append([name, stage, f"{costs[0]['steps']:,}", seconds, loss])
    head = ["variant", "stage", "steps", "seconds", "loss of unseen chapters"]
    return "Training:\n\n" + markdown_table(head, rows)


def right(scores: list[dict]) -> str:
    return spread([100 * score["right"] for score in scores], ".0f", " %")


def spread(values: list[float], form: str, unit: str = "") -> str:
    """Formats the mean over the seeds and, of several, the lowest and the highest."""
    mean = f"{statistics.mean(values):{form}}{unit}"
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}}-{max(values):{form}})"


def image_counts(tasks: dict) -> list[int]:
    return [int(task.split("/")[0].removeprefix(SEARCH)) for task in tasks]


# --- curves --------------------------------------------------------------------------------------


def draw(path: pathlib.Path, results: dict) -> None:
    """Draws eval losses over both stages, a line per seed, and the search by number of images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    drawings, text, search = figure.subplots(1, 3)
    for number, (name, runs) in enumerate(results.items()):
        line = {"color": f"C{number}", "marker": "."}
        draw_losses(drawings, name, runs, "other_drawings", line)
        draw_losses(text, name, runs, "test_book", line)
        for delta, style in ((DELTAS[0], "-"), (DELTAS[-1], "--")):
            draw_search(search, f"{name}, {delta}", runs, delta, line | {"linestyle": style})
    steps = {"xlabel": "step of both stages"}
    drawings.set(title="questions about other drawings", ylabel="loss", yscale="log", **steps)
    text.set(title="unseen chapters", ylabel="loss", **steps)
    search.set(title="a number among images", xlabel="images", xscale="log")
    search.set(ylabel="right, %", ylim=(0, 102))
    counts = image_counts(next(iter(results.values()))[0]["long"][DELTAS[0]])
    search.set_xticks(counts, labels=counts)
    search.minorticks_off()
    for axes in (drawings, text, search):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def draw_losses(axes, name: str, runs: list[dict], source: str, line: dict) -> None:
    """Draws one line per seed; the first has the label."""
    for index, run in enumerate(runs):
        points = [
            (row["step"], row[f"eval_loss/{source}"])
            for row in loss_rows(run)
            if f"eval_loss/{source}" in row
        ]
        if points:
            label = name if index == 0 else None
            axes.plot(*zip(*points, strict=True), linewidth=1, label=label, **line)


def draw_search(axes, label: str, runs: list[dict], delta: str, line: dict) -> None:
    """Draws the mean over the seeds, with a band from the lowest to the highest."""
    counts = image_counts(runs[0]["long"][delta])
    shares = [[100 * task["right"] for task in run["long"][delta].values()] for run in runs]
    by_count = list(zip(*shares, strict=True))
    axes.plot(counts, [statistics.mean(values) for values in by_count], label=label, **line)
    lowest, highest = [min(values) for values in by_count], [max(values) for values in by_count]
    axes.fill_between(counts, lowest, highest, alpha=0.15)


def loss_rows(run: dict) -> list[dict]:
    """Returns the rows with eval losses, their steps counted over both stages."""
    rows, before = [], 0
    for stage in STAGES:
        part = run["stages"][stage]
        rows += [row | {"step": before + row["step"]} for row in part["evals"]]
        before += part["steps"]
    return rows
