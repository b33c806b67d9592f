"""XLA options of each program, set where it is compiled and never in the user's environment."""

import functools
import sys
from collections.abc import Callable

import jax

from internvl3_jax.parallel.collectives import platform

# docs/benchmarks.md has the compiled programs before and after.
_GPU = {
    "train": {
        # cuBLAS adds biases within its products; Triton's would be kernels of their own.
        "xla_gpu_enable_triton_gemm": False,
        # It computes a product that is kept for the backward pass twice.
        "xla_gpu_enable_dynamic_slice_fusion": False,
        # Stacks of kept arrays are not filled with zeros before they are written.
        "xla_gpu_enable_dus_accumulator_zero_init_elimination": True,
        # Above 80% of the memory it computes wide arrays again and again to free a little of it.
        # What is computed again is for the remat policy to say.
        "xla_disable_hlo_passes": "rematerialization",
    },
    "encode": {
        "xla_gpu_enable_triton_gemm": False,
        # Keeps the products of queries, keys and values apart.
        "xla_gpu_dot_merger_threshold_mb": 0,
    },
}
_UNKNOWN = "No such compile option"


def options(program: str) -> dict | None:
    """Returns the options of "train" or "encode" for the devices in context; None for no options.

    An option that this version of jax does not know is left out, with a note.
    """
    if platform() != "gpu":
        return None
    return {name: value for name, value in _GPU[program].items() if is_known(name, value)}


@functools.cache
def is_known(name: str, value: bool | int | str) -> bool:
    """Returns whether the compiler takes an option; prints a note if it does not."""
    try:
        jax.jit(lambda x: x, compiler_options={name: value}).lower(0).compile()
    except jax.errors.JaxRuntimeError as error:
        if _UNKNOWN not in str(error):
            raise
        print(
            f"note: XLA option {name} is left out, since jax {jax.__version__} does not know it",
            file=sys.stderr,
            flush=True,
        )
        return False
    return True


class Program:
    """A jitted function that is compiled with the options of its program; see `options`.

    It is called and lowered as what `jax.jit` returns.
    """

    def __init__(self, function: Callable, name: str, **arguments):
        """Wraps a function; `arguments` are those of `jax.jit`."""
        functools.update_wrapper(self, function)
        self._function, self._name, self._arguments = function, name, arguments
        self._jitted: dict[str, Callable] = {}

    def __call__(self, *arguments):
        return self._for_devices()(*arguments)

    def lower(self, *arguments):
        return self._for_devices().lower(*arguments)

    def _cache_size(self) -> int:
        return sum(jitted._cache_size() for jitted in self._jitted.values())

    def _for_devices(self) -> Callable:
        devices = platform()
        if devices not in self._jitted:
            self._jitted[devices] = jax.jit(
                self._function, compiler_options=options(self._name), **self._arguments
            )
        return self._jitted[devices]
