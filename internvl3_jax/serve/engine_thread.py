"""The thread that runs the engine."""

import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)
_IDLE = 0.5  # seconds between looks whether to stop


class EngineThread:
    """Steps an engine until `stop`.

    Args:
      engine: of internvl3_jax.inference.engine.
      on_failure: called once, from the thread, with the error that a step raised. The engine cannot
        be used any more.
    """

    def __init__(self, engine, on_failure: Callable[[BaseException], None]):
        self._engine, self._on_failure = engine, on_failure
        self._stopping = threading.Event()
        self._began: float | None = None  # the round that runs
        # A daemon: a step that hangs does not keep the process.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def seconds_in_round(self) -> float:
        """Returns how long the engine's current round has taken; 0.0 if none runs."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def stop(self, seconds: float = 10.0) -> bool:
        """Returns whether the thread has ended within some seconds."""
        self._stopping.set()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._began = time.monotonic()
                has_work = self._engine.step()
                self._began = None
                if not has_work:
                    self._engine.wait(_IDLE)
        except BaseException as error:
            # Nobody waits for this thread: whatever ends it is reported.
            log.exception("the engine failed; the server ends")
            self._on_failure(error)
