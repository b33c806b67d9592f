"""Compiles a lowered program for devices that need not exist, and reads the result's memory use."""

import dataclasses
import re
import time

import jax

from internvl3_jax.fit.hlo import Collectives, collectives
from internvl3_jax.fit.topology import Topology

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}
_SIZE = r"([\d.]+)([KMGT]?)"
_OUT_OF_MEMORY = (
    rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)",
    rf"Used {_SIZE} of {_SIZE} hbm",
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Results of compiling a program; bytes are of one device.

    Attributes:
      seconds: Time of the compilation.
      peak: Peak memory; if the compilation ran out of memory, what would have been needed.
      available: Memory that a program may use.
      out_of_memory: The compilation failed. GPU compilers also compile what does not fit.
      arguments: Size of the program's arguments.
      code: Size of the program.
      host: Bytes in the host's memory, in addition to the peak.
      collectives: The program's collectives.
      text: The compiled program.
    """

    seconds: float
    peak: int
    available: float
    out_of_memory: bool
    arguments: int = 0
    code: int = 0
    host: int = 0
    collectives: tuple[Collectives, ...] = ()
    text: str = dataclasses.field(default="", repr=False)

    @property
    def fits(self) -> bool:
        return not self.out_of_memory and self.peak <= self.available


def compile_for(lowered, topology: Topology) -> Compiled:
    """Compiles a lowered program, whether it fits or not.

    Raises:
      jax.errors.JaxRuntimeError: An error of the compiler other than running out of memory.
    """
    start = time.perf_counter()
    available = topology.chip.usable if topology.chip else float("inf")
    try:
        compiled = lowered.compile(topology.options() or None)
    except jax.errors.JaxRuntimeError as error:
        if (sizes := parse_out_of_memory(str(error))) is None:
            raise
        return Compiled(time.perf_counter() - start, sizes[0], sizes[1], out_of_memory=True)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return Compiled(
        seconds=time.perf_counter() - start,
        # XLA counts arguments in host memory as part of the peak, but not its host temporaries.
        peak=memory.peak_memory_in_bytes - memory.host_argument_size_in_bytes,
        host=memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
        available=available,
        out_of_memory=False,
        arguments=memory.argument_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        collectives=tuple(collectives(text, topology.count)),
        text=text,
    )


def parse_out_of_memory(message: str) -> tuple[int, int] | None:
    """Returns the bytes needed and available from a TPU compiler's error; None for other errors."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    match = next(filter(None, (re.search(pattern, message) for pattern in _OUT_OF_MEMORY)), None)
    if match is None:
        return None
    needed, needed_unit, available, available_unit = match.groups()
    return (
        round(float(needed) * _UNITS[needed_unit]),
        round(float(available) * _UNITS[available_unit]),
    )
