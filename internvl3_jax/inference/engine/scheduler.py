"""Decides what the device does next: some of a prompt, or a block of tokens of all rows."""

import collections
import dataclasses
from collections.abc import Callable

import numpy as np

from internvl3_jax.inference.engine.device import Device
from internvl3_jax.inference.engine.image_store import ImageStore
from internvl3_jax.inference.engine.programs import BLOCK, Block
from internvl3_jax.inference.engine.prompt_run import PromptRun
from internvl3_jax.inference.engine.queue import RequestQueue
from internvl3_jax.inference.engine.request import Piece, Request, Ticket
from internvl3_jax.inference.engine.results import new_tokens
from internvl3_jax.inference.engine.routing import Routing
from internvl3_jax.inference.engine.row_sampling import bias_of
from internvl3_jax.inference.engine.rows import (
    Content,
    Row,
    best_source,
    choose_row,
    identities,
)
from internvl3_jax.inference.engine.stats import EngineStats
from internvl3_jax.inference.flash import counts
from internvl3_jax.inference.prompt_batch import bucket
from internvl3_jax.inference.sampling import NotFiniteError

PROMPT_TOKENS = 1024  # tokens of prompts and tiles between two blocks, if half of the rows decode


@dataclasses.dataclass
class Started:
    """Work that the device was given and the host has not read.

    Attributes:
      tickets: of the rows that took part.
      block: the tokens; those of one row only, if it is a first token.
      is_first: whether it is one.
      counts: tokens of each row that are used.
      until_free: whether the block may have ended earlier.
    """

    tickets: dict[int, Ticket]
    block: Block
    is_first: bool
    counts: dict[int, int]
    until_free: bool = False


class Scheduler:
    """Runs the requests of a queue in the rows of a device, from one thread.

    Args:
      grows: rows become longer where a request needs it.

    Attributes:
      isolates_errors: an error while a prompt runs ends its requests only. False: it ends the engine,
        because other hosts may not have met it and would wait for this one.
    """

    def __init__(self, device: Device, queue: RequestQueue, store: ImageStore, grows: bool):
        self.rows = [Row() for _ in range(device.rows)]
        self.stats = EngineStats()
        self.isolates_errors = True
        self._device, self._queue, self._store, self._grows = device, queue, store, grows
        self._config = device.config.language
        self._run: PromptRun | None = None  # the prompt that enters
        self._routing: Routing | None = None  # the decision about the tiles of the next one
        self._unread: collections.deque[Started] = collections.deque()
        self._group: str | None = None  # of the rows, which share their parameters
        self._rounds = 0

    def has_work(self) -> bool:
        """Returns whether a round has anything to do."""
        in_rows = any(row.ticket is not None for row in self.rows)
        return in_rows or bool(self._unread) or self._queue.has_work()

    def round(self) -> None:
        """Runs about PROMPT_TOKENS tokens of prompts, or more if most rows are free, then a block of
        tokens.
        """
        self._rounds += 1
        self._cancel()
        self._run_prompts()
        is_ahead = self._start_block() and not self._reads_every_token()
        # An accelerator has the next block before this one is read.
        ahead = self._device.generator.calls_ahead if is_ahead else 0
        while len(self._unread) > ahead:
            self._read()

    def fail(self, error: BaseException) -> None:
        """Ends all requests with an error."""
        tickets = [row.ticket for row in self.rows if row.ticket is not None]
        for ticket in [*tickets, *self._queue.close(error)]:
            if ticket.finish is None:
                self._finish(ticket, Piece(finish="error", error=error))

    def _live(self) -> dict[int, Ticket]:
        """Returns the rows that decode, and their tickets."""
        is_live = self._device.settings.is_live
        return {
            index: row.ticket
            for index, row in enumerate(self.rows)
            if row.ticket is not None and is_live[index]
        }

    def _reads_every_token(self) -> bool:
        """Returns whether the next token of some row depends on the host."""
        return any(ticket.request.constraint is not None for ticket in self._live().values())

    # --- prompts ----------------------------------------------------------------------------------

    def _run_prompts(self) -> None:
        # The fewer rows decode, the fewer answers wait.
        live = len(self._live())
        free = len(self.rows) - live
        budget = PROMPT_TOKENS * max(1, free // max(live, 1))
        while budget > 0 and (self._run is not None or self._may_admit()):
            if self._run is None:
                if self._queue.first().awaits_routing:
                    budget -= self._route(self._queue.first())
                    continue
                self._admit()
            run = self._run
            try:
                budget -= run.step()
            except Exception as error:
                if not self.isolates_errors:
                    raise
                # The run has a cache of its own: the rows are as they were.
                self._run = None
                for index, ticket in zip(run.rows, run.tickets, strict=True):
                    self.rows[index].ticket = None
                    if ticket.finish is None:
                        self._finish(ticket, Piece(finish="error", error=error))
                continue
            if run.hidden is not None:
                self._run = None
                self._begin_answers(run)

    def _free(self) -> int:
        return sum(row.ticket is None for row in self.rows)

    def _may_admit(self) -> bool:
        """Returns whether there is a next prompt, and a row for it."""
        first, free = self._queue.first(), self._free()
        if first is None:
            self._routing = None  # its request was cancelled
        if first is None or not free:
            return False
        # Decoders that differ in whole parameters take turns.
        return self._group_of(first) == self._group or free == len(self.rows)

    def _group_of(self, ticket: Ticket) -> str | None:
        adapter = ticket.request.adapter
        return adapter if adapter in self._device.groups else None

    def _route(self, first: Ticket) -> int:
        """Encodes some tiles of the next prompt, or decides which of them are compressed; returns
        how many tokens were made. The prompt waits meanwhile.
        """
        if self._routing is None or self._routing.ticket is not first:
            self._routing = Routing(self._device, self._store, first)
        try:
            num_tokens = self._routing.step()
            if not num_tokens:
                self._routing.decide(self._queue.like_first())
        except Exception as error:
            if not self.isolates_errors:
                raise
            self._routing, num_tokens = None, 0
            for ticket in self._queue.take(1):
                self._finish(ticket, Piece(finish="error", error=error))
        return num_tokens

    def _admit(self) -> None:
        """Begins the run of the next prompt."""
        first = self._queue.first()
        group = self._group = self._group_of(first)
        tickets = self._queue.take(self._free())
        names = identities(first)
        source, keep = best_source(self.rows, first.request, names, self._config)
        indices = []
        for number, ticket in enumerate(tickets):
            ticket.reused_tokens = len(first.request.prompt.tokens) if number else keep
            indices.append(choose_row(self.rows, source, keep))
            self.rows[indices[-1]].ticket = ticket
            self.stats.prompt_tokens += len(ticket.request.prompt.tokens)
            self.stats.reused_tokens += ticket.reused_tokens
            tiles, compressed = counts(ticket.request.prompt)
            self.stats.tiles += tiles
            self.stats.compressed_tiles += compressed
        self._make_room(max(map(_length, tickets)))
        routing, self._routing = self._routing, None
        tower = routing.tower if routing is not None and routing.ticket is first else None
        self._run = PromptRun(
            self._device, self._store, tickets, indices, group, keep, source, tower
        )

    def _make_room(self, length: int) -> None:
        if self._grows and length > self._device.sizes.capacity:
            self._device.grow(bucket(length))

    def _begin_answers(self, run: PromptRun) -> None:
        """Samples the first token of each answer to a prompt."""
        for index, ticket in zip(run.rows, run.tickets, strict=True):
            row, request = self.rows[index], ticket.request
            row.content, row.used = None, self._rounds
            if ticket.finish is not None:  # cancelled meanwhile
                row.ticket = None
                continue
            try:
                bias = bias_of(request, self._device.vocabulary)
            except Exception as error:
                self._end(index, Piece(finish="error", error=error))
                continue
            block = self._device.start_row(index, request, run.group, run.hidden, run.cache, bias)
            row.content = Content.of(request, identities(ticket), self._config)
            row.next_slot, row.started = len(request.prompt.tokens), 1
            self._unread.append(Started({index: ticket}, block, True, {index: 1}))
        while self._unread and self._reads_every_token():
            self._read()

    # --- blocks -----------------------------------------------------------------------------------

    def _start_block(self) -> bool:
        """Starts a block of tokens; returns whether any row needs one."""
        live = self._live()
        left = {index: _limit(ticket) - self.rows[index].started for index, ticket in live.items()}
        count = min(BLOCK, max(left.values(), default=0))
        if count <= 0:
            return False
        if self._reads_every_token():
            count = 1
        counts = {index: min(count, number) for index, number in left.items()}
        # A row writes one slot further after its last token.
        slots = max(self.rows[index].next_slot + counts[index] + 1 for index in live)
        slots = min(slots, self._device.sizes.capacity)
        # A block that is read at once may end when a waiting request can enter.
        until_free = len(self._queue) > 0 and not self._device.generator.calls_ahead
        block = self._device.decode(self._group, count, slots, until_free)
        self.stats.blocks += 1
        for index in live:
            self._advance(index, counts[index])
            self.rows[index].used = self._rounds
        self._unread.append(Started(live, block, False, counts, until_free))
        return True

    def _advance(self, index: int, count: int) -> None:
        row = self.rows[index]
        row.next_slot, row.started = row.next_slot + count, row.started + count

    def _read(self) -> None:
        """Reads the oldest block, and gives each request its tokens."""
        started = self._unread.popleft()
        block, counts = started.block, started.counts
        if started.until_free:
            decoded = int(block.count)
            for index, count in counts.items():
                self._advance(index, min(count, decoded) - count)
                counts[index] = min(count, decoded)
        tokens = np.asarray(block.tokens)
        logprobs = None
        if any(ticket.request.top_logprobs is not None for ticket in started.tickets.values()):
            logprobs = [np.asarray(x) for x in (block.chosen, block.top, block.top_ids)]
        for index, ticket in started.tickets.items():
            if ticket.finish is not None:
                continue
            place, count = 0 if started.is_first else index, counts[index]
            own_logprobs = None if logprobs is None else [x[place, :count] for x in logprobs]
            piece = new_tokens(ticket, tokens[place, :count].tolist(), own_logprobs)
            ticket.ids += piece.ids
            self.stats.new_tokens += len(piece.ids)
            piece = self._constrain(index, ticket.request, piece)
            if piece.finish is not None:
                self._end(index, piece)
            elif (error := _tell(ticket, piece)) is not None:
                self._end(index, Piece(finish="error", error=error))

    def _constrain(self, index: int, request: Request, piece: Piece) -> Piece:
        """Tells a request's constraint what was sampled, and gets what may come next."""
        if request.constraint is None or not piece.ids:
            return piece
        try:
            request.constraint.accept(piece.ids[-1])
            if piece.finish is None:
                self._device.set_bias(index, bias_of(request, self._device.vocabulary))
        except Exception as error:
            return dataclasses.replace(piece, finish="error", error=error)
        return piece

    # --- ends -------------------------------------------------------------------------------------

    def _end(self, index: int, piece: Piece) -> None:
        """Frees a row, whose content stays for later prompts, and gives the last piece."""
        row = self.rows[index]
        ticket, row.ticket = row.ticket, None
        self._device.free_row(index)
        if isinstance(piece.error, NotFiniteError):
            self._device.clear_row(index)
            row.content = None
        elif row.content is not None:
            names = identities(ticket)
            row.content = Content.of(ticket.request, names, self._config, ticket.ids[:-1])
        self._finish(ticket, piece)

    def _finish(self, ticket: Ticket, piece: Piece) -> None:
        ticket.finish, ticket.error = piece.finish, piece.error
        self.stats.finished += 1
        error = _tell(ticket, piece)
        ticket.error = ticket.error or error

    def _cancel(self) -> None:
        entering = [] if self._run is None else self._run.tickets
        for ticket, is_waiting in self._queue.take_cancelled():
            if ticket.finish is not None:
                continue
            if is_waiting or ticket in entering:
                # The run of a prompt continues; its row is freed at its end.
                self._finish(ticket, Piece(finish="cancelled"))
            else:
                index = next(i for i, row in enumerate(self.rows) if row.ticket is ticket)
                self._end(index, Piece(finish="cancelled"))


def _limit(ticket: Ticket) -> int:
    return ticket.request.max_new_tokens


def _length(ticket: Ticket) -> int:
    return len(ticket.request.prompt.tokens) + _limit(ticket)


def _tell(ticket: Ticket, piece: Piece) -> Exception | None:
    """Gives a piece to who asked; returns the error of that call, which concerns nobody else."""
    tell: Callable[[Piece], None] = ticket.on_piece
    try:
        tell(piece)
    except Exception as error:
        return error
    return None
