"""Kernels by time, from a trace of jax's profiler."""

import collections
import pathlib
import tempfile
from collections.abc import Callable


def top_kernels(call: Callable, count: int = 12) -> dict:
    """Returns the kernels of one call: their number, their time, and the longest.

    CUDA graphs are off while the profiler runs, so these are times of kernels, not of launches.
    On a CPU the events of XLA's threads take their place.
    """
    import jax
    from jax.profiler import ProfileData, ProfileOptions

    call()
    options = ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            call()
        path = sorted(pathlib.Path(folder).rglob("*.xplane.pb"))[-1]
        planes = list(ProfileData.from_file(str(path)).planes)
        on_gpu = any("GPU" in plane.name for plane in planes)
        nanoseconds, number = collections.Counter(), collections.Counter()
        for plane in planes:
            if ("GPU" if on_gpu else "CPU") not in plane.name:
                continue
            for line in plane.lines:
                if on_gpu and "Stream" not in line.name:
                    continue
                for event in line.events:
                    nanoseconds[event.name] += event.duration_ns
                    number[event.name] += 1
    return {
        "kernels": sum(number.values()),
        "busy_ms": sum(nanoseconds.values()) / 1e6,
        "top": [
            [name[:70], round(time / 1e6, 4), number[name]]
            for name, time in nanoseconds.most_common(count)
        ],
    }
