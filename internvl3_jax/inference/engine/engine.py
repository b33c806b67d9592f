"""Continuous batching: requests enter while others decode, and leave when they end.

    engine = Engine.of(load("checkpoints/internvl3-1b"), rows=8, max_length=4096)
    ticket = engine.submit(Request(prompt, stop_ids=engine.stop_ids))
    engine.run()
    ticket.ids

A step of the engine runs some tokens of prompts, then a block of tokens of all rows: so a long
prompt does not hold up the answers of others (chunked prefill, Agrawal et al. 2023). Every row has
the settings of its own request, as arrays: what they are compiles nothing.

An answer is the one that its request gets alone. A prompt whose beginning is in some row is run from
there on, and images are encoded once.

    engine.py       what its users call            queue.py         waiting requests
    scheduler.py    what happens next              rows.py          what each row holds
    prompt_run.py   one prompt, in pieces          image_store.py   features of images
    routing.py      which tiles are compressed     tower_run.py     one prompt's images, in pieces
    device.py       arrays, calls of the programs  *_programs.py, programs.py, row_sampling.py
"""

import dataclasses
from collections.abc import Callable

from internvl3_jax.inference.engine.checks import check_request
from internvl3_jax.inference.engine.device import Device
from internvl3_jax.inference.engine.image_store import ImageStore
from internvl3_jax.inference.engine.queue import RequestQueue
from internvl3_jax.inference.engine.request import Piece, Request, Ticket
from internvl3_jax.inference.engine.rows import new_ticket
from internvl3_jax.inference.engine.scheduler import Scheduler
from internvl3_jax.inference.engine.stats import EngineStats
from internvl3_jax.inference.generator import Generator

_FIRST_CAPACITY = 512  # slots of rows that grow


class Engine:
    """Answers requests in the rows of one cache.

    `submit`, `cancel` and `wait` may be called from any thread; `step`, `run` and `warm_up` from
    one.

    Args:
      generator: its parameters and adapters are used.
      rows: answers that decode together.
      max_length: longest prompt with its answer, in tokens, for which memory is taken at once. None:
        the rows grow with their content.
      max_queue: waiting requests.
      image_bytes: of features of images that are kept.

    Attributes:
      failed: the exception that ended the engine, or None.
    """

    def __init__(
        self,
        generator: Generator,
        rows: int = 8,
        max_length: int | None = None,
        max_queue: int = 1 << 30,
        image_bytes: int = 1 << 30,
    ):
        self.generator, self.max_length = generator, max_length
        self.failed: BaseException | None = None
        grows = max_length is None
        self._device = Device(generator, rows, max_length or _FIRST_CAPACITY, grows)
        self._store = ImageStore(image_bytes)
        self._queue = RequestQueue(max_queue)
        self._scheduler = Scheduler(self._device, self._queue, self._store, grows)

    @classmethod
    def of(
        cls, checkpoint, cache: str | None = None, *, donate: bool = False, **arguments
    ) -> "Engine":
        """Returns an engine for what `internvl3_jax.load` returns.

        Args:
          cache: "int8" keeps keys and values in 8 bits.
          donate: take the parameters out of the checkpoint, as `Chat` does.
          arguments: of the constructor.
        """
        stop_ids = [
            checkpoint.tokenizer.token_id(token) for token in checkpoint.processor.stop_tokens
        ]
        generator = Generator(
            checkpoint.config,
            checkpoint.take_params(donate),
            checkpoint.model.dtype,
            stop_ids,
            checkpoint.adapters,
            cache,
            donate,
        )
        return cls(generator, **arguments)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Returns the ids that end an answer by the checkpoint's template."""
        return self.generator.stop_ids

    @property
    def stats(self) -> EngineStats:
        """Returns a copy of the counts."""
        return dataclasses.replace(
            self._scheduler.stats,
            running=sum(row.ticket is not None for row in self._scheduler.rows),
            waiting=len(self._queue),
            image_hits=self._store.hits,
            image_misses=self._store.misses,
        )

    def warm_up(self) -> None:
        """Compiles all programs: no request compiles anything afterwards. No request may be here.

        Raises:
          ValueError: the engine has no max_length, so that there is no end of programs.
        """
        if self.max_length is None:
            raise ValueError("warm_up needs an engine with max_length, up to which it compiles")
        self._device.warm_up()
        self.forget()

    def forget(self) -> None:
        """Makes what the rows hold of earlier prompts unusable for later ones."""
        for row in self._scheduler.rows:
            row.content = None

    # --- any thread -------------------------------------------------------------------------------

    def submit(
        self, request: Request, on_piece: Callable[[Piece], None] = lambda piece: None
    ) -> Ticket:
        """Puts a request at the end of the queue.

        Args:
          on_piece: see `Ticket`.

        Raises:
          QueueFullError: too many requests are waiting.
          ContextError: the prompt and its answer are too long.
          ValueError: a field of the request is out of range.
          RuntimeError: the engine has failed.
        """
        check_request(request, self.generator, self._device.numbers, self.max_length)
        ticket = new_ticket(request, self.generator.config, on_piece)
        self._queue.put(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request; its last piece has the finish "cancelled", unless it had ended before."""
        self._queue.cancel(ticket)

    def wait(self, seconds: float | None = None) -> bool:
        """Waits until there is something to do; returns whether there is."""
        return self._queue.wait_for(self._scheduler.has_work, seconds)

    def close(self) -> None:
        """Ends what runs elsewhere, of an engine of several hosts. No request may be open."""

    # --- the engine's thread ----------------------------------------------------------------------

    def run(self) -> None:
        """Steps until every request has ended."""
        while self.step():
            pass

    def step(self) -> bool:
        """Runs some of the prompts, and a block of tokens; returns whether anything is left.

        Raises:
          Exception: the engine has failed; its requests have got the finish "error".
        """
        try:
            self._scheduler.round()
        except BaseException as error:
            self.failed = error
            self._scheduler.fail(error)
            raise
        return self._scheduler.has_work()
