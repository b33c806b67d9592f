"""`python -m internvl3_jax.evaluate` with a critic, and on two processes as on two hosts: end to end
with tiny checkpoints.
"""

import functools
import json
import os
import shutil

import pytest

from internvl3_jax import Critic, load
from internvl3_jax.evaluate import prompts, running
from internvl3_jax.evaluate.stored import as_jpeg
from internvl3_jax.evaluate.task_table import TASKS
from tests.support import evaluate_world as world
from tests.support import tiny_checkpoint
from tests.support.evaluate_rows import picture
from tests.support.evaluate_runs import evaluate, read_report
from tests.support.local_processes import Processes, finish, free_address


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A reasoning task, a task of images and one of a video, of six rows each."""
    names = ("mathvista", "mmstar", "mlvu")
    return world.build(tmp_path_factory.mktemp("data"), [TASKS[name] for name in names])


def answers(output, name: str) -> list[dict]:
    lines = (output / "answers" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


# --- best of N --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def critic(tmp_path_factory):
    """A checkpoint with other weights than the model that answers."""
    seed = functools.partial(tiny_checkpoint.random_params, tiny_checkpoint.CONFIG, seed=8)
    folder = tmp_path_factory.mktemp("critic") / "critic"
    tiny_checkpoint.save_checkpoint(
        folder,
        seed(),
        tiny_checkpoint.CONFIG,
        tiny_checkpoint.PROCESSOR,
        tiny_checkpoint.tokenizer_files(),
    )
    return folder


def test_the_critic_chooses_among_the_candidates(data, critic, tmp_path, monkeypatch, capsys):
    output, model = tmp_path / "output", str(tiny_checkpoint.directory())
    more = ["--checkpoint", model, "--best_of", "4", "--critic", str(critic), "--limit", "3"]
    more += ["--batch_size", "4", "--max_new_tokens", "8", "--card", "1B"]
    assert evaluate(data, output, ["mathvista"], *more) == 0
    name = "mathvista.reasoning.best_of_4"
    rows, report = answers(output, name), read_report(output)
    assert report["best_of"] == 4 and report["tasks"][0]["run"] == name
    # 1) Of each row the candidate with the highest score is the answer.
    for row in rows:
        assert prompts.REASONING_OPEN in row["input"]  # asked for in best of N of any size
        scores = [candidate["score"] for candidate in row["candidates"]]
        assert len(scores) == 4 and row["best"] == scores.index(max(scores))
        assert row["text"] == row["candidates"][row["best"]]["text"]
        assert row["finish"] == row["candidates"][row["best"]]["finish"]
    assert {row["best"] for row in rows} != {0}  # not always the greedy one
    # 2) The scores are those of that critic.
    judge = Critic(load(critic))
    texts = [candidate["text"] for candidate in rows[0]["candidates"]]
    image = as_jpeg(picture(0), "row 1")
    expected = judge.score(rows[0]["input"].removeprefix("<image>\n"), [image], texts)
    found = [candidate["score"] for candidate in rows[0]["candidates"]]
    assert [one.score for one in expected] == pytest.approx(found, abs=1e-5)
    # 3) A stopped run resumes, and asks nothing twice.
    path = output / "answers" / f"{name}.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    asked = []
    best_of_many = running.best_of_many

    def counted(chat, critic, requests, **options):
        asked.extend(options["names"])
        return best_of_many(chat, critic, requests, **options)

    monkeypatch.setattr(running, "best_of_many", counted)
    assert evaluate(data, output, ["mathvista"], *more) == 0
    assert len(asked) == 2 and not any("row 1 " in name for name in asked)
    timeless = [{key: row[key] for key in ("id", "text", "best")} for row in rows]
    assert [{key: row[key] for key in timeless[0]} for row in answers(output, name)] == timeless
    # 4) Another critic is refused.
    other = shutil.copytree(model, tmp_path / "other")
    capsys.readouterr()
    more[more.index("--critic") + 1] = str(other)
    assert evaluate(data, output, ["mathvista"], *more) == 1
    assert "critic" in capsys.readouterr().err


# --- several hosts ----------------------------------------------------------------------------------


def test_two_hosts_evaluate_as_one(data, tmp_path):
    """Images and a video; the second run resumes after what only the first host knows of."""
    line = ["-m", "internvl3_jax.evaluate", "--checkpoint", str(tiny_checkpoint.directory())]
    line += ["--data", str(data), "--tasks", "mmstar,mlvu", "--frames", "2", "--card", "1B"]
    line += [
        "--compilation_cache",
        "",
        "--batch_size",
        "2",
        "--max_new_tokens",
        "4",
        "--limit",
        "4",
    ]
    finish(Processes([[*line, "--output", str(tmp_path / "one")]], 1))
    hosts, address = [], free_address()
    for number in range(2):
        own = ["--hosts", "--fsdp", "2", "--coordinator", address, "--processes", "2"]
        own += ["--process", str(number), "--output", str(tmp_path / f"host_{number}")]
        hosts.append([*line, *own])
    first = (tmp_path / "one" / "answers" / "mmstar.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "host_0" / "answers").mkdir(parents=True)
    (tmp_path / "host_0" / "answers" / "mmstar.jsonl").write_text(first[0])
    outs = [ended.out for ended in finish(Processes(hosts, 2))]
    assert "3 answers written to" in outs[0] and "| MMStar |" in outs[0]
    assert "| MMStar |" not in outs[1]
    for name in ("mmstar", "mlvu.2_frames"):
        found, expected = answers(tmp_path / "host_0", name), answers(tmp_path / "one", name)
        assert len(found) == 4
        for row, wanted in zip(found, expected, strict=True):
            for timed in (row, wanted):
                del timed["seconds"]
            assert row == wanted
        assert not os.path.exists(tmp_path / "host_1" / "answers" / f"{name}.jsonl")
    one, other = read_report(tmp_path / "one"), read_report(tmp_path / "host_0")
    assert one == other
