"""The waiting requests of an engine, which any thread may add to."""

import collections
import threading
from collections.abc import Callable

from internvl3_jax.inference.engine.request import QueueFullError, Ticket
from internvl3_jax.inference.engine.rows import same_prompt


class RequestQueue:
    """Requests in the order in which they came, and those that were cancelled.

    Args:
      max_size: waiting requests.
    """

    def __init__(self, max_size: int):
        self.max_size = max_size
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._cancelled: list[Ticket] = []
        self._closed: BaseException | None = None
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, ticket: Ticket) -> None:
        """Adds a request.

        Raises:
          QueueFullError: too many are waiting.
          RuntimeError: the queue is closed.
        """
        with self._changed:
            if self._closed is not None:
                raise RuntimeError("the engine has failed") from self._closed
            if len(self._waiting) >= self.max_size:
                raise QueueFullError(
                    f"{len(self._waiting)} requests are waiting, which is the limit; ask again "
                    "later"
                )
            self._waiting.append(ticket)
            self._changed.notify_all()

    def cancel(self, ticket: Ticket) -> None:
        """Notes that a request, which may be waiting or not, is to end."""
        with self._changed:
            self._cancelled.append(ticket)
            self._changed.notify_all()

    def first(self) -> Ticket | None:
        """Returns the next request, which stays; None if there is none."""
        with self._changed:
            return self._waiting[0] if self._waiting else None

    def like_first(self) -> list[Ticket]:
        """Returns the next request and those with the same prompt; they stay."""
        with self._changed:
            return [ticket for ticket in self._waiting if same_prompt(ticket, self._waiting[0])]

    def take(self, most: int) -> list[Ticket]:
        """Takes the next request and those with the same prompt, such as several answers to one
        question, which need to run it only once.
        """
        with self._changed:
            first = self._waiting[0]
            taken = [ticket for ticket in self._waiting if same_prompt(ticket, first)][:most]
            for ticket in taken:
                self._waiting.remove(ticket)
            return taken

    def take_cancelled(self) -> list[tuple[Ticket, bool]]:
        """Takes the cancelled requests, each with whether it was waiting."""
        with self._changed:
            cancelled, self._cancelled = self._cancelled, []
            result = []
            for ticket in cancelled:
                is_waiting = ticket in self._waiting
                if is_waiting:
                    self._waiting.remove(ticket)
                result.append((ticket, is_waiting))
            return result

    def close(self, error: BaseException) -> list[Ticket]:
        """Takes no more requests; returns those that were waiting."""
        with self._changed:
            self._closed = error
            waiting = list(self._waiting)
            self._waiting.clear()
            return waiting

    def has_work(self) -> bool:
        """Returns whether requests are waiting or were cancelled."""
        return bool(self._waiting or self._cancelled)

    def wait_for(self, condition: Callable[[], bool], seconds: float | None) -> bool:
        """Waits until the condition holds, which changes with the queue; returns whether it does."""
        with self._changed:
            return self._changed.wait_for(condition, seconds)
