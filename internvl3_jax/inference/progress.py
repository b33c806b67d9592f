"""Lines about what takes long, for a person at a terminal."""

import contextlib
import sys
import time
from collections.abc import Iterator

from internvl3_jax.io.terminal import one_line


@contextlib.contextmanager
def progress_line(text: str) -> Iterator[None]:
    """Prints "text ..." to stderr, and the seconds when the block ends. Prints nothing unless
    stderr is a terminal.
    """
    if not sys.stderr.isatty():
        yield
        return
    print(f"{one_line(text)} ...", end="", file=sys.stderr, flush=True)
    began = time.perf_counter()
    try:
        yield
    except BaseException:
        print(file=sys.stderr)
        raise
    print(f" {time.perf_counter() - began:.1f} s", file=sys.stderr)
