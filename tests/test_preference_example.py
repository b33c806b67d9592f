"""examples/preference: its pairs fit its recipe, and its table says what the answers say."""

import json
import pathlib
import sys
import types

import pytest

from configs.preference import LOSSES, get_config
from internvl3_jax.config import DataConfig
from internvl3_jax.data.loader import BatchLoader
from internvl3_jax.data.pipeline import make_tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples" / "preference"


@pytest.fixture
def example():
    places = [str(ROOT / "examples" / "process_reward"), str(FOLDER)]
    sys.path[:0] = places[::-1]
    try:
        yield types.SimpleNamespace(task=__import__("task"), run=__import__("run"))
    finally:
        for place in places:
            sys.path.remove(place)
        for name in ("task", "run"):
            sys.modules.pop(name, None)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_longest_pairs_fit_a_row(example, tmp_path, loss, monkeypatch):
    monkeypatch.setattr(example.run, "TAUGHT", 4)
    monkeypatch.setattr(example.run, "TAUGHT_TEXT", 4)
    example.run.make_data(tmp_path, 8, 4, seed=0)
    questions = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    longest = example.task.solve([8] * example.task.MOST)
    answers = {"chosen": longest, "rejected": longest.replace("8 is even", "8 is odd")}
    assert answers["chosen"] != answers["rejected"]
    rows = [{"image": q["image"], "question": q["question"]} | answers for q in questions]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = get_config(loss)
    values = vars(config.data) | {
        "source": str(tmp_path / "pairs.json"),
        "tokenizer": str(ROOT / config.data.tokenizer),
    }
    data = DataConfig(**values)
    with BatchLoader(data, config.processor, make_tokenizer(data)) as batches:
        assert next(batches).batch["answers"].max() >= 2


def test_the_table_counts(example, tmp_path):
    seen = {"policy": (1, 2), "generation": (2, 2), "mpo": (3, 2)}  # right of 4, of each seed
    names = (
        "loss",
        "loss_preference",
        "loss_quality",
        "loss_generation",
        "reward_margin",
        "reward_accuracy",
        "reward_shift",
    )
    for seed in range(2):
        folder = tmp_path / f"seed_{seed}"
        for model, right in seen.items():
            (folder / model).mkdir(parents=True)
            rows = [
                {"id": n, "answer": "6", "text": f"Answer: {6 if n < right[seed] else 7}"}
                for n in range(4)
            ]
            (folder / f"answers_{model}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in rows)
            )
            log = [{"step": step} | dict.fromkeys(names, 0.5) for step in (10, 20)]
            (folder / model / "log.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in log)
            )
        (folder / "pairs.jsonl.done").write_text(
            '{"id": 0, "rows": 2, "right": 1, "wrong": 2, "unstated": 0}\n'
        )
    text = example.run.summarize(tmp_path)
    assert (
        "| policy | 25.0 % | 50.0 % | 37.5 % |" in text
        and "| mpo | 75.0 % | 50.0 % | 62.5 % |" in text
    )
    assert (
        "MPO minus policy: +25.0 points (+50.0, +0.0, standard deviation over seeds 35.4)." in text
    )
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert "2 pairs of 1 of 1 questions" in text
