"""Streams, slow and leaving clients, full queues: with engines that emit what a test gives."""

import json
import socket

import openai
import pytest

from internvl3_jax.inference.options import Options
from internvl3_jax.serve.answer_text import AnswerText
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
)
from tests.support.scripted_engine import ScriptedEngine


def open_stream(live, body: dict) -> socket.socket:
    """A connection on which the first event of a stream has come."""
    data = json.dumps(body | {"stream": True}).encode()
    connection = socket.create_connection(("127.0.0.1", live.port), timeout=30)
    connection.sendall(head(len(data)) + data)
    received = b""
    while b"data:" not in received:
        piece = connection.recv(100)
        received += piece
        assert piece and received.startswith(b"HTTP/1.1 200"[: len(received)]), received
    return connection


def head(length: int) -> bytes:
    return (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


# --- texts ---------------------------------------------------------------------------------------


def deltas(live, **fields) -> tuple[str, str, list]:
    """Joined reasoning, joined content, and all chunks of a stream."""
    response = live.post(HI | {"stream": True} | fields)
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = [chunk["choices"][0] for chunk in events(response.data)]
    joined = [
        "".join(chunk["delta"].get(name, "") for chunk in chunks)
        for name in ("reasoning_content", "content")
    ]
    return *joined, chunks


@pytest.mark.parametrize(
    "text, thinking, reasoning, content",
    [
        ("  one\n two \n", False, None, "one\n two"),
        ("<think>\n7 is odd \n</think>\n\n seven ", True, "7 is odd", "seven"),
        ("<think>7</think>seven", False, "7", "seven"),
        ("7 is odd</think>seven", True, "7 is odd", "seven"),
        ("7 is odd</think>seven", False, None, "7 is odd</think>seven"),
        ("no reasoning", True, None, "no reasoning"),
        ("<think>without end", True, "without end", ""),
        ("<thin", False, None, "<thin"),
        ("", False, None, ""),
    ],
)
def test_texts(text, thinking, reasoning, content):
    with serving(scripted(text)) as live:
        message = live.post(HI | {"thinking": thinking}).json["choices"][0]["message"]
        assert (message.get("reasoning_content"), message["content"]) == (reasoning, content)
        streamed = deltas(live, chat_template_kwargs={"enable_thinking": thinking})
        assert streamed[:2] == (reasoning or "", content)
        assert streamed[2][0]["delta"] == {"role": "assistant", "content": ""}
        assert [chunk["finish_reason"] for chunk in streamed[2][-2:]] == [None, "stop"]


def test_texts_in_any_pieces():
    """Whatever the pieces are, what comes out is the split of the whole text."""
    import random

    from internvl3_jax.data.text.reasoning import split_reasoning

    random_ = random.Random(0)
    bits = ["<think>", "</think>", "<", "/", "think", ">", " ", "\n", "a", "bc", "</thi", "<thin"]
    for _ in range(5000):
        text = "".join(random_.choices(bits, k=random_.randrange(9)))
        thinking = random_.random() < 0.5
        answer, reasoning, content, place = AnswerText(thinking), "", "", 0
        while place < len(text):
            size = random_.randrange(1, 5)
            more = answer.push(text[place : place + size])
            reasoning, content, place = reasoning + more[0], content + more[1], place + size
        more = answer.push("", final=True)
        parts = split_reasoning(text.strip(), thinking)
        assert reasoning + more[0] == (parts.reasoning or ""), text
        assert content + more[1] == parts.answer, text


def test_thinking_by_default():
    with serving(scripted("<think>a</think>b"), options=Options(thinking=True)) as live:
        live.post(HI)
        live.post(HI | {"thinking": False})
        thinking, plain = (ticket.request for ticket in live.service.engine.tickets)
        assert (thinking.sampling.temperature, plain.sampling.temperature) == (0.6, 0)
        assert len(thinking.prompt.tokens) > len(plain.prompt.tokens)  # its system message


def test_stop_texts_and_ids():
    with serving(scripted("one two three", seconds=0.02)) as live:
        until_two = live.post(HI | {"stop": " two"}).json
        assert until_two["choices"][0]["message"]["content"] == "one"
        assert until_two["choices"][0]["finish_reason"] == "stop"
        assert deltas(live, stop=[" two"])[1] == "one"
        # The engine was told: the row is free.
        until(lambda: all(ticket.finish for ticket in live.service.engine.tickets))
        assert {ticket.finish for ticket in live.service.engine.tickets} == {"cancelled"}
        token = ids_of(" two")[0]
        by_id = live.post(HI | {"stop_token_ids": [token]}).json["choices"][0]
        assert live.service.engine.tickets[-1].request.stop_ids == (stop_id(), token)
        assert by_id["message"]["content"] == "one" and by_id["finish_reason"] == "stop"


def test_settings_reach_the_engine():
    with serving(scripted()) as live:
        live.post(
            HI
            | {
                "temperature": 0.5,
                "top_p": 0.9,
                "top_k": 5,
                "min_p": 0.1,
                "repetition_penalty": 1.2,
                "presence_penalty": 0.5,
                "frequency_penalty": -0.5,
                "logit_bias": {"7": -3},
                "seed": -1,
                "n": 2,
                "max_tokens": 9,
                "logprobs": True,
            }
        )
        first, second = (ticket.request for ticket in live.service.engine.tickets)
        sampling = first.sampling
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 5)
        assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.2)
        assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
        assert sampling.logit_bias == {7: -3.0}
        assert (sampling.seed, second.sampling.seed) == (2**32 - 1, 0)
        assert (first.max_new_tokens, first.top_logprobs, first.stop_ids) == (9, 0, (stop_id(),))
        live.post(HI | {"top_k": -1})
        assert live.service.engine.tickets[-1].request.sampling.top_k == 0


# --- clients that leave or do not read -----------------------------------------------------------


@pytest.fixture
def slow():
    """A server whose answers take a minute."""
    engine = ScriptedEngine([stop_id()], lambda request: long_answer(), rows=2, seconds=0.05)
    with serving(engine, drain_seconds=1) as live:
        yield live


def test_a_client_that_leaves_frees_its_row(slow):
    with open_stream(slow, HI | {"max_tokens": 1000}) as connection:
        until(lambda: slow.service.engine.stats.running == 1)
        connection.shutdown(socket.SHUT_RDWR)
    until(lambda: slow.service.engine.stats.running == 0)
    # Without a stream, too; and while it waits in the queue.
    data = json.dumps(HI | {"max_tokens": 1000, "n": 4}).encode()
    with socket.create_connection(("127.0.0.1", slow.port)) as connection:
        connection.sendall(head(len(data)) + data)
        until(lambda: slow.service.engine.stats.running == 2)
        assert slow.service.engine.stats.waiting == 2
    until(lambda: slow.service.engine.stats.running == slow.service.engine.stats.waiting == 0)
    assert {ticket.finish for ticket in slow.service.engine.tickets} == {"cancelled"}
    until(lambda: slow.service.budget.held == 0)
    metrics = slow.get("/metrics").data.decode()
    assert "internvl3_disconnects_total 2.0" in metrics
    assert slow.get("/health").status == 200


def test_a_client_of_the_library_that_leaves(slow):
    with openai.OpenAI(base_url=f"{slow.url}/v1", api_key="x", max_retries=0) as client:
        stream = client.chat.completions.create(model="tiny", stream=True, **HI)
        next(iter(stream))
        stream.close()
        until(lambda: slow.service.engine.stats.running == 0)
        with pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(model="tiny", timeout=0.5, **HI)
        until(lambda: slow.service.engine.stats.running == 0)


def test_a_slow_reader_holds_nobody_up():
    """The answer of a client that does not read is complete at once; others continue; its
    connection ends with its time.
    """
    engine = ScriptedEngine([stop_id()], lambda request: long_answer(), rows=16)
    with serving(engine, limits=Limits(seconds=8.0)) as live:
        body = HI | {"max_tokens": 1400, "n": 8, "logprobs": True, "top_logprobs": 20}
        connection = open_stream(live, body)
        with connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
            other = live.post(HI | {"max_tokens": 3})
            assert other.status == 200
            until(lambda: not live.service.num_pending, 60)
        assert {ticket.finish for ticket in engine.tickets} <= {"length", "cancelled"}
        until(lambda: live.service.budget.held == 0)


def test_a_request_has_a_time(slow):
    slow.service.limits = Limits(seconds=0.5)
    late = slow.post(HI | {"max_tokens": 1000})
    assert (late.status, late.error["code"]) == (504, "timeout")
    response = slow.post(HI | {"max_tokens": 1000, "stream": True})
    *_, last = response.data.decode().strip().split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    with openai.OpenAI(base_url=f"{slow.url}/v1", api_key="x", max_retries=0) as client:
        with pytest.raises(openai.APIError, match="took too long"):
            list(client.chat.completions.create(model="tiny", stream=True, **HI))
    until(lambda: slow.service.engine.stats.running == 0)


def test_a_full_queue(slow):
    opened = [open_stream(slow, HI | {"max_tokens": 1000}) for _ in range(2)]
    until(lambda: slow.service.engine.stats.running == 2)
    slow.service.engine.max_queue = 1
    opened.append(open_stream(slow, HI | {"max_tokens": 1000}))
    refused = slow.post(HI)
    assert (refused.status, refused.error["type"]) == (429, "rate_limit_error")
    assert int(refused.headers["Retry-After"]) >= 1
    # Of several answers none stays.
    with opened.pop():
        pass
    until(lambda: slow.service.engine.stats.waiting == 0)
    assert slow.post(HI | {"n": 3}).status == 429
    until(lambda: slow.service.engine.stats.waiting == 0)
    for connection in opened:
        connection.close()
