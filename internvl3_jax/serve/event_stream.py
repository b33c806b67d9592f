"""Answers as server-sent events, and the end of a response whose client left or was too slow."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from internvl3_jax.serve.errors import ApiError

_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx passes each event on at once
}
_LAST_WORDS = 5.0  # seconds for an error that ends a stream


class ClientLeftError(Exception):
    """The client closed its connection."""


async def while_connected(receive: Receive, work: Awaitable, seconds: float):
    """Returns the result of `work`, which is cancelled if the client leaves or time is up.

    Raises:
      ClientLeftError: the client left.
      ApiError: time is up.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(receive))
    try:
        done, _ = await asyncio.wait(
            {working, leaving}, timeout=max(0.0, seconds), return_when=asyncio.FIRST_COMPLETED
        )
        if working in done:
            return working.result()
        if leaving in done:
            raise ClientLeftError
        raise ApiError(
            "the answer took too long; ask for fewer tokens or again later, or start the server "
            "with a larger --max_seconds",
            504,
            code="timeout",
        )
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(data: dict | str) -> bytes:
    """Returns one server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n\n".encode()


class EventStream(Response):
    """A response of server-sent events.

    Args:
      chunks: objects to send.
      seconds: for all of them.
      on_error: makes the last event of an error.
      on_end: called once, at the end of the response.
    """

    def __init__(
        self,
        chunks: AsyncGenerator[dict, None],
        seconds: float,
        on_error: Callable[[Exception], ApiError | None],
        on_end: Callable[[], None],
    ):
        super().__init__(headers=_HEADERS)
        self._chunks, self._seconds = chunks, seconds
        self._on_error, self._on_end = on_error, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send_all(send), self._seconds)
        except Exception as error:
            if (refusal := self._on_error(error)) is not None:
                await self._send_error(send, refusal)
        finally:
            self._on_end()

    async def _send_all(self, send: Send) -> None:
        headers = [item for item in self.raw_headers if item[0] != b"content-length"]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with contextlib.aclosing(self._chunks):
            async for chunk in self._chunks:
                await _send(send, event(chunk))
        await _send(send, event("[DONE]"), more=False)

    async def _send_error(self, send: Send, error: ApiError) -> None:
        # The status has been sent: clients read the error of the event. If the client does not
        # read, the server closes the connection without an end.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS):
                await _send(send, event(error.body()), more=False)


async def _send(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
