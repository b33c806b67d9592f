"""MPO in miniature: a model that makes mistakes learns which of its own answers were right; does it
make fewer?

    pip install -e '.[demo]'
    python examples/preference/run.py runs/preference

For each seed:

    policy       a run of train.py on solutions of a teacher who makes mistakes, as in examples/process_reward
    pairs        the policy's right and wrong answers to other pictures (internvl3_jax.reward.make_pairs)
    mpo          from the policy, on the pairs
    generation   the same, on the chosen answers alone: fine-tuning on its own right answers
    test         how many pictures of unseen handwriting each of the three answers rightly, greedily

Run again, it goes on where it stopped; results.json, results.md and curves.png are made of what is
there.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
TASK = ROOT / "examples" / "process_reward"
TAUGHT, TAUGHT_TEXT, ASKED, TEST = 1500, 3000, 400, 600  # questions
SAMPLES = 16  # answers to each
LIMIT = 128  # tokens of an answer
BATCH = 40  # questions answered together
MODELS = ("policy", "generation", "mpo")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=None, help="of each training, fewer than the recipe's"
    )
    parser.add_argument("--asked", type=int, default=ASKED, help="questions that pairs are made of")
    parser.add_argument("--test", type=int, default=TEST, help="held-out questions")
    options = parser.parse_args()
    for seed in range(options.seeds):
        folder = options.output.resolve() / f"seed_{seed}"
        make_data(folder, options.asked, options.test, seed)
        train(
            folder,
            "process_reward",
            "policy",
            ROOT / "examples" / "tiny_digits",
            seed,
            options.steps,
        )
        make_pairs(folder, seed)
        for loss in ("mpo", "generation"):
            train(folder, "preference", loss, folder / "policy", seed, options.steps)
        for model in MODELS:
            ask(folder, model)
    print(summarise(options.output.resolve()))


def make_data(folder: pathlib.Path, asked: int, test: int, seed: int) -> None:
    sys.path.insert(0, str(TASK))
    from task import write_questions, write_text

    if (folder / "pairs.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "taught_text.jsonl", TAUGHT_TEXT, seed)
    for name, count, split in (
        ("taught", TAUGHT, "train"),
        ("asked", asked, "train"),
        ("test", test, "test"),
    ):
        write_questions(folder, name, count, split, seed)
    for stage, files in {"policy": ("taught_text", "taught_solved"), "pairs": ("pairs",)}.items():
        entries = {
            name: {"root": str(folder), "annotation": str(folder / f"{name}.jsonl")}
            for name in files
        }
        (folder / f"{stage}.json").write_text(json.dumps(entries, indent=1))


def train(
    folder: pathlib.Path, recipe: str, name: str, start: pathlib.Path, seed: int, steps: int | None
) -> None:
    """Runs train.py, or goes on with it."""
    source = folder / ("policy.json" if name == "policy" else "pairs.json")
    settings = {
        "data.source": source,
        "data.tokenizer": ROOT / "examples/tiny_digits",
        "init_from": start,
    }
    settings |= {"seed": seed, "data.seed": seed}
    settings |= {} if steps is None else {"steps": steps, "optimizer.warmup_steps": 1}
    flags = [f"--config.{field}={value}" for field, value in settings.items()]
    call(
        [
            ROOT / "train.py",
            f"--config={ROOT / 'configs' / recipe}.py:{name}",
            f"--workdir={folder / name}",
            *flags,
        ]
    )


def make_pairs(folder: pathlib.Path, seed: int) -> None:
    settings = {
        "checkpoint": folder / "policy",
        "questions": folder / "asked.jsonl",
        "output": folder / "pairs.jsonl",
    }
    settings |= {
        "samples": SAMPLES,
        "max_new_tokens": LIMIT,
        "seed": 100_000 * seed,
        "batch_size": 320,
    }
    call(
        [
            "-m",
            "internvl3_jax.reward.make_pairs",
            *(f"--{name}={value}" for name, value in settings.items()),
        ]
    )


def call(command: list) -> None:
    """Runs Python on it from the root of the clone; ends the program where it fails."""
    process = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    )
    if process.returncode:
        sys.exit(
            f"error: {command[0]} ended with status {process.returncode}; start this again to go on"
        )


def ask(folder: pathlib.Path, model: str) -> None:
    """answers_MODEL.jsonl: of each test question the right answer and the greedy one."""
    from internvl3_jax import Chat, load

    path = folder / f"answers_{model}.jsonl"
    if path.exists():
        return
    questions = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    chat, lines = Chat(load(folder / model), max_new_tokens=LIMIT), []
    for start in range(0, len(questions), BATCH):
        batch = questions[start : start + BATCH]
        answers = chat.answer_many(
            [(question["question"], [str(folder / question["image"])]) for question in batch]
        )
        for question, answer in zip(batch, answers, strict=True):
            lines.append(
                json.dumps(
                    {"id": question["id"], "answer": question["answer"], "text": answer.text}
                )
                + "\n"
            )
    path.write_text("".join(lines))


def summarise(folder: pathlib.Path) -> str:
    """Writes results.json, results.md and curves.png; returns the text of results.md."""
    from internvl3_jax.reward.make_pairs import summary
    from internvl3_jax.reward.questions import is_correct

    seeds = sorted(path for path in folder.glob("seed_*") if (path / "answers_mpo.jsonl").exists())
    right = {model: [] for model in MODELS}
    for seed in seeds:
        for model in MODELS:
            rows = [
                json.loads(line)
                for line in (seed / f"answers_{model}.jsonl").read_text().splitlines()
            ]
            right[model].append(
                sum(is_correct(row["text"], row["answer"]) for row in rows) / len(rows)
            )
    logs = {
        loss: [
            [json.loads(line) for line in (seed / loss / "log.jsonl").read_text().splitlines()]
            for seed in seeds
        ]
        for loss in ("mpo", "generation")
    }
    pairs = [summary(seed / "pairs.jsonl") for seed in seeds]
    names = (
        "step",
        "loss",
        "loss_preference",
        "loss_quality",
        "loss_generation",
        "reward_margin",
        "reward_accuracy",
        "reward_shift",
    )
    curves = {
        loss: [[{name: row[name] for name in names} for row in log] for log in runs]
        for loss, runs in logs.items()
    }
    results = {"questions": len(rows), "right": right, "pairs": pairs, "curves": curves}
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(folder / "curves.png", curves)
    text = as_text(results)
    (folder / "results.md").write_text(text, encoding="utf-8")
    return text


def as_text(results: dict) -> str:
    right = results["right"]
    lines = [f"| {' | '.join(['', *(f'seed {n}' for n in range(len(right['mpo']))), 'mean'])} |"]
    lines.append("|---" * (len(right["mpo"]) + 2) + "|")
    for model, shares in right.items():
        lines.append(
            f"| {' | '.join([model, *(f'{100 * x:.1f} %' for x in [*shares, statistics.mean(shares)])])} |"
        )
    gains = [
        100 * (mpo - policy) for mpo, policy in zip(right["mpo"], right["policy"], strict=True)
    ]
    noise = (
        f", standard deviation over seeds {statistics.stdev(gains):.1f}" if len(gains) > 1 else ""
    )
    return (
        "\n\n".join(
            [
                f"Right answers to {results['questions']} held-out questions, greedily.",
                "\n".join(lines),
                f"MPO less policy: {statistics.mean(gains):+.1f} points ({', '.join(f'{gain:+.1f}' for gain in gains)}{noise}).",
                "Pairs: "
                + "; ".join(
                    f"seed {number}: {text}" for number, text in enumerate(results["pairs"])
                )
                + ".",
            ]
        )
        + "\n"
    )


def draw(path: pathlib.Path, curves: dict) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = ("loss_preference", "loss_generation", "reward_margin", "reward_accuracy")
    figure, axes = pyplot.subplots(1, len(names), figsize=(16, 3.5), layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        for (loss, runs), colour in zip(curves.items(), ("C0", "C1"), strict=True):
            for number, run in enumerate(runs):
                label = loss if number == 0 else None
                axis.plot(
                    [row["step"] for row in run],
                    [row[name] for row in run],
                    colour,
                    label=label,
                    linewidth=1,
                )
        axis.set_title(name)
        axis.set_xlabel("step")
    axes[0].legend()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
