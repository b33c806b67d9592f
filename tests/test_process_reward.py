"""examples/process_reward: its data are right and fit its recipes, and its table says what the
answers say.
"""

import json
import pathlib
import re
import sys
import types

import numpy as np
import pytest

from configs.process_reward import STAGES, get_config
from internvl3_jax.config import DataConfig
from internvl3_jax.data.critic_format import critic_messages, split_steps
from internvl3_jax.data.loader import BatchLoader
from internvl3_jax.data.pipeline import make_tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples" / "process_reward"


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(FOLDER))
    try:
        yield types.SimpleNamespace(task=__import__("task"), run=__import__("run"))
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("task", "run"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def data(example, tmp_path_factory):
    """The folder that run.py writes, small, with labels as if the taught solutions had been drawn."""
    folder = tmp_path_factory.mktemp("process_reward")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example.run, "TAUGHT", 12)
        patch.setattr(example.run, "TAUGHT_TEXT", 12)
        example.run.make_data(folder, 12, 5)
    rows = []
    for line in (folder / "labeled_solved.jsonl").read_text().splitlines():
        row = json.loads(line)
        question, answer = (turn["value"] for turn in row["conversations"])
        steps = split_steps(answer)
        messages = critic_messages(question, steps, ["+"] * (len(steps) - 1) + ["-"])
        turns = [
            {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]}
            for m in messages
        ]
        rows.append(
            row
            | {"conversations": turns, "scores": [0.5] * (len(steps) - 1) + [0.0], "solutions": 1}
        )
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def read(solution: str) -> list[tuple[str, str, str, str]]:
    """(digit, verdict, marks so far, digits left) of each step after the reading."""
    _, *steps, _ = solution.split("\n\n")
    return [
        re.fullmatch(r"(\d) is (even|odd): ([eo]+)(?:, (\d+))?", step).groups("") for step in steps
    ]


def test_solutions_are_right(example):
    rng = np.random.default_rng(0)
    for _ in range(50):
        values = rng.integers(0, 10, rng.integers(1, 6)).tolist()
        solution = example.task.solve(values)
        written = "".join(map(str, values))
        marks = "".join("eo"[value % 2] for value in values)
        assert solution.startswith(written + "\n\n") and solution.endswith(f"Answer: {marks}")
        for number, (digit, verdict, so_far, left) in enumerate(read(solution)):
            assert (digit, verdict[0]) == (written[number], marks[number])
            assert (so_far, left) == (marks[: number + 1], written[number + 1 :])


def test_the_teacher_is_wrong_about_two_digits(example):
    rng = np.random.default_rng(0)
    steps = [
        step
        for _ in range(400)
        for step in read(example.task.solve(rng.integers(0, 10, 5).tolist(), rng))
    ]
    wrong = {
        digit: [verdict[0] != "eo"[int(digit) % 2] for d, verdict, _, _ in steps if d == digit]
        for digit in "0123456789"
    }
    shares = {digit: sum(found) / len(found) for digit, found in wrong.items()}
    assert {digit for digit, share in shares.items() if share} == {"6", "9"}
    assert all(0.5 < shares[digit] < 0.7 for digit in "69")


def test_questions(data):
    for name, count in (("taught", 12), ("labeled", 12), ("test", 5)):
        questions = [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]
        solved = [
            json.loads(line) for line in (data / f"{name}_solved.jsonl").read_text().splitlines()
        ]
        assert len(questions) == len(solved) == count
        for question, row in zip(questions, solved, strict=True):
            digits = row["conversations"][1]["value"].split("\n")[0]
            assert question["answer"] == "".join("eo"[int(digit) % 2] for digit in digits)
            assert (data / question["image"]).is_file()


@pytest.mark.parametrize("stage", STAGES)
def test_the_recipes_take_the_data(stage, data):
    config = get_config(stage)
    values = vars(config.data) | {
        "source": str(data / f"{stage}.json"),
        "tokenizer": str(ROOT / "examples" / "tiny_digits"),
    }
    settings = DataConfig(**(values | {"packing_buffer": 4}))
    with BatchLoader(settings, config.processor, make_tokenizer(settings)) as batches:
        batch = next(batches).batch
    assert (batch["segments"] > 0).mean() > 0.5 and (batch["loss_weights"] > 0).any()


def test_there_is_no_third_stage():
    with pytest.raises(ValueError, match="policy and critic"):
        get_config("sft")


def candidate(final: str, *scores: float) -> dict:
    return {"final": final, "scores": list(scores)}


def test_the_table(example, data):
    """Two questions of two draws whose every number is known."""
    eight = [
        candidate("1", 0.2),
        *[candidate("2", 0.4, 0.6)] * 4,
        candidate("3", 0.9, 0.9),
        candidate("3", 0.1, 1.0),
        candidate("4", 0.3),
    ]
    for seed, answers in enumerate([("1", "2"), ("3", "2")]):
        rows = [
            {"id": n, "answer": answer, "candidates": eight} for n, answer in enumerate(answers)
        ]
        (data / f"answers_{seed}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = example.run.summarize(data)
    results = json.loads((data / "results.json").read_text())
    assert results["one answer"]["greedy"] == [0.5, 0.0]
    assert results["of n"]["majority"] == {
        "1": [0.5, 0.0],
        "2": [0.5, 0.0],
        "4": [0.5, 0.5],
        "8": [0.5, 0.5],
    }
    assert results["of n"]["critic, mean"]["8"] == [0.0, 0.5] and results["of n"]["critic, mean"][
        "4"
    ] == [0.5, 0.5]
    assert results["of n"]["critic, max"]["8"] == [0.0, 0.5]
    assert results["of n"]["any right"]["8"] == [1.0, 1.0]
    assert results["critic - majority"]["mean"] == pytest.approx(-0.25)
    assert results["labels"]["wrong"] == results["labels"]["solutions"] == 12
    assert "| majority | 25.0 % (0.0-50.0) | 25.0 % (0.0-50.0) | 50.0 % | 50.0 % |" in text
