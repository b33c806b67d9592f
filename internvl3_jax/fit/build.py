"""Compiles a traced program for devices that are not there, and asks the result what it takes."""

import dataclasses
import re
import time

import jax

from internvl3_jax.fit.compiled import Collectives, collectives
from internvl3_jax.fit.topology import Topology

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}
_SIZE = r"([\d.]+)([KMGT]?)"
_REFUSALS = (
    rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)",
    rf"Used {_SIZE} of {_SIZE} hbm",
)


@dataclasses.dataclass(frozen=True)
class Built:
    """Bytes are of one device."""

    seconds: float  # that the compiler took
    peak: int  # where it was refused: what would have been needed
    available: float
    refused: bool  # by the compiler; a GPU's compiles what does not fit as well
    arguments: int = 0
    code: int = 0
    host: int = 0  # beside the peak, in the host's memory
    collectives: tuple[Collectives, ...] = ()
    text: str = dataclasses.field(default="", repr=False)

    @property
    def fits(self) -> bool:
        return not self.refused and self.peak <= self.available


def build(lowered, topology: Topology) -> Built:
    """Whether it fits or not; other errors of the compiler are raised."""
    began = time.perf_counter()
    available = topology.chip.usable if topology.chip else float("inf")
    try:
        compiled = lowered.compile(topology.options() or None)
    except jax.errors.JaxRuntimeError as error:
        if (sizes := refusal(str(error))) is None:
            raise
        return Built(time.perf_counter() - began, sizes[0], sizes[1], refused=True)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return Built(
        seconds=time.perf_counter() - began,
        # What lies with the host from the beginning is counted as well, though not what comes
        # there.
        peak=memory.peak_memory_in_bytes - memory.host_argument_size_in_bytes,
        host=memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
        available=available,
        refused=False,
        arguments=memory.argument_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        collectives=tuple(collectives(text, topology.count)),
        text=text,
    )


def refusal(message: str) -> tuple[int, int] | None:
    """Bytes needed and available, of a TPU compiler's refusal; None of any other error."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = next(filter(None, (re.search(pattern, message) for pattern in _REFUSALS)), None)
    if found is None:
        return None
    needed, unit, available, other = found.groups()
    return round(float(needed) * _UNITS[unit]), round(float(available) * _UNITS[other])
