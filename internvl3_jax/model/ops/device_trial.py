"""Tries a kernel on the device before it is used: kernels that rest on internals of jax, or on what
a library does not promise.
"""

import concurrent.futures
import sys
from collections.abc import Callable

import jax


def works(error_of: Callable[[], float], tolerance: float, wrong: str, note: str) -> bool:
    """Returns whether a kernel's error is small; else prints a note.

    True where programs are only compiled for a GPU (internvl3_jax/fit). Callers remember the
    result.

    Args:
      error_of: Runs the kernel and returns its error; infinite for values that are not finite.
      wrong: Says how large the error is, with {error} in it.
      note: Says what is used in its place, with {reason} in it.
    """
    if jax.default_backend() != "gpu":
        return True
    # In a thread of its own: this is called while a program is being traced, under its mesh.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            error = pool.submit(error_of).result()
        # Any failure of what is internal to jax: of its signature, its checks or its compiler.
        except Exception as failure:
            reason = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
        else:
            if error <= tolerance:
                return True
            reason = wrong.format(error=error)
    print(f"note: {note.format(reason=reason)}", file=sys.stderr, flush=True)
    return False
