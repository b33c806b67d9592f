"""A critic in miniature: trains a model that makes mistakes and a critic of its steps, and counts how
often the critic finds the correct one of eight answers.

    pip install -e '.[demo]'
    python examples/process_reward/run.py runs/process_reward

    taught      images with solutions, and solutions without images: the data of `policy`, a run of
                train.py
    labels      the policy's own solutions to other images, each step labeled + or - by 16
                continuations (internvl3_jax.reward.make_process_labels)
    critic      a run of train.py that starts from the policy and learns the labels
    test        images of unseen handwriting. Eight answers to each, one of them greedy. The table
                compares the greedy answer, the majority and the critic's choice

The task is in task.py. Run again, it resumes. results.json and results.md are made of all finished
seeds.
"""

import argparse
import json
import pathlib
import statistics
import sys
from collections.abc import Callable

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import task

from examples.experiment import (
    DIGITS_MODEL,
    markdown_table,
    percent,
    read_jsonl,
    run_python,
    train,
    write_jsonl,
    write_meta,
)

# Number of questions in each file
TAUGHT, TAUGHT_TEXT, LABELED, TEST = 1500, 3000, 300, 400
N = 8  # answers to each test question
COUNTS = (1, 2, 4, 8)
LIMIT = 128  # tokens of an answer
BATCH = 20  # questions answered together


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument(
        "--seeds",
        type=int,
        default=3,
        help="number of times that all questions are answered (%(default)s)",
    )
    parser.add_argument(
        "--steps", type=int, default=None, help="steps of each training; default: the recipe's"
    )
    parser.add_argument(
        "--questions", type=int, default=TEST, help="questions of the evaluation (%(default)s)"
    )
    parser.add_argument(
        "--labeled",
        type=int,
        default=LABELED,
        help="questions that the critic learns from (%(default)s)",
    )
    options = parser.parse_args()
    folder = options.output.resolve()
    settings = {"data.tokenizer": DIGITS_MODEL}
    if options.steps is not None:
        settings |= {"steps": options.steps, "optimizer.warmup_steps": 1}
    make_data(folder, options.labeled, options.questions)
    start = {"data.source": folder / "policy.json", "init_from": DIGITS_MODEL}
    train("process_reward.py:policy", folder / "policy", settings | start)
    label(folder)
    start = {"data.source": folder / "critic.json", "init_from": folder / "policy"}
    train("process_reward.py:critic", folder / "critic", settings | start)
    for seed in range(options.seeds):
        answer_test(folder, seed)
    print(summarize(folder))


def make_data(folder: pathlib.Path, labeled: int, questions: int) -> None:
    """Writes questions, solutions and meta JSONs, unless they exist."""
    if (folder / "critic.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    task.write_text(folder / "taught_text.jsonl", TAUGHT_TEXT, seed=0)
    task.write_questions(folder, "taught", TAUGHT, "train", seed=0)
    task.write_questions(folder, "labeled", labeled, "train", seed=0)
    task.write_questions(folder, "test", questions, "test", seed=0)
    sources = {"text": "taught_text.jsonl", "pictures": "taught_solved.jsonl"}
    write_meta(folder / "policy.json", sources)
    write_meta(folder / "critic.json", {"labels": "labels.jsonl"})


def label(folder: pathlib.Path) -> None:
    names = {"checkpoint": "policy", "questions": "labeled.jsonl", "output": "labels.jsonl"}
    flags = [f"--{name}={folder / file}" for name, file in names.items()]
    # No system message: its 945 characters would be most of what so small a model reads.
    flags += [f"--max_new_tokens={LIMIT}", "--system=none"]
    run_python("-m", "internvl3_jax.reward.make_process_labels", *flags)


def answer_test(folder: pathlib.Path, seed: int) -> None:
    """Writes answers_SEED.jsonl: the expected answer and the scored candidates of each question."""
    from internvl3_jax import Chat, Critic, best_of_many, load

    path = folder / f"answers_{seed}.jsonl"
    if path.exists():
        return
    questions, rows = read_jsonl(folder / "test.jsonl"), []
    chat = Chat(load(folder / "policy"), max_new_tokens=LIMIT)
    critic = Critic(load(folder / "critic"))
    for start in range(0, len(questions), BATCH):
        batch = questions[start : start + BATCH]
        requests = [(question["question"], [str(folder / question["image"])]) for question in batch]
        choices = best_of_many(chat, critic, requests, N, seed=1000 * seed)
        rows += [
            {"id": question["id"], "answer": question["answer"]} | choice.as_json()
            for question, choice in zip(batch, choices, strict=True)
        ]
    write_jsonl(path, rows)


# --- ways to choose one of the candidates --------------------------------------------------------


def is_right(row: dict, number: int) -> bool:
    from internvl3_jax.reward.answer_matching import same_answer

    final = row["candidates"][number]["final"]
    return final is not None and same_answer(final, row["answer"])


def greedy(row: dict) -> bool:
    return is_right(row, 0)


def majority(row: dict, n: int) -> bool:
    from internvl3_jax.reward.best_of_n import count_votes

    votes = count_votes([candidate["final"] for candidate in row["candidates"][:n]])
    return is_right(row, votes.index(max(votes)))


def by_score(row: dict, n: int, aggregate: Callable) -> bool:
    scores = [aggregate(candidate["scores"]) for candidate in row["candidates"][:n]]
    return is_right(row, scores.index(max(scores)))


def any_right(row: dict, n: int) -> bool:
    return any(is_right(row, number) for number in range(n))


# --- results -------------------------------------------------------------------------------------


def summarize(folder: pathlib.Path) -> str:
    """Writes results.json and results.md of all answers_*.jsonl; returns the text of results.md."""
    from internvl3_jax.reward.critic import AGGREGATES

    runs = [read_jsonl(file) for file in sorted(folder.glob("answers_*.jsonl"))]
    labels = read_jsonl(folder / "labels.jsonl")
    scores = [score for row in labels for score in row["scores"]]

    def by_count(choose: Callable[[dict, int], bool]) -> dict[int, list[float]]:
        return {n: [share(rows, lambda row, n=n: choose(row, n)) for rows in runs] for n in COUNTS}

    def by_critic(name: str) -> Callable[[dict, int], bool]:
        return lambda row, n: by_score(row, n, AGGREGATES[name])

    sampled = [
        statistics.mean(share(rows, lambda row, k=k: is_right(row, k)) for k in range(1, N))
        for rows in runs
    ]
    results = {
        "questions": len(runs[0]),
        "seeds": len(runs),
        "labels": {
            "solutions": len(labels),
            "steps": len(scores),
            "wrong": sum(score == 0 for score in scores),
        },
        "one answer": {
            "greedy": [share(rows, greedy) for rows in runs],
            "sampled (mean of the other 7)": sampled,
        },
        "of n": {
            "majority": by_count(majority),
            **{f"critic, {name}": by_count(by_critic(name)) for name in AGGREGATES},
            "any right": by_count(any_right),
        },
        "majority - greedy": difference(runs, lambda row: majority(row, N), greedy),
        "critic - majority": difference(
            runs, lambda row: by_critic("mean")(row, N), lambda row: majority(row, N)
        ),
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    text = as_text(results)
    (folder / "results.md").write_text(text, encoding="utf-8")
    return text


def share(rows: list[dict], is_correct: Callable[[dict], bool]) -> float:
    return sum(map(is_correct, rows)) / len(rows)


def difference(
    runs: list[list[dict]],
    first: Callable[[dict], bool],
    second: Callable[[dict], bool],
    resamples: int = 2000,
) -> dict:
    """Returns the mean of first - second, and its 95 % bootstrap interval over the questions."""
    gains = np.asarray([[first(row) - second(row) for row in rows] for rows in runs], float)
    gains = gains.mean(axis=0)
    rng = np.random.default_rng(0)
    means = gains[rng.integers(0, len(gains), (resamples, len(gains)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": float(gains.mean()), "interval": [float(low), float(high)]}


def as_text(results: dict) -> str:
    single, labels = results["one answer"], results["labels"]
    rows = [[name, percent(shares), "", "", ""] for name, shares in single.items()]
    rows += [[name, *map(percent, shares.values())] for name, shares in results["of n"].items()]
    intro = (
        f"Correct answers to {results['questions']} unseen questions, sampled {results['seeds']} "
        "times: the mean, with the lowest and the highest in brackets. The critic learned from "
        f"{labels['solutions']:,} solutions with {labels['steps']:,} steps, "
        f"{labels['wrong'] / labels['steps']:.0%} of them wrong."
    )
    outro = (
        f"Majority of 8 minus greedy: {points(results['majority - greedy'])}. Best of 8 by the "
        f"critic's mean minus majority of 8: {points(results['critic - majority'])}."
    )
    table = markdown_table(["", *(f"of {n}" for n in COUNTS)], rows)
    return "\n\n".join([intro, table, outro]) + "\n"


def points(gain: dict) -> str:
    low, high = (f"{100 * side:+.1f}" for side in gain["interval"])
    return f"{100 * gain['mean']:+.1f} points (95 % interval over questions {low} to {high})"


if __name__ == "__main__":
    main()
