"""What tools/kill.py compares: nothing but times is left out, and a difference is named."""

import json

import pytest

from tools.kill_state import TIMES, answers, compared

pytestmark = pytest.mark.smoke


def test_times_alone_may_differ():
    kept = (
        "step",
        "loss",
        "loss/text",
        "grad_norm",
        "grad_norm/vision",
        "batch",
        "eval_loss",
        "learning_rate",
        "tokens",
        "skipped",
    )
    assert [key for key in kept if TIMES.search(key)] == []
    times = ("seconds", "tokens_per_second", "tiles_per_second", "input_wait", "mfu")
    assert [key for key in times if not TIMES.search(key)] == []


def test_a_difference_is_named(capsys):
    whole = {
        "params['a']": "1",
        "log.jsonl": [{"step": 1}],
        "answers.jsonl": [{"step": 1}],
        "skipped.txt": "",
    }
    assert compared("a run", dict(whole), whole) == []
    assert "1 log rows, 1 answers, 1 arrays equal" in capsys.readouterr().out
    other = whole | {"params['a']": "2", "answers.jsonl": [{"step": 1}] * 2}
    assert compared("a run", other, whole) == ["a run: params['a']", "a run: answers.jsonl"]
    assert "answers.jsonl differs (2 rows, 1 expected)" in capsys.readouterr().out
    assert compared("a run", whole, whole | {"params['b']": "3"}) == ["a run: params['b']"]


def test_answers_are_compared_without_their_times(tmp_path):
    rows = [{"id": 1, "text": "a", "seconds": 0.5}, {"id": 2, "text": "书", "seconds": 1.5}]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    assert answers(tmp_path / "a.jsonl") == [{"id": 1, "text": "a"}, {"id": 2, "text": "书"}]
