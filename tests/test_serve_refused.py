"""The server refuses what it cannot answer: in OpenAI's form, with what to do, and continues."""

import contextlib
import socket
import urllib.request

import pytest

from internvl3_jax.serve.limits import Limits
from tests.support import live_server, serve_refusals
from tests.support.live_server import fetch, scripted, serving, user


@pytest.fixture(scope="module")
def live():
    with serving(scripted()) as started:
        yield started
        assert started.service.budget.held == 0
        assert started.post({"messages": user("Hi")}).status == 200


def test_there_are_many():
    assert len(serve_refusals.ALL) > 150
    assert len({name for name, *_ in serve_refusals.ALL}) > 150


@pytest.mark.parametrize(
    "body, status, text, param",
    [pytest.param(*rest, id=name) for name, *rest in serve_refusals.ALL],
)
def test_body(live, body, status, text, param):
    response = live.post(serve_refusals.as_bytes(body))
    error = response.error
    assert response.status == status, error
    assert text in error["message"], error
    assert "Traceback" not in error["message"] and len(error["message"]) <= 2000
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", "/", 404),
        ("GET", "/v1", 404),
        ("GET", "/v1/chat/completions", 405),
        ("PUT", "/v1/chat/completions", 405),
        ("POST", "/v1/completions", 404),
        ("POST", "/v1/embeddings", 404),
        ("POST", "/v1/models", 405),
        ("DELETE", "/v1/models/tiny", 405),
        ("GET", "/v1/models/nothing", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("GET", "/v1/../../etc/passwd", 404),
    ],
)
def test_place(live, method, path, status):
    data = b"{}" if method in ("POST", "PUT") else None
    headers = {"Content-Type": "application/json"}
    response = fetch(urllib.request.Request(f"{live.url}{path}", data, headers, method=method))
    assert response.status == status
    assert response.error["message"]


def test_headers(live):
    body = b'{"messages": []}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        response = live.post(body, Content_Type=kind)
        assert (response.status, response.error["type"]) == (415, "invalid_request_error")
    assert live.post(body, Content_Encoding="gzip").status == 415


def raw(live, data: bytes) -> bytes:
    """The answer to bytes that no HTTP library would send."""
    received = b""
    with socket.create_connection(("127.0.0.1", live.port), timeout=30) as connection:
        # The server may end the connection in between.
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(1 << 16):
                received += piece
    return received


def test_broken_http(live):
    assert raw(live, b"\x16\x03\x01\x02\x00\x01").startswith(b"HTTP/1.1 400")
    headers = b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a: b\r\n" * 50_000
    assert raw(live, headers)[:10] in (b"", b"HTTP/1.1 4")
    assert raw(live, b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n") == b""
    chunked = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked"
    assert raw(live, chunked + b"\r\nContent-Type: application/json\r\n\r\nzz\r\n")
    assert live.get("/health").status == 200


def test_limits():
    limits = Limits(
        body_bytes=5000, body_seconds=0.5, messages=3, images=1, tiles=4, answers=2, new_tokens=3
    )
    with serving(scripted("one two three four five six"), limits=limits) as live:
        large = live.post({"messages": user("x" * 6000)})
        assert (large.status, large.error["code"]) == (413, "request_too_large")
        assert "--max_body_mb" in large.error["message"]
        larger = live.post({"messages": user("x" * 30_000)})
        assert larger.status == 413
        assert live.post({"messages": user("Hi"), "n": 3}).status == 400
        wide = live_server.tiny_checkpoint.make_image(40, 16)
        many = live.post({"messages": user(live_server.parts("Hi", wide)), "max_tiles": 12})
        assert many.status == 400 and "--max_request_tiles" in many.error["message"]
        # The server's own limit of tokens.
        answer = live.post({"messages": user("Hi")}).json
        assert answer["usage"]["completion_tokens"] == 3
        assert answer["choices"][0]["finish_reason"] == "length"
        # A body that does not come.
        with socket.create_connection(("127.0.0.1", live.port), timeout=30) as connection:
            connection.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n"
                b"Content-Type: application/json\r\n\r\n{"
            )
            received = b""
            while piece := connection.recv(1 << 16):
                received += piece
        assert received.startswith(b"HTTP/1.1 408") and b"did not arrive" in received
        assert live.service.budget.held == 0


def test_memory_for_all_requests():
    with serving(scripted(), limits=Limits(held_bytes=2000)) as live:
        large = live.post({"messages": user("x" * 3000)})
        assert large.status == 413 and "--max_held_mb" in large.error["message"]
        assert live.service.budget.add(1500)  # another request
        full = live.post({"messages": user("x" * 1000)})
        assert (full.status, full.headers["Retry-After"]) == (429, "1")
        live.service.budget.remove(1500)
        assert live.post({"messages": user("x" * 100)}).status == 200


def test_key():
    with serving(scripted(), api_key="secret") as live:
        body = {"messages": user("Hi")}
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            response = live.post(body, **header)
            assert response.status == 401
            assert response.error["code"] == "invalid_api_key"
            assert response.error["type"] == "authentication_error"
            assert live.get("/v1/models", **header).status == 401
        assert live.post(body, Authorization="Bearer secret").status == 200
        assert live.get("/health").status == live.get("/metrics").status == 200


def test_another_name_for_this_machine():
    with serving(scripted(), hosts=("127.0.0.1", "localhost")) as live:
        assert live.get("/health").status == 200
        assert live.get("/health", Host=f"localhost:{live.port}").status == 200
        for host in ("evil.example", "127.0.0.1.evil.example", "", "[", "127.0.0.1@evil"):
            response = live.get("/v1/models", Host=host)
            assert (response.status, response.error["code"]) == (403, "host_not_allowed"), host
