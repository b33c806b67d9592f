"""Measures how long the first call of each compiled program takes, apart from later ones."""

import contextlib
import functools
import time
from collections.abc import Callable, Hashable, Iterator

import jax

_last_event = 0.0  # time of jax's last event about tracing, compiling or loading a program


def _note_event(event: str, seconds: float, **_) -> None:
    global _last_event
    if "compil" in event:
        _last_event = time.perf_counter()


@functools.cache
def _listen() -> None:
    """Registers the listener, once."""
    jax.monitoring.register_event_duration_secs_listener(_note_event)


class CompileClock:
    """Times the calls that compile.

    A call with a new key compiles: jit traces and compiles the program, or loads it from the
    persistent cache, before it runs it.

    Attributes:
      seconds: total so far, without the runs.
      progress: called with the name of a program before it is compiled; the context manager that it
        returns is open meanwhile. A terminal shows a line there.
    """

    def __init__(self):
        _listen()
        self.seconds = 0.0
        self.progress: Callable[[str], contextlib.AbstractContextManager] = lambda name: (
            contextlib.nullcontext()
        )
        self._known: set[Hashable] = set()

    @property
    def num_programs(self) -> int:
        """Returns how many programs were called so far."""
        return len(self._known)

    @contextlib.contextmanager
    def call(self, name: str, *key: Hashable) -> Iterator[None]:
        """Surrounds a call of the program `name`. key: all that the program is compiled for."""
        if (name, *key) in self._known:
            yield
            return
        began = time.perf_counter()
        with self.progress(name):
            yield
        # On a CPU the call also runs the program, after jax's last event.
        self.seconds += max(0.0, _last_event - began)
        self._known.add((name, *key))
