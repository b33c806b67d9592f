"""A checkpoint that a kit asks: the options of its class, and the questions of several threads in
one running batch.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent import futures

from internvl3_jax.evaluate import asking
from internvl3_jax.inference import loading
from internvl3_jax.inference.chat import Chat
from internvl3_jax.inference.engine.engine import Engine
from internvl3_jax.inference.options import check_int, units
from internvl3_jax.io.checkpoint_paths import check_exists

CACHE = "~/.cache/internvl3_jax/xla"


class AskedModel:
    """Answers the questions of a kit.

    Args:
      checkpoint: a directory, training run, released directory or hub id.
      delta: V2PE step such as "1/4"; None: the checkpoint's own.
      max_tiles: largest number of tiles of an image, in place of the benchmark's.
      max_new_tokens: longest answer, where the benchmark's limit is higher.
      batch_size: answers that decode together.
      dtype, devices, fsdp, compilation_cache: as of `python -m internvl3_jax.evaluate`.

    Raises:
      ValueError, OSError: the checkpoint cannot be loaded, or an argument is wrong.
    """

    def __init__(
        self,
        checkpoint: str,
        delta: str | float | None = None,
        max_tiles: int | None = None,
        max_new_tokens: int | None = None,
        batch_size: int = 8,
        dtype: str | None = None,
        devices: int | None = None,
        fsdp: int = 1,
        compilation_cache: str = CACHE,
    ):
        if delta is not None:
            units(delta)
        for name, value in (("max_tiles", max_tiles), ("max_new_tokens", max_new_tokens)):
            if value is not None:
                check_int(name, value, 1)
        self.delta, self.max_tiles, self.max_new_tokens = delta, max_tiles, max_new_tokens
        self.batch_size = check_int("batch_size", batch_size, 1)
        check_exists(checkpoint)
        loading.check_cache(compilation_cache)
        loading.use_compilation_cache(compilation_cache)
        mesh = loading.make_mesh(devices, fsdp, hosts=False)
        self.checkpoint = loading.open_checkpoint(checkpoint, dtype=dtype, mesh=mesh)
        self.chat = Chat(self.checkpoint, donate=True)
        self._incoming: queue.SimpleQueue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def options(self, options: dict) -> dict:
        """Returns options of `Chat`: those of a benchmark, with what the class was given."""
        changes = {"delta": self.delta, "max_tiles": self.max_tiles}
        if self.max_new_tokens is not None:
            limit = options.get("max_new_tokens", self.max_new_tokens)
            changes["max_new_tokens"] = min(limit, self.max_new_tokens)
        return options | {name: value for name, value in changes.items() if value is not None}

    def answer_all(self, function: Callable, values: Sequence) -> list:
        """Returns the results of a function that calls `answer`, from as many threads as needed."""
        with futures.ThreadPoolExecutor(2 * self.batch_size) as pool:
            return list(pool.map(function, values))

    def answer(self, question: asking.Question, options: dict) -> dict:
        """Returns the answer to one question. Questions of other threads are answered with it.

        Raises:
          ValueError, OSError: the question cannot be asked; the message names it.
          Exception: the error that ended the answer.
        """
        with self._starting:
            if self._thread is None:
                # A daemon: it waits for questions as long as the process lives.
                self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
                self._thread.start()
        future: futures.Future[dict] = futures.Future()
        self._incoming.put((question, options, future))
        return future.result()

    def _run(self) -> None:
        asked: dict = {}
        while True:
            self._take(asked)
            try:
                self._engine().step()
            except Exception as error:  # it has ended all questions; the next ones get a new engine
                for future in asked.values():
                    future.set_exception(error)
                asked.clear()
            for one in [one for one in asked if one.ticket.finish is not None]:
                _finish(asked.pop(one), one)

    def _engine(self) -> Engine:
        return self.chat.engines.with_rows(self.batch_size)

    def _take(self, asked: dict) -> None:
        """Lets questions into the engine: as many again as decode. Waits for one if there is none.

        A question that cannot be asked fails alone, also for want of an engine.
        """
        while len(asked) < 2 * self.batch_size and not (asked and self._incoming.empty()):
            question, options, future = self._incoming.get()
            try:
                prompt = self.chat.prepare(
                    question.text, question.images, where=question.name, **options
                )
                changed = self.chat.options.with_changes(options)
                asked[self.chat.ask(self._engine(), prompt, changed)] = future
            except Exception as error:  # whoever asked gets it
                future.set_exception(error)


def _finish(future: futures.Future, one) -> None:
    try:
        future.set_result(asking.answer_row(one))
    except Exception as error:  # of this answer alone
        future.set_exception(error)
