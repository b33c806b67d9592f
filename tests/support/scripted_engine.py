"""An engine without a model: it has the interface of internvl3_jax.inference.engine.Engine, and
emits ids that a test gives, at a pace that a test gives. For what a real engine rarely does: being
slow, full, or broken.
"""

import collections
import threading
import time
import types
from collections.abc import Callable, Sequence

from internvl3_jax.inference.engine.request import (
    Piece,
    QueueFullError,
    Request,
    Ticket,
    TokenLogprob,
)

# Of the real engine's stats.
_COUNTS = ("finished", "prompt_tokens", "reused_tokens", "new_tokens", "image_hits")
_COUNTS += ("image_misses", "blocks", "tiles", "compressed_tiles")


class ScriptedEngine:
    """Emits `script(request)`, one id of each running request in a step.

    Args:
      script: ids of a request's answer, its stop id included; it may raise, and then the step does.
      rows: requests that run together.
      seconds: that a step takes.

    Attributes:
      tickets: all that were submitted.
    """

    def __init__(
        self,
        stop_ids: Sequence[int],
        script: Callable[[Request], Sequence[int]],
        *,
        rows: int = 4,
        max_length: int = 2048,
        max_queue: int = 1024,
        seconds: float = 0.0,
    ):
        self.stop_ids, self.script, self.rows = tuple(stop_ids), script, rows
        self.max_length, self.max_queue, self.seconds = max_length, max_queue, seconds
        self.failed: BaseException | None = None
        self.tickets: list[Ticket] = []
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._running: dict[Ticket, list[int]] = {}
        self._cancelled: list[Ticket] = []
        self._changed = threading.Condition()

    @property
    def stats(self) -> types.SimpleNamespace:
        counts = dict.fromkeys(_COUNTS, 0)
        counts |= {"running": len(self._running), "waiting": len(self._waiting)}
        return types.SimpleNamespace(**counts)

    def submit(self, request: Request, on_piece: Callable[[Piece], None]) -> Ticket:
        ticket = Ticket(request, on_piece)
        with self._changed:
            if self.failed is not None:
                raise RuntimeError("the engine has failed")
            if len(self._waiting) >= self.max_queue:
                raise QueueFullError("the queue is full; ask again later")
            self._waiting.append(ticket)
            self.tickets.append(ticket)
            self._changed.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        with self._changed:
            self._cancelled.append(ticket)
            self._changed.notify_all()

    def wait(self, seconds: float | None = None) -> bool:
        with self._changed:
            return self._changed.wait_for(self._has_work, seconds)

    def _has_work(self) -> bool:
        return bool(self._waiting or self._running or self._cancelled)

    def step(self) -> bool:
        time.sleep(self.seconds)
        try:
            self._admit()
            for ticket, ids in list(self._running.items()):
                self._emit(ticket, ids)
        except BaseException as error:
            self._fail(error)
            raise
        return self._has_work()

    def _admit(self) -> None:
        with self._changed:
            cancelled, self._cancelled = self._cancelled, []
            while self._waiting and len(self._running) < self.rows:
                ticket = self._waiting.popleft()
                self._running[ticket] = []
        for ticket in cancelled:
            if ticket.finish is None:
                self._running.pop(ticket, None)
                if ticket in self._waiting:
                    self._waiting.remove(ticket)
                self._finish(ticket, Piece(finish="cancelled"))
        for ticket, ids in self._running.items():
            ids[:] = ids or list(self.script(ticket.request))

    def _emit(self, ticket: Ticket, ids: list[int]) -> None:
        request, token = ticket.request, ids[len(ticket.ids)]
        ticket.ids.append(token)
        logprobs = ()
        if request.top_logprobs is not None:
            top = tuple((other, -1.0 - other) for other in range(request.top_logprobs))
            logprobs = (TokenLogprob(-0.5, top),)
        finish = "length" if len(ticket.ids) == request.max_new_tokens else None
        finish = "stop" if token in request.stop_ids else finish
        piece = Piece([token], logprobs, finish)
        if finish is None:
            ticket.on_piece(piece)
        else:
            del self._running[ticket]
            self._finish(ticket, piece)

    def _finish(self, ticket: Ticket, piece: Piece) -> None:
        ticket.finish = piece.finish
        ticket.on_piece(piece)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self.failed = error
            tickets = [*self._running, *self._waiting]
            self._running, self._waiting = {}, collections.deque()
        for ticket in tickets:
            self._finish(ticket, Piece(finish="error", error=error))
