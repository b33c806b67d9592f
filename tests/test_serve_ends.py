"""How requests and the server end: bugs, a failing engine, draining; and what the log has of them."""

import concurrent.futures
import json
import threading
import time

import pytest

from internvl3_jax.serve.limits import Limits
from tests.support.live_server import (
    HI,
    events,
    ids_of,
    long_answer,
    scripted,
    serving,
    stop_id,
    until,
    user,
)
from tests.support.scripted_engine import ScriptedEngine


def test_a_request_that_fails_fails_alone(monkeypatch):
    from internvl3_jax.serve import chat_endpoint

    real = chat_endpoint.prepare

    def prepare(asked, *rest):
        if "poison" in asked.turns[-1].message["content"]:
            raise RuntimeError("a bug")
        return real(asked, *rest)

    monkeypatch.setattr(chat_endpoint, "prepare", prepare)
    with serving(scripted()) as live:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            texts = ["poison", "fine"] * 8
            responses = list(pool.map(lambda text: live.post({"messages": user(text)}), texts))
        for text, response in zip(texts, responses, strict=True):
            assert response.status == (500 if text == "poison" else 200)
        assert "a bug" not in responses[0].error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_failing_engine_ends_the_server(stream):
    """All requests get an error, running, waiting or new, and the status is not 0."""
    release = threading.Event()

    def script(request):
        if release.is_set():
            raise RuntimeError("the device is gone")
        return long_answer()

    engine = ScriptedEngine([stop_id()], script, rows=3, seconds=0.02)
    with serving(engine) as live, concurrent.futures.ThreadPoolExecutor(8) as pool:
        body = HI | {"max_tokens": 1000, "stream": stream}
        asked = [pool.submit(live.post, body) for _ in range(2)]
        until(lambda: engine.stats.running == 2)
        release.set()
        asked += [pool.submit(live.post, body) for _ in range(4)]
        answers = [future.result(timeout=30) for future in asked[:2]]
        for answer in answers:
            if stream:
                *_, last = answer.data.decode().strip().split("\n\n")
                error = json.loads(last.removeprefix("data: "))["error"]
                assert error["type"] == "server_error"
            else:
                assert answer.status == 500 and answer.error["type"] == "server_error"
        for future in asked[2:]:
            if future.exception(timeout=30) is None and not stream:
                assert future.result().status in (500, 503)
        assert live.join() == 1
    assert engine.failed is not None


def test_draining():
    """Running and waiting requests finish; the status is 0; nothing new is taken."""
    engine = ScriptedEngine([stop_id()], lambda request: ids_of("a b c d e f"), rows=2, seconds=0.1)
    with serving(engine) as live, concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(live.post, HI | {"stream": k % 2 == 0}) for k in range(6)]
        until(lambda: len(engine.tickets) == 6)
        live.drain()
        for future in asked:
            assert future.result(timeout=30).status == 200
        assert live.join() == 0
        with pytest.raises(OSError):
            live.get("/health")
    assert {ticket.finish for ticket in engine.tickets} == {"stop"}


def test_draining_has_an_end():
    engine = ScriptedEngine([stop_id()], lambda request: long_answer(), rows=1, seconds=0.05)
    with serving(engine, drain_seconds=0.5) as live:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(live.post, HI | {"max_tokens": 1000}) for _ in range(3)]
            until(lambda: len(engine.tickets) == 3)
            began = time.monotonic()
            live.drain()
            for future in asked:
                response = future.result(timeout=30)
                assert (response.status, response.error["code"]) == (503, "draining")
        assert live.join() == 0
        assert time.monotonic() - began < 10


def test_the_log_has_no_prompts(caplog):
    with caplog.at_level("INFO", "internvl3_jax.serve"):
        with serving(scripted("answer-text"), api_key="key-text") as live:
            live.post({"messages": user("prompt-text")}, Authorization="Bearer key-text")
            live.post({"messages": user("prompt-text"), "n": 0}, Authorization="Bearer key-text")
    text = caplog.text
    assert "status 200" in text and "status 400" in text
    assert not any(word in text for word in ("prompt-text", "answer-text", "key-text"))
    with caplog.at_level("INFO", "internvl3_jax.serve"):
        with serving(scripted("answer-text"), log_prompts=True) as live:
            live.post({"messages": user("prompt-text\x1b[2J")})
    assert "prompt-text\\x1b[2J" in caplog.text and "answer-text" in caplog.text


def test_many_clients_at_once():
    engine = scripted("one two three", rows=8)
    with serving(engine) as live, concurrent.futures.ThreadPoolExecutor(64) as pool:
        bodies = [HI | {"stream": k % 3 == 0, "n": 1 + k % 2} for k in range(256)]
        responses = list(pool.map(live.post, bodies))
    assert {response.status for response in responses} == {200}
    for body, response in zip(bodies, responses, strict=True):
        if body["stream"]:
            chunks = [chunk["choices"][0] for chunk in events(response.data)]
            text = "".join(
                chunk["delta"].get("content", "") for chunk in chunks if chunk["index"] == 0
            )
        else:
            text = response.json["choices"][0]["message"]["content"]
        assert text == "one two three"
    assert live.service.budget.held == 0


def test_a_round_that_does_not_end():
    """/health says so, so that a supervisor can start the server again."""
    release = threading.Event()

    def script(request):
        release.wait(30)
        return ids_of("ok")

    engine = ScriptedEngine([stop_id()], script)
    with serving(engine, limits=Limits(step_seconds=0.3)) as live:
        assert live.get("/health").status == 200
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            asked = pool.submit(live.post, HI)
            until(lambda: live.get("/health").status == 503)
            assert live.get("/health").error["code"] == "engine_stuck"
            release.set()
            assert asked.result(timeout=30).status == 200
        until(lambda: live.get("/health").status == 200)
