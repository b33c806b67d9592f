"""Requests in the engine, as the event loop sees them."""

import asyncio
import concurrent.futures
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Sequence

from internvl3_jax.inference.engine.request import Piece, QueueFullError, Request, Ticket
from internvl3_jax.inference.generator import ContextError
from internvl3_jax.serve.errors import ApiError, busy


class Pending:
    """The answers to one prompt in the engine. Belongs to an event loop.

    Args:
      engine: that answers.
      requests: one per answer.

    Attributes:
      seconds_to_first: from `submit` to the first piece of any answer; None before it.
      seconds: from `submit` to the last piece so far.
    """

    def __init__(self, engine, requests: Sequence[Request]):
        self._engine, self._requests = engine, requests
        self._loop = asyncio.get_running_loop()
        # Its length is bounded by the tokens of the answers, however slowly they are read.
        self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        self._open: set[int] = set()
        self._began = 0.0
        self.seconds_to_first: float | None = None
        self.seconds = 0.0

    async def submit(self, pool: concurrent.futures.Executor) -> None:
        """Hands the requests to the engine, in a worker thread, since it hashes the tiles.

        Raises:
          ApiError: the queue is full, or a request does not fit; then none is in the engine.
        """
        self._began = time.perf_counter()
        submitting = self._loop.run_in_executor(pool, self._submit)
        try:
            await asyncio.shield(submitting)
        except asyncio.CancelledError:
            # The client left: what is on its way into the engine is taken out again.
            submitting.add_done_callback(self._take_back)
            raise
        except (QueueFullError, ValueError, RuntimeError) as error:
            self.cancel()
            raise _as_refusal(error) from error

    def _take_back(self, submitted: asyncio.Future) -> None:
        if not submitted.cancelled():
            submitted.exception()  # was looked at: asyncio need not report it
        self.cancel()

    def _submit(self) -> None:
        for index, request in enumerate(self._requests):
            on_piece = functools.partial(self._on_piece, index)
            self._tickets.append(self._engine.submit(request, on_piece))
            self._open.add(index)

    def _on_piece(self, index: int, piece: Piece) -> None:
        # Called by the engine's thread. The loop may be closed at the end of the process.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))

    def fail(self, error: ApiError) -> None:
        """Ends all answers with an error. Called by the event loop."""
        for index in list(self._open):
            self._pieces.put_nowait((index, Piece(finish="error", error=error)))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yields (number of the answer, piece) until all answers have ended.

        Raises:
          ApiError: an answer failed.
        """
        while self._open:
            index, piece = await self._pieces.get()
            if index not in self._open:
                continue  # of an answer that `end` has cut off
            self.seconds = time.perf_counter() - self._began
            if self.seconds_to_first is None:
                self.seconds_to_first = self.seconds
            if piece.finish == "error":
                raise _as_api_error(piece.error)
            if piece.finish is not None:
                self._open.discard(index)
            yield index, piece

    def end(self, index: int) -> None:
        """Ends an answer that needs no more tokens: its row becomes free."""
        if index in self._open:
            self._open.discard(index)
            self._engine.cancel(self._tickets[index])

    def cancel(self) -> None:
        """Takes all answers that are not complete out of the engine."""
        for index in list(self._open):
            self.end(index)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt; after the router's decision, of what is run."""
        requests = [ticket.request for ticket in self._tickets] or self._requests
        return len(requests[0].prompt.tokens)

    @property
    def reused_tokens(self) -> int:
        """Tokens of the prompt that the engine had already, for the first answer."""
        return self._tickets[0].reused_tokens if self._tickets else 0


def _as_refusal(error: Exception) -> ApiError:
    """Returns what `Engine.submit` raised as the error of the response."""
    if isinstance(error, QueueFullError):
        return busy(str(error))
    if isinstance(error, ContextError):
        return ApiError(str(error), param="messages", code="context_length_exceeded")
    if isinstance(error, ValueError):
        return ApiError(str(error))
    return ApiError("the engine has failed; the server is ending", 503, code="engine_failed")


def _as_api_error(error: Exception | None) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValueError):  # of this request alone, such as its grammar
        return ApiError(str(error), 422, code="generation_failed")
    kind = "" if error is None else f" ({type(error).__name__})"
    return ApiError(
        f"the answer failed{kind}; the server's log says why", 500, code="internal_error"
    )
