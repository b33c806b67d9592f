"""Native pre-training in miniature, its ablations, and what each of them can do afterwards.

    python examples/native_pretraining/make_data.py runs/miniature/data
    python examples/native_pretraining/run.py runs/miniature                       all variants, then the tables
    python examples/native_pretraining/run.py runs/miniature --only native         one of them
    python examples/native_pretraining/run.py runs/miniature --seeds 3             each of them from three seeds
    python examples/native_pretraining/run.py runs/miniature_short --data runs/miniature/data --steps 60

    native      one stage of text and multimodal data 1 : 3 with a V2PE step drawn for each picture, then SFT
    text_only   the same stage without the multimodal data, which leaves tower and projector as they
    began; then the same SFT delta_one   as native, with every step 1, in both stages

Under OUTPUT: VARIANT/seed_S/pretrain and sft are runs of train.py, VARIANT/seed_S/scores.json what
the variant answered; a seed changes the weights at the start and the order and draws of the data,
not the questions. results.json, results.md and curves.png are made of the seeds that are there. Run
again, it goes on where it stopped: finished runs and scores are kept. All answers are to held-out
questions: handwriting of other scans, drawings by another hand (and, to compare, the drawings of
the training in new pictures), and the search for a number among more pictures than any training
sample had.
"""

import argparse
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "miniature.py"
STAGES = ("pretrain", "sft")
DELTAS = ("1", "1/2", "1/4", "1/8")
ONE = {"data.deltas": ("1",)}
# What differs from configs/miniature.py, by variant and stage.
VARIANTS = {
    "native": {},
    "text_only": {
        "pretrain": {"data.text_fraction": 1.0, "optimizer.freeze": ("vision/.*", "projector/.*")}
    },
    "delta_one": {"pretrain": ONE, "sft": ONE},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument(
        "--data", type=pathlib.Path, default=None, help="what make_data.py wrote (OUTPUT/data)"
    )
    parser.add_argument(
        "--only", choices=VARIANTS, action="append", help="a variant; may be given several times"
    )
    parser.add_argument("--seeds", type=int, default=1, help="so many of each variant, from 0 on")
    parser.add_argument(
        "--steps",
        type=int,
        default=None,
        help="of pre-training, fewer than the recipe's; SFT in proportion",
    )
    parser.add_argument(
        "--questions", type=int, default=None, help="asked of each task; all of them if not given"
    )
    options = parser.parse_args()
    data = (options.data or options.output / "data").resolve()
    for name in ("pretrain.json", "sft.json", "held_out.json", "long.json"):
        if not (data / name).is_file():
            sys.exit(
                f"error: {data / name} is missing; make it with: python examples/native_pretraining/make_data.py {data}"
            )
    for seed, variant in itertools.product(range(options.seeds), options.only or VARIANTS):
        folder = options.output.resolve() / variant / f"seed_{seed}"
        for stage in STAGES:
            train(folder, stage, settings(folder, data, stage, options.steps))
        evaluate(folder, data, options.questions)
    print(summarise(options.output))


def settings(
    folder: pathlib.Path, data: pathlib.Path, stage: str, steps: int | None = None
) -> dict:
    """Field of TrainConfig -> value: what a run has different from the recipe. folder:
    VARIANT/seed_S.
    """
    sys.path.insert(0, str(ROOT))
    from configs.miniature import STEPS, get_config

    values = {
        f"data.{name}": str(data / place)
        for name, place in (("source", f"{stage}.json"), ("tokenizer", "tokenizer"))
    }
    values |= {"steps": STEPS[stage], "eval.source": str(data / "held_out.json")} | VARIANTS[
        folder.parent.name
    ].get(stage, {})
    values |= {"seed": seed_of(folder), "data.seed": seed_of(folder)}
    if stage == "sft":
        values["init_from"] = str(folder / "pretrain")
    if steps is not None:
        recipe = get_config(stage)
        values["steps"] = max(5, round(steps * STEPS[stage] / STEPS["pretrain"]))
        values["optimizer.warmup_steps"] = min(recipe.optimizer.warmup_steps, values["steps"] // 5)
    return values


def seed_of(folder: pathlib.Path) -> int:
    return int(folder.name.removeprefix("seed_"))


def train(folder: pathlib.Path, stage: str, changes: dict) -> None:
    """Runs train.py with the changes, or goes on with it. Ends the program where it fails."""
    workdir = folder / stage
    if is_finished(workdir, changes["steps"]):
        print(f"{workdir}: finished before", flush=True)
        return
    print(f"log in {workdir / 'log.jsonl'}", flush=True)
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        f"--config={CONFIG}:{stage}",
        f"--workdir={workdir}",
    ]
    process = subprocess.Popen(
        command + [f"--config.{field}={value}" for field, value in changes.items()],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    for line in process.stdout:
        if line.startswith(("step ", "resuming")):
            print(f"  {line}", end="", flush=True)
    if process.wait():
        sys.exit(
            f"error: train.py ended with status {process.returncode} in {workdir}; start this again to go on"
        )


def is_finished(workdir: pathlib.Path, steps: int) -> bool:
    """Whether a run of so many steps is there and its last one is saved undamaged."""
    from internvl3_jax.io.checkpoint_paths import latest_step

    path = workdir / "config.json"
    return path.is_file() and latest_step(workdir) == json.loads(path.read_text())["steps"] == steps


def evaluate(folder: pathlib.Path, data: pathlib.Path, questions: int | None) -> None:
    """scores.json: {"held_out": as score.score, "long": likewise, "reach": of `trained_reach`,
    "limit": `questions`}.
    """
    path = folder / "scores.json"
    if path.is_file() and json.loads(path.read_text())["limit"] == questions:
        print(f"{path} is there", flush=True)
        return
    from score import score

    from internvl3_jax import load

    began = time.perf_counter()
    checkpoint = load(folder / "sft", dtype="float32")
    scores = {"limit": questions, "reach": trained_reach(folder)}
    for meta in ("held_out", "long"):
        scores[meta] = score(checkpoint, str(data / f"{meta}.json"), DELTAS, questions)
        print(f"{folder}: {meta} asked, {time.perf_counter() - began:.0f} s", flush=True)
    path.write_text(json.dumps(scores, indent=1) + "\n")


def trained_reach(folder: pathlib.Path, samples: int = 1000) -> float:
    """The largest position among the first samples of both stages."""
    from internvl3_jax.config import UNITS, TrainConfig, from_dict
    from internvl3_jax.data.pipeline import make_tokenizer, sample_dataset

    largest = 0
    for stage in STAGES:
        config = from_dict(TrainConfig, json.loads((folder / stage / "config.json").read_text()))
        dataset = sample_dataset(config.data, config.processor, make_tokenizer(config.data))
        largest = max(largest, *(int(dataset[index]["positions"][-1]) for index in range(samples)))
    return largest / UNITS


def summarise(output: pathlib.Path) -> str:
    """Writes results.json, results.md and curves.png of the seeds that have scores; returns the
    text of results.md.
    """
    results: dict[str, list[dict]] = {}
    for variant in VARIANTS:
        folders = sorted(
            (path.parent for path in (output / variant).glob("seed_*/scores.json")), key=seed_of
        )
        if folders:
            results[variant] = [collect(folder) for folder in folders]
    (output / "results.json").write_text(
        json.dumps({"machine": machine(), "variants": results}, indent=1) + "\n"
    )
    intro = "Seeds: " + ", ".join(f"{name} {len(seeds)}" for name, seeds in results.items())
    intro += ". Of several the mean stands, and the lowest and the highest in brackets."
    tables = [tasks_table(results), means_table(results), long_table(results), cost_table(results)]
    text = "\n\n".join([intro, *tables]) + "\n"
    (output / "results.md").write_text(text, encoding="utf-8")
    draw(output / "curves.png", results)
    return text


def machine() -> dict:
    import jax

    return {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cores": os.cpu_count(),
        "jax": jax.__version__,
    }


def collect(folder: pathlib.Path) -> dict:
    """Seed and scores, and of each stage the steps, seconds and the rows of its log with eval
    losses.
    """
    stages = {}
    for stage in STAGES:
        rows = [
            json.loads(line)
            for line in (folder / stage / "log.jsonl").read_text().splitlines()
            if line.endswith("}")
        ]
        last = [row for row in rows if "seconds" in row][-1]
        evals = [row for row in rows if "eval_loss" in row]
        stages[stage] = {
            "steps": last["step"],
            "seconds": round(last["seconds"], 1),
            "evals": evals,
        }
    return (
        {"seed": seed_of(folder)}
        | json.loads((folder / "scores.json").read_text())
        | {"stages": stages}
    )


def tasks_table(results: dict) -> str:
    """Every task at delta 1, by variant."""
    asked = [result["held_out"]["1"] for seeds in results.values() for result in seeds]
    counts = sorted({score["questions"] for tasks in asked for score in tasks.values()})
    rows = []
    for name in dict.fromkeys(name for tasks in asked for name in tasks):
        rows.append(
            [
                name,
                *(
                    right([result["held_out"]["1"][name] for result in seeds])
                    for seeds in results.values()
                ),
            ]
        )
    return (
        f"Held-out questions answered right, of {' or '.join(map(str, counts))} of each task, delta 1:\n\n"
        + table(["source/task", *results], rows)
    )


def means_table(results: dict) -> str:
    """The mean over the tasks with pictures, by variant and delta."""
    rows = []
    for name, seeds in results.items():
        means = {
            delta: [
                statistics.mean(score["right"] for score in result["held_out"][delta].values())
                for result in seeds
            ]
            for delta in DELTAS
        }
        rows.append(
            [
                name,
                *(spread([100 * mean for mean in means[delta]], ".1f", " %") for delta in DELTAS),
            ]
        )
    return "Mean of these tasks, by the delta of the questions:\n\n" + table(
        ["variant", *DELTAS], rows
    )


def long_table(results: dict) -> str:
    """The search among more and more pictures, by variant and delta, under the positions that the
    prompts reach.
    """
    first = next(iter(results.values()))[0]["long"]
    rows = [
        [
            "position of the question",
            delta,
            *(f"{score['position']:.0f}" for score in first[delta].values()),
        ]
        for delta in DELTAS
    ]
    for name, seeds in results.items():
        for delta in DELTAS:
            rows.append(
                [
                    name,
                    delta,
                    *(
                        right([result["long"][delta][task] for result in seeds])
                        for task in first[delta]
                    ),
                ]
            )
    reach = ", ".join(
        f"{name} {spread([result['reach'] for result in seeds], '.0f')}"
        for name, seeds in results.items()
    )
    title = f"The number among so many pictures; training reached position: {reach}"
    return f"{title}\n\n" + table(["", "delta", *map(str, picture_counts(first["1"]))], rows)


def cost_table(results: dict) -> str:
    """Steps, time, and the eval loss of the text after each stage."""
    rows = []
    for name, seeds in results.items():
        for stage in STAGES:
            parts = [result["stages"][stage] for result in seeds]
            losses = [
                row["eval_loss/test_book"]
                for part in parts
                for row in part["evals"][-1:]
                if "eval_loss/test_book" in row
            ]
            seconds = spread([part["seconds"] for part in parts], ",.0f")
            rows.append(
                [
                    name,
                    stage,
                    f"{parts[0]['steps']:,}",
                    seconds,
                    spread(losses, ".3f") if losses else "",
                ]
            )
    return "Training:\n\n" + table(
        ["variant", "stage", "steps", "seconds", "loss of unseen chapters"], rows
    )


def right(scores: list[dict]) -> str:
    return spread([100 * score["right"] for score in scores], ".0f", " %")


def spread(values: list[float], form: str, unit: str = "") -> str:
    """Mean of the seeds and, where there are several, the lowest and the highest of them."""
    mean = f"{statistics.mean(values):{form}}{unit}"
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}}-{max(values):{form}})"


def picture_counts(tasks: dict) -> list[int]:
    return [int(task.split("/")[0].removeprefix("find_")) for task in tasks]


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def draw(path: pathlib.Path, results: dict) -> None:
    """Eval losses over both stages, a thin line for each seed, and the search by number of
    pictures, mean of the seeds.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    seen, text, search = figure.subplots(1, 3)
    for number, (name, seeds) in enumerate(results.items()):
        line = {"color": f"C{number}", "marker": "."}
        for label, result in zip([name] + [None] * len(seeds), seeds, strict=False):
            rows = loss_rows(result)
            for axes, source in ((seen, "other_drawings"), (text, "test_book")):
                points = [
                    (row["step"], row[f"eval_loss/{source}"])
                    for row in rows
                    if f"eval_loss/{source}" in row
                ]
                axes.plot(
                    *zip(*points, strict=True), linewidth=1, label=label, **line
                ) if points else None
        for delta, style in ((DELTAS[0], "-"), (DELTAS[-1], "--")):
            shares = [
                [100 * score["right"] for score in result["long"][delta].values()]
                for result in seeds
            ]
            counts = picture_counts(seeds[0]["long"][delta])
            search.plot(
                counts,
                [statistics.mean(part) for part in zip(*shares, strict=True)],
                style,
                label=f"{name}, {delta}",
                **line,
            )
            search.fill_between(
                counts,
                *([edge(part) for part in zip(*shares, strict=True)] for edge in (min, max)),
                alpha=0.15,
            )
    seen.set(
        xlabel="step of both stages",
        ylabel="loss",
        title="questions about other drawings",
        yscale="log",
    )
    text.set(xlabel="step of both stages", ylabel="loss", title="unseen chapters")
    search.set(
        xlabel="pictures",
        ylabel="right, %",
        title="a number among pictures",
        xscale="log",
        ylim=(0, 102),
    )
    search.set_xticks(counts, labels=counts)
    search.minorticks_off()
    for axes in (seen, text, search):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def loss_rows(result: dict) -> list[dict]:
    """Rows with eval losses, their steps counted over both stages."""
    rows, before = [], 0
    for stage in STAGES:
        part = result["stages"][stage]
        rows += [row | {"step": before + row["step"]} for row in part["evals"]]
        before += part["steps"]
    return rows


if __name__ == "__main__":
    main()
