"""Timing and random weights."""

import functools
import statistics
import time
from collections.abc import Callable


def repeat(call: Callable, seconds: float = 1.5, least: int = 3, smoke: bool = False) -> dict:
    """Returns the median, p10 and p90 of a call that waits for its result, in milliseconds.

    Args:
      seconds: How long to repeat.
      least: Calls at least.
    """
    call()  # warm
    times, end = [], time.perf_counter() + (0 if smoke else seconds)
    while len(times) < (1 if smoke else least) or (time.perf_counter() < end and len(times) < 200):
        began = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - began))
    times.sort()
    place = len(times) // 10
    return {
        "ms": statistics.median(times),
        "p10": times[place],
        "p90": times[-1 - place],
        "n": len(times),
    }


def random_params(shapes):
    """Returns random values for ShapeDtypeStructs. Zeros would multiply faster."""
    import jax
    import jax.numpy as jnp

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def make(key, shape, dtype):
        return (jax.random.normal(key, shape, jnp.float32) * 0.02).astype(dtype)

    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    values = [make(key, leaf.shape, leaf.dtype) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, values)


def jax_peak_gib() -> float | None:
    """Returns the most memory that this process has had on the device so far, or None."""
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in stats else None
