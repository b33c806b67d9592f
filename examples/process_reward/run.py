"""A critic in miniature: a model that makes mistakes, a critic trained on them, and whether it
finds the right one of eight answers.

    pip install -e '.[demo]'
    python examples/process_reward/run.py runs/process_reward

    taught      pictures with solutions, and solutions without pictures; `policy`, a run of train.py, learns from them
    labels      the policy's own solutions to other pictures, each step + or - by 16 continuations
                (internvl3_jax.reward.make_process_labels)
    critic      a run of train.py that starts from the policy and learns the labels
    test        pictures of handwriting that is in no training picture. Eight answers to each, one greedy; the table says how often the
                greedy answer is right, the majority's, and the critic's choice

The task is task.py's. Run again, it goes on where it stopped; results.json and results.md are made
of what is there.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "process_reward.py"
TAUGHT, TAUGHT_TEXT, LABELLED, TEST = 1500, 3000, 300, 400  # questions
N = 8
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
        help="of the draws of the answers; each asks all questions anew",
    )
    parser.add_argument(
        "--steps", type=int, default=None, help="of each training, fewer than the recipe's"
    )
    parser.add_argument("--questions", type=int, default=TEST, help="asked")
    parser.add_argument(
        "--labelled", type=int, default=LABELLED, help="questions that the critic learns from"
    )
    options = parser.parse_args()
    folder = options.output.resolve()
    make_data(folder, options.labelled, options.questions)
    train(folder, "policy", options.steps)
    label(folder)
    train(folder, "critic", options.steps)
    for seed in range(options.seeds):
        ask(folder, seed)
    print(summarise(folder))


def make_data(folder: pathlib.Path, labelled: int, questions: int) -> None:
    from task import write_questions, write_text

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "critic.json").exists():
        write_text(folder / "taught_text.jsonl", TAUGHT_TEXT, seed=0)
        for name, count, split in (
            ("taught", TAUGHT, "train"),
            ("labelled", labelled, "train"),
            ("test", questions, "test"),
        ):
            write_questions(folder, name, count, split, seed=0)
        sources = {
            "policy": {"text": "taught_text", "pictures": "taught_solved"},
            "critic": {"labels": "labels"},
        }
        for stage, names in sources.items():
            entries = {
                name: {"root": str(folder), "annotation": str(folder / f"{file}.jsonl")}
                for name, file in names.items()
            }
            (folder / f"{stage}.json").write_text(json.dumps(entries, indent=1))


def train(folder: pathlib.Path, stage: str, steps: int | None) -> None:
    """Runs train.py, or goes on with it."""
    command = [ROOT / "train.py", f"--config={CONFIG}:{stage}", f"--workdir={folder / stage}"]
    command += [
        f"--config.data.source={folder / stage}.json",
        f"--config.data.tokenizer={ROOT / 'examples/tiny_digits'}",
    ]
    command += [
        f"--config.init_from={ROOT / 'examples/tiny_digits' if stage == 'policy' else folder / 'policy'}"
    ]
    call(
        [
            *command,
            *(
                []
                if steps is None
                else [f"--config.steps={steps}", "--config.optimizer.warmup_steps=1"]
            ),
        ]
    )


def label(folder: pathlib.Path) -> None:
    names = {"checkpoint": "policy", "questions": "labelled.jsonl", "output": "labels.jsonl"}
    command = [
        "-m",
        "internvl3_jax.reward.make_process_labels",
        *(f"--{name}={folder / file}" for name, file in names.items()),
    ]
    # 945 characters of instructions would be most of what so small a model reads.
    call([*command, f"--max_new_tokens={LIMIT}", "--system=none"])


def call(command: list) -> None:
    """Runs Python on it from the root of the clone; ends the program where it fails."""
    process = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    )
    if process.returncode:
        sys.exit(
            f"error: {command[0]} ended with status {process.returncode}; start this again to go on"
        )


def ask(folder: pathlib.Path, seed: int) -> None:
    """answers_SEED.jsonl: of each test question the right answer and the eight candidates with
    their step scores.
    """
    from internvl3_jax import Chat, Critic, load
    from internvl3_jax.reward.best_of_n import best_of_many

    path = folder / f"answers_{seed}.jsonl"
    if path.exists():
        return
    questions = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    chat, critic = (
        Chat(load(folder / "policy"), max_new_tokens=LIMIT),
        Critic(load(folder / "critic")),
    )
    lines = []
    for start in range(0, len(questions), BATCH):
        batch = questions[start : start + BATCH]
        requests = [(question["question"], [str(folder / question["image"])]) for question in batch]
        for question, choice in zip(
            batch, best_of_many(chat, critic, requests, N, seed=1000 * seed), strict=True
        ):
            lines.append(
                json.dumps({"id": question["id"], "answer": question["answer"]} | choice.as_json())
                + "\n"
            )
    path.write_text("".join(lines))


def summarise(folder: pathlib.Path) -> str:
    """Writes results.json and results.md of all answers_*.jsonl; returns the text of results.md."""
    from internvl3_jax.reward.critic import AGGREGATES

    files = sorted(folder.glob("answers_*.jsonl"))
    runs = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    labels = [json.loads(line) for line in (folder / "labels.jsonl").read_text().splitlines()]
    scores = [score for row in labels for score in row["scores"]]
    results = {
        "questions": len(runs[0]),
        "seeds": len(runs),
        "labels": {
            "solutions": len(labels),
            "steps": len(scores),
            "wrong": sum(score == 0 for score in scores),
        },
        "one answer": {
            "greedy": [share(rows, first) for rows in runs],
            "drawn (mean of the other 7)": [
                statistics.mean(share(rows, at(k)) for k in range(1, N)) for rows in runs
            ],
        },
        "of n": {
            "majority": {
                n: [share(rows, lambda row, n=n: majority(row, n)) for rows in runs] for n in COUNTS
            },
            **{
                f"critic, {name}": {
                    n: [share(rows, lambda row, n=n, f=f: by_score(row, n, f)) for rows in runs]
                    for n in COUNTS
                }
                for name, f in AGGREGATES.items()
            },
            "any right": {
                n: [share(rows, lambda row, n=n: any_right(row, n)) for rows in runs]
                for n in COUNTS
            },
        },
        "majority - greedy": difference(runs, lambda row: majority(row, N), first),
        "critic - majority": difference(
            runs, lambda row: by_score(row, N, AGGREGATES["mean"]), lambda row: majority(row, N)
        ),
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    text = as_text(results)
    (folder / "results.md").write_text(text, encoding="utf-8")
    return text


def right(row: dict, number: int) -> bool:
    from internvl3_jax.reward.answer_matching import same_answer

    final = row["candidates"][number]["final"]
    return final is not None and same_answer(final, row["answer"])


def first(row: dict) -> bool:
    return right(row, 0)


def at(number: int):
    return lambda row: right(row, number)


def majority(row: dict, n: int) -> bool:
    from internvl3_jax.reward.best_of_n import count_votes

    votes = count_votes([candidate["final"] for candidate in row["candidates"][:n]])
    return right(row, votes.index(max(votes)))


def by_score(row: dict, n: int, aggregate) -> bool:
    scores = [aggregate(candidate["scores"]) for candidate in row["candidates"][:n]]
    return right(row, scores.index(max(scores)))


def any_right(row: dict, n: int) -> bool:
    return any(right(row, number) for number in range(n))


def share(rows: list[dict], is_right) -> float:
    return sum(map(is_right, rows)) / len(rows)


def difference(runs: list[list[dict]], one, other, resamples: int = 2000) -> dict:
    """How much oftener one way is right than another: mean, and 95 % interval when the questions
    are drawn anew.
    """
    import numpy as np

    gains = np.asarray([[one(row) - other(row) for row in rows] for rows in runs], float).mean(
        axis=0
    )
    rng = np.random.default_rng(0)
    means = gains[rng.integers(0, len(gains), (resamples, len(gains)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": float(gains.mean()), "interval": [float(low), float(high)]}


def as_text(results: dict) -> str:
    single = results["one answer"]
    labels = results["labels"]
    rows = [
        ["greedy", spread(single["greedy"]), "", "", ""],
        [*list(single)[1:], spread(list(single.values())[1]), "", "", ""],
    ]
    rows += [[name, *(spread(found[n]) for n in COUNTS)] for name, found in results["of n"].items()]
    lines = [
        f"| {' | '.join(row)} |"
        for row in [["", *(f"of {n}" for n in COUNTS)], ["---"] * (1 + len(COUNTS)), *rows]
    ]
    intro = (
        f"Right answers to {results['questions']} held-out questions. Draws repeated {results['seeds']} times: the mean, and in brackets "
        f"the lowest and the highest. The critic learnt from {labels['solutions']:,} solutions with {labels['steps']:,} steps, "
        f"{labels['wrong'] / labels['steps']:.0%} of them wrong."
    )
    outro = (
        f"Majority of 8 less greedy: {points(results['majority - greedy'])}. Best of 8 by the critic's mean less the majority of 8: "
        f"{points(results['critic - majority'])}."
    )
    return "\n\n".join([intro, "\n".join(lines), outro]) + "\n"


def points(gain: dict) -> str:
    low, high = (f"{100 * side:+.1f}" for side in gain["interval"])
    return f"{100 * gain['mean']:+.1f} points (95 % interval over questions {low} to {high})"


def spread(values: list[float]) -> str:
    mean = f"{100 * statistics.mean(values):.1f} %"
    return (
        mean
        if min(values) == max(values)
        else f"{mean} ({100 * min(values):.1f}-{100 * max(values):.1f})"
    )


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
