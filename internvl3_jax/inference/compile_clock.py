"""Measures how long the first call of each compiled program takes, apart from later ones."""

import contextlib
import time
from collections.abc import Callable, Hashable, Iterator


class CompileClock:
    """Times the calls that compile.

    A call with a new key compiles: jit traces and compiles before it returns, and runs the program
    afterwards. With a persistent compilation cache it loads the program instead.

    Attributes:
      seconds: total so far.
      progress: called with the name of a program before it is compiled; the context manager that it
        returns is open meanwhile. A terminal shows a line there.
    """

    def __init__(self):
        self.seconds = 0.0
        self.progress: Callable[[str], contextlib.AbstractContextManager] = lambda name: (
            contextlib.nullcontext()
        )
        self._known: set[Hashable] = set()

    @contextlib.contextmanager
    def call(self, name: str, *key: Hashable) -> Iterator[None]:
        """Surrounds a call of the program `name`. key: all that the program is compiled for."""
        if (name, *key) in self._known:
            yield
            return
        began = time.perf_counter()
        with self.progress(name):
            yield
        self.seconds += time.perf_counter() - began
        self._known.add((name, *key))
