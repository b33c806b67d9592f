"""Native pre-training in miniature, its ablations, and what each of them can do afterwards.

    python examples/native_pretraining/make_data.py runs/miniature/data
    python examples/native_pretraining/run.py runs/miniature                       all variants, then the tables
    python examples/native_pretraining/run.py runs/miniature --only native         one of them
    python examples/native_pretraining/run.py runs/miniature_short --data runs/miniature/data --steps 60

    native      one stage of text and multimodal data 1 : 3 with a V2PE step drawn for each picture, then SFT
    text_only   the same stage without the multimodal data, which leaves tower and projector as they began; then the same SFT
    delta_one   as native, with every step 1, in both stages

Under OUTPUT: VARIANT/pretrain and VARIANT/sft are runs of train.py, VARIANT/scores.json what the variant answered; results.json,
results.md and curves.png are made of the variants that are there. Run again, it goes on where it stopped: finished runs and scores
are kept. All answers are to held-out questions: handwriting of other scans, drawings by another hand (and, to compare, the drawings
of the training in new pictures), and the search for a number among more pictures than any training sample had.
"""

import argparse
import json
import os
import pathlib
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
    "text_only": {"pretrain": {"data.language_share": 1.0, "optimizer.freeze": ("vision/.*", "projector/.*")}},
    "delta_one": {"pretrain": ONE, "sft": ONE},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--data", type=pathlib.Path, default=None, help="what make_data.py wrote (OUTPUT/data)")
    parser.add_argument("--only", choices=VARIANTS, action="append", help="a variant; may be given several times")
    parser.add_argument("--steps", type=int, default=None, help="of pre-training, fewer than the recipe's; SFT in proportion")
    parser.add_argument("--questions", type=int, default=None, help="asked of each task; all of them if not given")
    options = parser.parse_args()
    data = (options.data or options.output / "data").resolve()
    for name in ("pretrain.json", "sft.json", "held_out.json", "long.json"):
        if not (data / name).is_file():
            sys.exit(f"error: {data / name} is missing; make it with: python examples/native_pretraining/make_data.py {data}")
    for variant in options.only or VARIANTS:
        for stage in STAGES:
            train(options.output.resolve(), data, variant, stage, options.steps)
        evaluate(options.output.resolve(), data, variant, options.questions)
    print(summarise(options.output))


def settings(output: pathlib.Path, data: pathlib.Path, variant: str, stage: str, steps: int | None = None) -> dict:
    """Field of TrainConfig -> value: what a run has different from the recipe."""
    sys.path.insert(0, str(ROOT))
    from configs.miniature import STEPS, get_config

    values = {f"data.{name}": str(data / place) for name, place in (("source", f"{stage}.json"), ("tokenizer", "tokenizer"))}
    values |= {"steps": STEPS[stage], "held_out": str(data / "held_out.json")} | VARIANTS[variant].get(stage, {})
    if stage == "sft":
        values["init_from"] = str(output / variant / "pretrain")
    if steps is not None:
        recipe = get_config(stage)
        values["steps"] = max(5, round(steps * STEPS[stage] / STEPS["pretrain"]))
        values["optimizer.warmup_steps"] = min(recipe.optimizer.warmup_steps, values["steps"] // 5)
    return values


def train(output: pathlib.Path, data: pathlib.Path, variant: str, stage: str, steps: int | None) -> None:
    """Runs train.py, or goes on with it. Ends the program where it fails."""
    workdir, changes = output / variant / stage, settings(output, data, variant, stage, steps)
    if is_finished(workdir, changes["steps"]):
        print(f"{variant} {stage}: finished before", flush=True)
        return
    print(f"{variant} {stage}: {workdir / 'log.jsonl'}", flush=True)
    command = [sys.executable, str(ROOT / "train.py"), f"--config={CONFIG}:{stage}", f"--workdir={workdir}"]
    process = subprocess.Popen(
        command + [f"--config.{field}={value}" for field, value in changes.items()],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    for line in process.stdout:
        if line.startswith(("step ", "going on")):
            print(f"  {line}", end="", flush=True)
    if process.wait():
        sys.exit(f"error: train.py ended with status {process.returncode} in {workdir}; start this again to go on")


def is_finished(workdir: pathlib.Path, steps: int) -> bool:
    """Whether a run of so many steps is there and its last one is saved undamaged."""
    from internvl3_jax.find import latest_step

    path = workdir / "config.json"
    return path.is_file() and latest_step(workdir) == json.loads(path.read_text())["steps"] == steps


def evaluate(output: pathlib.Path, data: pathlib.Path, variant: str, questions: int | None) -> None:
    """VARIANT/scores.json: {"held_out": as score.score, "long": likewise, "reach": of `trained_reach`, "limit": `questions`}."""
    path = output / variant / "scores.json"
    if path.is_file() and json.loads(path.read_text())["limit"] == questions:
        print(f"{variant}: {path} is there", flush=True)
        return
    from score import score

    from internvl3_jax import load

    began = time.perf_counter()
    checkpoint = load(output / variant / "sft", dtype="float32")
    scores = {"limit": questions, "reach": trained_reach(output / variant)}
    for meta in ("held_out", "long"):
        scores[meta] = score(checkpoint, str(data / f"{meta}.json"), DELTAS, questions)
        print(f"{variant}: {meta} asked, {time.perf_counter() - began:.0f} s", flush=True)
    path.write_text(json.dumps(scores, indent=1) + "\n")


def trained_reach(folder: pathlib.Path, samples: int = 1000) -> float:
    """The largest position among the first samples of both stages of a variant."""
    from internvl3_jax.config import UNITS, TrainConfig, from_dict
    from internvl3_jax.data.pipeline import make_tokenizer, sample_dataset

    largest = 0
    for stage in STAGES:
        config = from_dict(TrainConfig, json.loads((folder / stage / "config.json").read_text()))
        dataset = sample_dataset(config.data, config.processor, make_tokenizer(config.data))
        largest = max(largest, *(int(dataset[index]["positions"][-1]) for index in range(samples)))
    return largest / UNITS


def summarise(output: pathlib.Path) -> str:
    """Writes results.json, results.md and curves.png of the variants that have scores; returns the text of results.md."""
    results = {name: collect(output / name) for name in VARIANTS if (output / name / "scores.json").is_file()}
    (output / "results.json").write_text(json.dumps({"machine": machine(), "variants": results}, indent=1) + "\n")
    text = "\n\n".join([tasks_table(results), means_table(results), long_table(results), cost_table(results)]) + "\n"
    (output / "results.md").write_text(text, encoding="utf-8")
    draw(output / "curves.png", results)
    return text


def machine() -> dict:
    import jax

    return {"device": f"{jax.device_count()} x {jax.devices()[0].device_kind}", "cores": os.cpu_count(), "jax": jax.__version__}


def collect(folder: pathlib.Path) -> dict:
    """Scores of a variant, and of each stage the steps, seconds and the rows of its log with held-out losses."""
    stages = {}
    for stage in STAGES:
        rows = [json.loads(line) for line in (folder / stage / "log.jsonl").read_text().splitlines() if line.endswith("}")]
        last = [row for row in rows if "seconds" in row][-1]
        held_out = [row for row in rows if "held_out" in row]
        stages[stage] = {"steps": last["step"], "seconds": round(last["seconds"], 1), "held_out": held_out}
    return json.loads((folder / "scores.json").read_text()) | {"stages": stages}


def tasks_table(results: dict) -> str:
    """Every task at delta 1, by variant."""
    names = list(dict.fromkeys(name for result in results.values() for name in result["held_out"]["1"]))
    asked = sorted({score["questions"] for result in results.values() for score in result["held_out"]["1"].values()})
    rows = [[name, *(percent(result["held_out"]["1"].get(name)) for result in results.values())] for name in names]
    return f"Held-out questions answered right, of {' or '.join(map(str, asked))} of each task, delta 1:\n\n" + table(
        ["source/task", *results], rows
    )


def means_table(results: dict) -> str:
    """The mean over the tasks with pictures, by variant and delta."""
    rows = []
    for name, result in results.items():
        means = [
            sum(score["right"] for score in result["held_out"][delta].values()) / len(result["held_out"][delta])
            for delta in DELTAS
        ]
        rows.append([name, *(f"{100 * mean:.1f} %" for mean in means)])
    return "Mean of these tasks, by the delta of the questions:\n\n" + table(["variant", *DELTAS], rows)


def long_table(results: dict) -> str:
    """The search among more and more pictures, by variant and delta; in brackets the position that the prompts reach."""
    rows = []
    for name, result in results.items():
        for delta in DELTAS:
            cells = [f"{percent(score)} ({score['position']:.0f})" for score in result["long"][delta].values()]
            rows.append([name, delta, *cells])
    counts = [name.split("/")[0].removeprefix("find_") for name in next(iter(results.values()))["long"]["1"]]
    reach = ", ".join(f"{name} {result['reach']:.0f}" for name, result in results.items())
    title = f"The number among so many pictures (position of the question); training reached position: {reach}"
    return f"{title}\n\n" + table(["variant", "delta", *counts], rows)


def cost_table(results: dict) -> str:
    """Steps, time, and the held-out loss of the text after each stage."""
    rows = []
    for name, result in results.items():
        for stage in STAGES:
            part = result["stages"][stage]
            last = part["held_out"][-1] if part["held_out"] else {}
            loss = f"{last['held_out/test_book']:.3f}" if "held_out/test_book" in last else ""
            rows.append([name, stage, f"{part['steps']:,}", f"{part['seconds']:,.0f}", loss])
    return "Training:\n\n" + table(["variant", "stage", "steps", "seconds", "loss of unseen chapters"], rows)


def percent(score: dict | None) -> str:
    return f"{100 * score['right']:.0f} %" if score else ""


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def draw(path: pathlib.Path, results: dict) -> None:
    """Held-out losses over both stages, and the search by number of pictures."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    seen, text, search = figure.subplots(1, 3)
    for name, result in results.items():
        rows, before = [], 0
        for stage in STAGES:
            part = result["stages"][stage]
            rows += [row | {"step": before + row["step"]} for row in part["held_out"]]
            before += part["steps"]
        for axes, source in ((seen, "other_drawings"), (text, "test_book")):
            points = [(row["step"], row[f"held_out/{source}"]) for row in rows if f"held_out/{source}" in row]
            axes.plot(*zip(*points, strict=True), marker=".", label=name) if points else None
        for delta, style in ((DELTAS[0], "-"), (DELTAS[-1], "--")):
            scores = result["long"][delta]
            counts = [int(key.split("/")[0].removeprefix("find_")) for key in scores]
            search.plot(
                counts, [100 * score["right"] for score in scores.values()], style, marker=".", label=f"{name}, {delta}"
            )
    seen.set(xlabel="step of both stages", ylabel="loss", title="questions about other drawings", yscale="log")
    text.set(xlabel="step of both stages", ylabel="loss", title="unseen chapters")
    search.set(xlabel="pictures", ylabel="right, %", title="a number among pictures", xscale="log", ylim=(0, 102))
    search.set_xticks(counts, labels=counts)
    search.minorticks_off()
    for axes in (seen, text, search):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
