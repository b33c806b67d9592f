"""Servers in threads of the tests' process."""

import asyncio
import base64
import contextlib
import functools
import io
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence

from internvl3_jax import load
from internvl3_jax.checkpoints.checkpoint import Checkpoint
from internvl3_jax.serve.running import Runner, address, bind
from internvl3_jax.serve.service import Service
from internvl3_jax.serve.web import Page
from tests.support import tiny_checkpoint
from tests.support.scripted_engine import ScriptedEngine

NAME = "tiny"
HI = {"messages": [{"role": "user", "content": "Hi"}]}


@functools.cache
def checkpoint() -> Checkpoint:
    return load(tiny_checkpoint.directory())


@functools.cache
def stop_id() -> int:
    return checkpoint().tokenizer.token_id("<|im_end|>")


def ids_of(text: str, *, stop: bool = True) -> list[int]:
    return checkpoint().tokenizer.encode(text, special=False) + [stop_id()] * stop


def long_answer() -> list[int]:
    """Ids of a text of 1,500 letters, without a stop id."""
    return ids_of("0123456789" * 150, stop=False)


def until(condition, seconds: float = 20.0) -> None:
    """Waits for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.01)


def scripted(text: str = "ok", **settings) -> ScriptedEngine:
    """An engine that always answers with a text."""
    ids = ids_of(text)
    return ScriptedEngine([stop_id()], lambda request: ids, **settings)


class Live:
    """A running server.

    Attributes:
      url: of the server.
      status: of its end.
    """

    def __init__(self, service: Service, drain_seconds: float, page: Page | None = None):
        self.service = service
        self._bound = bind("127.0.0.1", 0)
        self.url = address(self._bound)
        self.port = self._bound.getsockname()[1]
        self.runner = Runner(service, self._bound, drain_seconds, page)
        self.status: int | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run)
        self._started = threading.Event()

    def _run(self) -> None:
        serve = self.runner._serve

        async def noting() -> None:
            self._loop = asyncio.get_running_loop()
            self._started.set()
            await serve()

        self.runner._serve = noting
        self.status = self.runner.run()

    def start(self) -> None:
        self._thread.start()
        assert self._started.wait(30)
        for _ in range(3000):
            if self.runner._server.started:
                return
            threading.Event().wait(0.01)
        raise AssertionError("the server does not start")

    def drain(self) -> None:
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self.runner.drain)

    def join(self, seconds: float = 30.0) -> int:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the server does not end"
        return self.status

    def post(self, body, path: str = "/v1/chat/completions", **headers: str) -> "Response":
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        return fetch(urllib.request.Request(f"{self.url}{path}", data, headers))

    def get(self, path: str, **headers: str) -> "Response":
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        return fetch(urllib.request.Request(f"{self.url}{path}", headers=headers))


class Response:
    """Attributes: status, headers, data (bytes)."""

    def __init__(self, status: int, headers, data: bytes):
        self.status, self.headers, self.data = status, headers, data

    @property
    def json(self):
        return json.loads(self.data)

    @property
    def error(self) -> dict:
        """The error, after checking its form."""
        assert self.json.keys() == {"error"}
        error = self.json["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str) and error["message"]
        assert isinstance(error["type"], str)
        return error


def fetch(request: urllib.request.Request) -> Response:
    try:
        with urllib.request.urlopen(request, timeout=60) as opened:
            return Response(opened.status, opened.headers, opened.read())
    except urllib.error.HTTPError as error:
        with error:
            return Response(error.code, error.headers, error.read())


@contextlib.contextmanager
def serving(
    engine, *, drain_seconds: float = 20.0, page: Page | None = None, **settings
) -> Iterator[Live]:
    """A server of an engine on the tiny checkpoint, until the end of the block."""
    settings = {"name": NAME} | settings
    service = Service(settings.pop("checkpoint", checkpoint()), engine, **settings)
    live = Live(service, drain_seconds, page)
    live.start()
    try:
        yield live
    finally:
        live.drain()
        live.join()


def user(content) -> list[dict]:
    return [{"role": "user", "content": content}]


def data_url(image) -> str:
    """A PIL image as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def parts(text: str, *images, first: bool = True) -> list[dict]:
    """The parts of a message: images as data URLs, and a text."""
    shown = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    said = [{"type": "text", "text": text}]
    return shown + said if first else said + shown


def events(data: bytes) -> Sequence[dict]:
    """The objects of a stream of server-sent events, whose end is checked."""
    *lines, last = [line for line in data.decode().split("\n\n") if line]
    assert last == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]
