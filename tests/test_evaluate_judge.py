"""Marks of a judge, from a server of this machine."""

import http.server
import json
import threading

import pytest

from internvl3_jax.evaluate import judging
from internvl3_jax.evaluate.command import load
from internvl3_jax.evaluate.judging import RULES, Judge, judged
from internvl3_jax.evaluate.task_table import TASKS
from tests.support import evaluate_world as world

REPLIES = {
    "charxiv_reasoning": "They agree.\nScore: 1",
    "charxiv_descriptive": "Score: 0",
    "mmvet": "Half of it. Score: 0.5",
    "mmbench_video": "Score: 2",
    "mmhal": "Rating: 4",
    "wildvision": "My verdict is [[B>A]]",
}
SCORES = {
    "charxiv_reasoning": 100.0,
    "charxiv_descriptive": 0.0,
    "mmvet": 50.0,
    "mmbench_video": 2.0,
    "mmhal": 4.0,
    "wildvision": 100.0,
}


@pytest.fixture
def server():
    """A server that answers with `server.replies` in turn, the last one again and again."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            running.asked.append(body)
            reply = running.replies[min(len(running.asked), len(running.replies)) - 1]
            data = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
            self.send_response(200 if self.path == "/v1/chat/completions" else 404)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.asked, running.replies = [], [""]
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def address(server) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/v1"


def answers_to(rows) -> list[dict]:
    return [{"id": row.id, "text": f"Answer {row.id}."} for row in rows]


def test_every_judged_task_has_a_rule():
    assert set(RULES) == {task.name for task in TASKS.values() if task.exact == "judge"}


@pytest.mark.parametrize("name", RULES)
def test_marks_of_every_task(name, tmp_path, server):
    loaded = load(TASKS[name], world.build(tmp_path, [TASKS[name]]))
    server.replies = [REPLIES[name]]
    path = tmp_path / "judge" / "replies.jsonl"
    found = answers_to(loaded.rows)
    assert judged(Judge(address(server), "j"), name, loaded, found, path) == (SCORES[name], 0.0)
    assert len(server.asked) == len(loaded.rows)
    content = server.asked[0]["messages"][0]["content"]
    assert "Answer 0." in content[0]["text"] or "Answer 1." in content[0]["text"]
    assert (len(content) == 2) == RULES[name].images
    # Nothing is asked twice; other answers and other judges are refused.
    assert judged(Judge(address(server), "j"), name, loaded, found, path) == (SCORES[name], 0.0)
    assert len(server.asked) == len(loaded.rows)
    with pytest.raises(ValueError, match="has replies of j; move it away"):
        judged(Judge(address(server), "k"), name, loaded, found, path)
    with pytest.raises(ValueError, match="has replies to other answers"):
        judged(Judge(address(server), "j"), name, loaded, [{"id": "x", "text": "y"}], path)


def test_an_unreadable_reply_is_asked_again_and_then_worth_nothing(tmp_path, server):
    loaded = load(TASKS["mmvet"], world.build(tmp_path, [TASKS["mmvet"]]))
    server.replies = ["no number", "Score: 1.0", "none"]
    found, path = answers_to(loaded.rows)[:2], tmp_path / "replies.jsonl"
    assert judged(Judge(address(server), "j"), "mmvet", loaded, found, path) == (50.0, 0.5)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["readable"] for row in rows] == [True, False] and len(server.asked) == 2 + 3


def test_a_server_that_does_not_answer_is_named(tmp_path, server, monkeypatch):
    monkeypatch.setattr(judging.time, "sleep", lambda seconds: None)
    loaded = load(TASKS["mmvet"], world.build(tmp_path, [TASKS["mmvet"]]))
    for url in (f"{address(server)}/nothing", "http://127.0.0.1:9/v1"):
        with pytest.raises(
            ValueError, match=r"--judge http://127.*; check the address and --judge_m"
        ):
            judged(Judge(url, "j"), "mmvet", loaded, answers_to(loaded.rows), tmp_path / "r.jsonl")
