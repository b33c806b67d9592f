"""One call of /v1/chat/completions, from the body to the last byte."""

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncGenerator, Callable

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from internvl3_jax.io.terminal import printable
from internvl3_jax.serve import body, replies
from internvl3_jax.serve.chat_request import ChatRequest, read_chat_request
from internvl3_jax.serve.choice import Choice, Delta
from internvl3_jax.serve.critic_scores import the_question
from internvl3_jax.serve.errors import ApiError, server_error
from internvl3_jax.serve.event_stream import ClientLeftError, EventStream, while_connected
from internvl3_jax.serve.limits import Hold
from internvl3_jax.serve.pending import Pending
from internvl3_jax.serve.preparing import Prepared, prepare
from internvl3_jax.serve.replies import Reply
from internvl3_jax.serve.service import Service, log

LEFT = 499  # as nginx notes it: the client left before the end
# A larger body is read to its end, so that the client sees the error, up to this many limits.
_DISCARDED = 8


class ChatCall:
    """One call.

    Args:
      service: that answers.
      request: of FastAPI.
    """

    def __init__(self, service: Service, request: Request):
        self._service, self._request = service, request
        self._began = time.perf_counter()
        self._status = 200
        self._asked: ChatRequest | None = None
        self._prepared: Prepared | None = None
        self._pending: Pending | None = None
        self._choices: list[Choice] = []

    async def respond(self) -> Response:
        """Returns the response; raises ApiError for a refusal."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._note_end)
            try:
                await self._begin(stack)
                reply = Reply(self._asked.model or self._service.name)
                if self._asked.stream:
                    end = stack.pop_all().close
                    return EventStream(self._chunks(reply), self._left(), self._refusal, end)
                whole = self._whole(reply)
                return JSONResponse(await self._connected(whole))
            except Exception as error:
                refusal = self._refusal(error)
                if refusal is None:
                    return Response(status_code=LEFT)
                raise refusal from error

    async def _begin(self, stack: contextlib.ExitStack) -> None:
        """Reads and prepares the request and puts it into the engine; `stack` takes it out."""
        service = self._service
        await self._receive(stack)
        service.check_ready()
        self._pending = Pending(service.engine, self._prepared.requests)
        service.enter(self._pending)
        stack.callback(service.leave, self._pending)
        await self._connected(self._pending.submit(service.pool))
        asked, token_bytes = self._asked, service.token_bytes
        self._choices = [
            Choice(
                service.tokenizer,
                asked.options.stop,
                self._prepared.stop_ids,
                thinking=asked.options.thinking,
                token_bytes=None if asked.top_logprobs is None else token_bytes,
            )
            for _ in range(asked.n)
        ]

    async def _receive(self, stack: contextlib.ExitStack) -> None:
        """Reads and prepares the request."""
        service = self._service
        service.check_ready()
        hold = Hold(service.budget)
        stack.callback(hold.close)
        data = await self._read_body(hold)
        self._began = time.perf_counter()
        preparing = functools.partial(self._prepare, data, hold)
        await self._connected(self._run_in_pool(preparing))
        service.metrics.preparing.observe(time.perf_counter() - self._began)

    def _run_in_pool(self, function: Callable) -> asyncio.Future:
        return asyncio.get_running_loop().run_in_executor(self._service.pool, function)

    def _left(self) -> float:
        return self._service.limits.seconds - (time.perf_counter() - self._began)

    async def _connected(self, work):
        return await while_connected(self._request.receive, work, self._left())

    # --- the request ------------------------------------------------------------------------------

    async def _read_body(self, hold: Hold) -> bytes:
        """Reads the body, within the limits of size and time."""
        _check_headers(self._request)
        limits = self._service.limits
        try:
            async with asyncio.timeout(limits.body_seconds):
                return await self._read_stream(hold)
        except TimeoutError as error:
            raise ApiError(
                f"the body did not arrive within {limits.body_seconds:g} seconds; send it at once",
                408,
                code="timeout",
                headers={"Connection": "close"},
            ) from error

    async def _read_stream(self, hold: Hold) -> bytes:
        limit, pieces, size = self._service.limits.body_bytes, [], 0
        async for piece in self._request.stream():
            size += len(piece)
            if size <= limit:
                hold.add(len(piece))
                pieces.append(piece)
            elif size > _DISCARDED * limit:
                break
        if size > limit:
            raise ApiError(
                f"the body has more than {limit:,} bytes; send smaller or fewer images, or start "
                "the server with a larger --max_body_mb",
                413,
                code="request_too_large",
                headers={"Connection": "close"},
            )
        return b"".join(pieces)

    def _prepare(self, data: bytes, hold: Hold) -> None:
        """Checks the body and makes requests to the engine of it. Runs in a worker thread."""
        service = self._service
        fields = body.parse(data)
        vocab_size = service.tokenizer.vocab_size
        asked = read_chat_request(fields, service.limits, service.options, vocab_size)
        adapter = service.adapter_of(asked.model)
        if asked.num_best is not None:
            if service.critic is None:
                raise ApiError(
                    "this server has no critic to choose with; start it with --critic DIR, or "
                    "leave best_of out",
                    param="best_of",
                )
            the_question(asked)
        self._prepared = prepare(asked, adapter, service, hold)
        self._asked = asked
        if service.log_prompts:
            for turn in asked.turns:
                log.info(printable(f"{turn.message['role']}: {turn.message['content']}"))

    # --- the answer -------------------------------------------------------------------------------

    async def _whole(self, reply: Reply) -> dict:
        await self._wait()
        if self._asked.num_best is None:
            return reply.completion(self._choices, self._usage())
        scored = await self._score()
        best = sorted(range(len(scored)), key=lambda index: -scored[index]["score"])
        best = best[: self._asked.num_best]
        choices, scores = zip(*((self._choices[i], scored[i]) for i in best), strict=True)
        return reply.completion(choices, self._usage(), scores)

    async def _wait(self) -> None:
        async for _ in self._deltas():
            pass

    async def _score(self) -> list[dict]:
        texts = [choice.text.content for choice in self._choices]
        score = functools.partial(self._service.critic.score, self._asked, texts)
        return await self._connected(self._run_in_pool(score))

    async def _chunks(self, reply: Reply) -> AsyncGenerator[dict, None]:
        extra = {"usage": None} if self._asked.include_usage else {}
        for index in range(len(self._choices)):
            yield reply.first(index) | extra
        async with contextlib.aclosing(self._deltas()) as deltas:
            async for index, delta in deltas:
                if not delta.is_empty:
                    yield reply.chunk(index, delta) | extra
        if self._asked.include_usage:
            yield reply.usage_chunk(self._usage())

    async def _deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """Yields (number of the answer, what is new)."""
        async with contextlib.aclosing(self._pending.pieces()) as pieces:
            async for index, piece in pieces:
                choice = self._choices[index]
                delta = choice.take(piece)
                if choice.finish is not None:
                    self._pending.end(index)
                yield index, delta
        if self._service.log_prompts:
            for choice in self._choices:
                log.info(printable(f"assistant: {choice.text.content}"))

    def _usage(self) -> dict:
        cached = self._pending.reused_tokens
        return replies.usage(self._pending.prompt_tokens, cached, self._choices)

    # --- the end ----------------------------------------------------------------------------------

    def _refusal(self, error: Exception) -> ApiError | None:
        """Returns the client's error message; None if the client has left."""
        if isinstance(error, ClientLeftError | ClientDisconnect):
            self._status = LEFT
            return None
        if not isinstance(error, ApiError):
            log.error("a request failed", exc_info=error)
            error = server_error()
        self._status = error.status
        return error

    def _note_end(self) -> None:
        """Counts the request, and writes one line without its contents."""
        seconds, counts = time.perf_counter() - self._began, self._service.metrics
        counts.requests.labels(str(self._status)).inc()
        counts.total.observe(seconds)
        if self._status == LEFT:
            counts.disconnects.inc()
        text = f"chat: status {self._status}, {seconds:.2f} s"
        if self._choices:
            tokens = sum(choice.num_tokens for choice in self._choices)
            text += f", {self._pending.prompt_tokens} + {tokens} tokens"
            first = self._pending.seconds_to_first
            if first is not None:
                counts.first_token.observe(first)
                if tokens > len(self._choices):
                    counts.per_token.observe(
                        max(0.0, self._pending.seconds - first)
                        / (max(choice.num_tokens for choice in self._choices) - 1)
                    )
        log.info(text)


def _check_headers(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also so that no web page can send a request without the browser asking first.
        raise ApiError("the body must be JSON; send the header Content-Type: application/json", 415)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError("compressed bodies are not read; send it without Content-Encoding", 415)
