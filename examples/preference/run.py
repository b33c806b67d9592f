"""MPO in miniature: trains a model that makes mistakes on pairs of its own answers, and counts its
mistakes before and after.

    pip install -e '.[demo]'
    python examples/preference/run.py runs/preference

For each seed:

    policy       a run of train.py on solutions with mistakes (examples/process_reward)
    pairs        right and wrong answers of the policy to other images
                 (internvl3_jax.reward.make_pairs)
    mpo          from the policy, on the pairs
    generation   from the policy, on the chosen answers alone
    test         fraction of images of unseen handwriting that each of the three models answers
                 correctly, greedily

Run again, it resumes. results.json, results.md and curves.png are made of all finished seeds.
"""

import argparse
import json
import pathlib
import statistics
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "process_reward")]

import task

from examples.experiment import (
    DIGITS_MODEL,
    markdown_table,
    read_jsonl,
    run_python,
    run_seeds,
    seed_settings,
    train,
    write_jsonl,
    write_meta,
)

# Number of questions in each file
TAUGHT, TAUGHT_TEXT, ASKED, TEST = 1500, 3000, 400, 600
SAMPLES = 16  # answers to each
LIMIT = 128  # tokens of an answer
BATCH = 40  # questions answered together
MODELS = ("policy", "generation", "mpo")
LOSSES = ("mpo", "generation")
METRICS = (
    "step",
    "loss",
    "loss_preference",
    "loss_quality",
    "loss_generation",
    "reward_margin",
    "reward_accuracy",
    "reward_shift",
)
DRAWN = ("loss_preference", "loss_generation", "reward_margin", "reward_accuracy")


def main() -> None:
    run_seeds(
        __doc__,
        run_seed,
        summarize,
        asked=(ASKED, "questions that pairs are made of"),
        test=(TEST, "questions of the evaluation"),
    )


def run_seed(folder: pathlib.Path, seed: int, options: argparse.Namespace) -> None:
    """Makes data, the policy, its pairs, both trainings on them, and the answers of all three
    models.
    """
    settings = seed_settings(seed, options)
    make_data(folder, options.asked, options.test, seed)
    start = {"data.source": folder / "policy.json", "init_from": DIGITS_MODEL}
    train("process_reward.py:policy", folder / "policy", settings | start)
    make_pairs(folder, seed)
    start = {"data.source": folder / "pairs.json", "init_from": folder / "policy"}
    for loss in LOSSES:
        train(f"preference.py:{loss}", folder / loss, settings | start)
    for model in MODELS:
        answer_test(folder, model)


def make_data(folder: pathlib.Path, asked: int, test: int, seed: int) -> None:
    """Writes questions, solutions and meta JSONs, unless they exist."""
    if (folder / "pairs.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    task.write_text(folder / "taught_text.jsonl", TAUGHT_TEXT, seed)
    task.write_questions(folder, "taught", TAUGHT, "train", seed)
    task.write_questions(folder, "asked", asked, "train", seed)
    task.write_questions(folder, "test", test, "test", seed)
    sources = {"taught_text": "taught_text.jsonl", "taught_solved": "taught_solved.jsonl"}
    write_meta(folder / "policy.json", sources)
    write_meta(folder / "pairs.json", {"pairs": "pairs.jsonl"})


def make_pairs(folder: pathlib.Path, seed: int) -> None:
    settings = {
        "checkpoint": folder / "policy",
        "questions": folder / "asked.jsonl",
        "output": folder / "pairs.jsonl",
        "samples": SAMPLES,
        "max_new_tokens": LIMIT,
        "seed": 100_000 * seed,
        "batch_size": 320,
    }
    flags = [f"--{name}={value}" for name, value in settings.items()]
    run_python("-m", "internvl3_jax.reward.make_pairs", *flags)


def answer_test(folder: pathlib.Path, model: str) -> None:
    """Writes answers_MODEL.jsonl: the expected and the greedy answer to each test question."""
    from internvl3_jax import Chat, load

    path = folder / f"answers_{model}.jsonl"
    if path.exists():
        return
    questions = read_jsonl(folder / "test.jsonl")
    chat, rows = Chat(load(folder / model), max_new_tokens=LIMIT), []
    for start in range(0, len(questions), BATCH):
        batch = questions[start : start + BATCH]
        answers = chat.answer_many(
            [(question["question"], [str(folder / question["image"])]) for question in batch]
        )
        rows += [
            {"id": question["id"], "answer": question["answer"], "text": answer.text}
            for question, answer in zip(batch, answers, strict=True)
        ]
    write_jsonl(path, rows)


# --- results -------------------------------------------------------------------------------------


def summarize(output: pathlib.Path) -> str:
    """Writes results.json, results.md and curves.png; returns the text of results.md."""
    from internvl3_jax.reward.make_pairs import summary
    from internvl3_jax.reward.questions import is_correct

    seeds = sorted(path for path in output.glob("seed_*") if (path / "answers_mpo.jsonl").exists())

    # Accuracy of each model, by seed
    right = {model: [] for model in MODELS}
    for seed in seeds:
        for model in MODELS:
            rows = read_jsonl(seed / f"answers_{model}.jsonl")
            count = sum(is_correct(row["text"], row["answer"]) for row in rows)
            right[model].append(count / len(rows))

    # Metrics of the two trainings on pairs
    curves = {
        loss: [
            [{name: row[name] for name in METRICS} for row in read_jsonl(seed / loss / "log.jsonl")]
            for seed in seeds
        ]
        for loss in LOSSES
    }
    pairs = [summary(seed / "pairs.jsonl") for seed in seeds]
    results = {"questions": len(rows), "right": right, "pairs": pairs, "curves": curves}
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(output / "curves.png", curves)
    text = as_text(results)
    (output / "results.md").write_text(text, encoding="utf-8")
    return text


def as_text(results: dict) -> str:
    right = results["right"]
    head = ["", *(f"seed {number}" for number in range(len(right["mpo"]))), "mean"]
    rows = [
        [model, *(f"{100 * share:.1f} %" for share in [*shares, statistics.mean(shares)])]
        for model, shares in right.items()
    ]
    gains = [
        100 * (mpo - policy) for mpo, policy in zip(right["mpo"], right["policy"], strict=True)
    ]
    each = ", ".join(f"{gain:+.1f}" for gain in gains)
    if len(gains) > 1:
        each += f", standard deviation over seeds {statistics.stdev(gains):.1f}"
    pairs = "; ".join(f"seed {number}: {text}" for number, text in enumerate(results["pairs"]))
    parts = [
        f"Correct answers to {results['questions']} unseen questions, greedy.",
        markdown_table(head, rows),
        f"MPO minus policy: {statistics.mean(gains):+.1f} points ({each}).",
        f"Pairs: {pairs}.",
    ]
    return "\n\n".join(parts) + "\n"


def draw(path: pathlib.Path, curves: dict) -> None:
    """Draws losses and rewards over the steps, one line per seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 3.5), layout="constrained")
    axes = figure.subplots(1, len(DRAWN))
    for axis, name in zip(axes, DRAWN, strict=True):
        for color, (loss, runs) in enumerate(curves.items()):
            for number, run in enumerate(runs):
                steps, values = [row["step"] for row in run], [row[name] for row in run]
                label = loss if number == 0 else None
                axis.plot(steps, values, f"C{color}", label=label, linewidth=1)
        axis.set_title(name)
        axis.set_xlabel("step")
    axes[0].legend()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
