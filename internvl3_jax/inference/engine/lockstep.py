"""An engine on several hosts, which hold the model together and run the same programs.

The first host takes the requests. Before each step it tells the others what entered and what was
cancelled; as all else follows from the results, which every host has, they then do the same.
"""

import dataclasses
import functools
import logging
import pickle
import threading
from collections.abc import Callable

import numpy as np
from jax.experimental import multihost_utils

from internvl3_jax.inference.engine.checks import check_request
from internvl3_jax.inference.engine.engine import Engine
from internvl3_jax.inference.engine.request import Piece, QueueFullError, Request, Ticket
from internvl3_jax.inference.engine.rows import new_ticket
from internvl3_jax.parallel.announcements import Announcements

log = logging.getLogger(__name__)


class LockstepEngine(Engine):
    """An `Engine` whose `submit`, `cancel` and `step` are called on the first host only; the others
    call `follow`.
    """

    def __init__(self, *arguments, max_queue: int = 1 << 30, **settings):
        super().__init__(*arguments, **settings)
        self._scheduler.isolates_errors = False
        self._max_waiting = max_queue
        self._announcements = Announcements()
        self._changed = threading.Condition()
        self._entering: list[Ticket] = []
        self._leaving: list[Ticket] = []
        # Numbers of the open requests, which are the same on all hosts.
        self._tickets: dict[int, Ticket] = {}
        self._count = 0

    # --- the first host -----------------------------------------------------------------------

    def submit(
        self, request: Request, on_piece: Callable[[Piece], None] = lambda piece: None
    ) -> Ticket:
        """Submits a request, as `Engine.submit` does."""
        check_request(request, self.generator, self._device.numbers, self.max_length)
        if request.constraint is not None:
            request = dataclasses.replace(request, constraint=SharedConstraint(request.constraint))
        ticket = new_ticket(request, self.generator.config, on_piece)
        ticket.on_piece = functools.partial(self._tell, ticket, on_piece)
        with self._changed:
            if self.failed is not None:
                raise RuntimeError("the engine has failed") from self.failed
            waiting = len(self._queue) + len(self._entering)
            if waiting >= self._max_waiting:
                raise QueueFullError(
                    f"{waiting} requests are waiting, which is the limit; ask again later"
                )
            self._entering.append(ticket)
            self._changed.notify_all()
        return ticket

    def _tell(self, ticket: Ticket, on_piece: Callable[[Piece], None], piece: Piece) -> None:
        """Gives a piece to who asked. The other hosts do not see an error of that: it is logged, and
        the request is cancelled on all of them.
        """
        try:
            on_piece(piece)
        except Exception:
            log.exception("who asked did not take a piece of the answer; the request is cancelled")
            self.cancel(ticket)

    def cancel(self, ticket: Ticket) -> None:
        """Cancels a request, as `Engine.cancel` does."""
        with self._changed:
            self._leaving.append(ticket)
            self._changed.notify_all()

    def wait(self, seconds: float | None = None) -> bool:
        """Waits as `Engine.wait` does."""
        with self._changed:
            return self._changed.wait_for(self._has_work, seconds)

    def _has_work(self) -> bool:
        return bool(self._entering or self._leaving) or self._scheduler.has_work()

    def step(self) -> bool:
        """Runs a round, as `Engine.step` does; the other hosts take the same step."""
        with self._changed:
            entering, self._entering = self._entering, []
            leaving, self._leaving = self._leaving, []
        numbers = {id(ticket): number for number, ticket in self._tickets.items()}
        numbers |= {id(ticket): self._count + index for index, ticket in enumerate(entering)}
        left = [numbers[id(ticket)] for ticket in leaving if id(ticket) in numbers]
        requests = [_without_tiles(ticket.request) for ticket in entering]
        self._announcements.send(pickle.dumps((requests, left)))
        for ticket in entering:
            for tiles in ticket.request.prompt.tiles:
                multihost_utils.broadcast_one_to_all(tiles)
        self._enter(entering, left)
        super().step()
        return self._has_work()

    def close(self) -> None:
        """Ends `follow` on the other hosts. No request may be open."""
        self._announcements.send(b"")

    # --- all hosts ----------------------------------------------------------------------------

    def _enter(self, entering: list[Ticket], left: list[int]) -> None:
        for ticket in entering:
            self._tickets[self._count] = ticket
            self._count += 1
            self._queue.put(ticket)
        for number in left:
            self._queue.cancel(self._tickets[number])
        self._tickets = {
            number: ticket for number, ticket in self._tickets.items() if ticket.finish is None
        }

    # --- the other hosts ----------------------------------------------------------------------

    def follow(self) -> None:
        """Takes the steps of the first host until it closes its engine."""
        while message := self._announcements.receive():
            requests, left = pickle.loads(message)
            entering = [self._receive(request) for request in requests]
            self._enter(entering, left)
            super().step()

    def _receive(self, request: Request) -> Ticket:
        shapes = request.prompt.tiles
        tiles = [
            np.asarray(multihost_utils.broadcast_one_to_all(np.zeros(shape, np.uint8)))
            for shape in shapes
        ]
        prompt = dataclasses.replace(request.prompt, tiles=tiles)
        request = dataclasses.replace(request, prompt=prompt)
        return new_ticket(request, self.generator.config, lambda piece: None)


def _without_tiles(request: Request) -> Request:
    """Returns the request with the shapes of its tiles in their place."""
    shapes = [tiles.shape for tiles in request.prompt.tiles]
    return dataclasses.replace(request, prompt=dataclasses.replace(request.prompt, tiles=shapes))


class SharedConstraint:
    """A constraint that the first host has and asks; the others get its answers."""

    def __init__(self, constraint):
        self._constraint = constraint
        self._size = len(constraint.allowed())

    def __getstate__(self) -> dict:
        return {"_constraint": None, "_size": self._size}

    def allowed(self) -> np.ndarray:
        """Returns the allowed tokens. An error of the first host is one on every host."""
        error = None
        if self._constraint is None:
            allowed = np.zeros(self._size, bool)
        else:
            try:
                allowed = np.asarray(self._constraint.allowed(), bool)
            except Exception as caught:
                allowed, error = None, caught
        failed = multihost_utils.broadcast_one_to_all(np.asarray(error is not None))
        if failed:
            raise error or ValueError("the constraint failed on the first host")
        return np.asarray(multihost_utils.broadcast_one_to_all(allowed))

    def accept(self, token: int) -> None:
        """Takes a token of the answer, as `TokenConstraint.accept` does."""
        error = None
        if self._constraint is not None:
            try:
                self._constraint.accept(token)
            except Exception as caught:
                error = caught
        if multihost_utils.broadcast_one_to_all(np.asarray(error is not None)):
            raise error or ValueError("the constraint failed on the first host")
