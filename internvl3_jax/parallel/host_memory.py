"""Memory of programs that run on CPUs: what one call frees, the next one takes again."""

import ctypes
import importlib.metadata
import importlib.util

import jax

# Parameters of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# Blocks up to this size are kept. Larger ones go back to the system: once something small is in a
# kept block the next call cannot use it, so that a program could come to need twice its memory.
_KEPT_BYTES = 2**30


def keep_freed_memory() -> bool:
    """Makes the C library keep what XLA frees, where JAX runs on CPUs; returns whether it does.

    XLA allocates a program's buffers at each call and frees them. By default glibc returns large
    blocks to the system, which gives them back as pages of zeros, one fault for every 4 KiB. That
    was a fifth of the CPU time of the digits model's train step (docs/benchmarks.md).

    Call it before JAX starts: programs then run in the thread that calls them, since the heaps of
    other threads hold no blocks above 64 MiB. C libraries other than glibc are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not is_cpu_only():
        return False
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    settings = {_MMAP_THRESHOLD: _KEPT_BYTES, _TRIM_THRESHOLD: 2 * _KEPT_BYTES - 1}
    taken = [mallopt(name, value) for name, value in settings.items()]
    return all(taken)


def is_cpu_only() -> bool:
    """Returns whether JAX will run on CPUs, without starting it.

    That is where JAX_PLATFORMS says so, or says nothing and no plugin of an accelerator is
    installed.
    """
    if jax.config.jax_platforms:
        return jax.config.jax_platforms == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and importlib.util.find_spec("libtpu") is None
