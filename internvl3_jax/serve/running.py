"""Runs the server until a signal or a failure of the engine.

SIGTERM, or Ctrl-C: no more requests are taken; those that run may finish within `drain_seconds`,
then they get an error; exit status 0. A second Ctrl-C ends at once. A failed engine: its requests
get status 500, and the exit status is 1.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator

import uvicorn

from internvl3_jax.serve.app import make_app
from internvl3_jax.serve.errors import ApiError
from internvl3_jax.serve.service import Service, log
from internvl3_jax.serve.web import Page

FAILED = 1
# Seconds for responses to leave after their requests were ended.
_LAST_WORDS = 5.0
# Seconds after which a process that should have ended is ended.
_OVERDUE = 15.0
_HEADER_BYTES = 1 << 16
_BACKLOG = 2048


class _Server(uvicorn.Server):
    """uvicorn's server, whose signals are handled here."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound, but does not listen yet.

    Raises:
      OSError: the address is in use or is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise OSError(
            error.errno, f"cannot listen there ({error.strerror}); choose --host and --port",
            f"{host}:{port}",
        ) from error  # fmt: skip
    return bound


def address(bound: socket.socket) -> str:
    """Returns the http address of a socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Runner:
    """Serves a `Service` on a socket.

    Args:
      drain_seconds: for running requests after SIGTERM.
      page: of `make_app`.
    """

    def __init__(
        self,
        service: Service,
        bound: socket.socket,
        drain_seconds: float = 60.0,
        page: Page | None = None,
    ):
        self._service, self._bound, self._drain_seconds = service, bound, drain_seconds
        config = uvicorn.Config(
            make_app(service, self._on_failure, page),
            http="h11",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            h11_max_incomplete_event_size=_HEADER_BYTES,
            timeout_graceful_shutdown=int(drain_seconds + _LAST_WORDS) + 1,
        )
        self._server = _Server(config)
        self._overdue = threading.Timer(_OVERDUE, os._exit, [FAILED])
        self._overdue.daemon = True

    def run(self) -> int:
        """Serves until the end and returns the exit status."""
        try:
            asyncio.run(self._serve())
            ended = self._service.stop()
        finally:
            self._overdue.cancel()
        if not ended:
            log.error("a round of the engine does not end; the process ends without it")
            sys.stderr.flush()
            os._exit(FAILED)
        return FAILED if self._service.failure is not None else 0

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.drain, number)
        await self._server.serve(sockets=[self._bound])

    def drain(self, number: int = signal.SIGTERM) -> None:
        """Takes no more requests, and ends when those that run have finished. Called by the loop.

        number: signal that asks for it.
        """
        if self._service.draining:
            if number == signal.SIGINT:
                self._server.force_exit = True
            return
        log.info("draining: no more requests are taken")
        self._service.draining = True
        self._server.should_exit = True
        asyncio.get_running_loop().call_later(self._drain_seconds, self._end_requests)

    def _end_requests(self) -> None:
        self._service.end_all(
            ApiError(
                "the server ended before the answer did; ask another one", 503, code="draining"
            )
        )

    def _on_failure(self) -> None:
        self._server.should_exit = True
        # Responses have some seconds to leave; then the process ends whatever happens.
        self._server.config.timeout_graceful_shutdown = int(_LAST_WORDS)
        self._overdue.start()
