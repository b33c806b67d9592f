"""Data sheets of accelerators, for MFU and lower bounds of the step time.

TPU numbers are from docs.cloud.google.com/tpu/docs/ (v4, v5e, v5p, v6e, tpu7x), NVIDIA's from the
data sheets of A100 SXM 80 GB, H100 SXM, H200 SXM and DGX B200, without sparsity. All are per device
as JAX counts devices; a TPU7x chip has two.

network_bytes is what all links to the neighbors of a device receive together: half of the
"bidirectional" number of a data sheet. On TPUs the links are the torus of a slice (ICI), and a
group of devices along one axis of the torus has two of them. On GPUs they are NVLink, inside one
host. outside_bytes is a device's share of the network between slices or hosts.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device. Rates are per second; sizes in bytes."""

    # Name in a topology, such as "v5p".
    name: str
    # Beginnings of jax.Device.device_kind.
    kinds: tuple[str, ...]
    # Peak in bfloat16, FLOP/s.
    flops: float
    # HBM as sold, and the part that programs get.
    memory: float | int
    usable: float | int
    # Bandwidth of the HBM, of the links to neighbors, and to other slices or hosts.
    memory_bytes: float
    network_bytes: float
    outside_bytes: float
    # Dimensions of the torus. 0: all devices of a host are connected to each other.
    torus: int = 0


_GIB = 2**30
# A TPU's usable memory is what its compiler names when a program does not fit. CUDA's client takes
# three quarters of a GPU's memory at the start; nine tenths are what
# XLA_PYTHON_CLIENT_MEM_FRACTION=.9 gives, the rest is left to NCCL, cuBLAS and the context.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", ("TPU v4",), 275e12, 32 * _GIB, 30.75 * _GIB, 1228e9, 300e9, 6.25e9, torus=3),
        Chip(
            "v5e",
            ("TPU v5 lite", "TPU v5e"),
            197e12,
            16 * _GIB,
            15.75 * _GIB,
            819e9,
            200e9,
            3.125e9,
            torus=2,
        ),
        Chip(
            "v5p",
            ("TPU v5p", "TPU v5"),
            459e12,
            96 * _GIB,
            95.74 * _GIB,
            2765e9,
            600e9,
            6.25e9,
            torus=3,
        ),
        Chip("v6e", ("TPU v6",), 918e12, 32 * _GIB, 31.25 * _GIB, 1638e9, 400e9, 12.5e9, torus=2),
        Chip(
            "tpu7x", ("TPU7x",), 1153.5e12, 96 * _GIB, 94.75 * _GIB, 3690e9, 300e9, 6.25e9, torus=3
        ),
        Chip("a100", ("NVIDIA A100",), 312e12, 80e9, 0.9 * 80e9, 2039e9, 300e9, 25e9),
        Chip("h100", ("NVIDIA H100",), 989.4e12, 80e9, 0.9 * 84942979072, 3350e9, 450e9, 50e9),
        Chip("h200", ("NVIDIA H200",), 989.4e12, 141e9, 0.9 * 141e9, 4800e9, 450e9, 50e9),
        Chip("b200", ("NVIDIA B200",), 2250e12, 180e9, 0.9 * 180e9, 8000e9, 900e9, 50e9),
    )
}


def chip_of(kind: str) -> Chip | None:
    """Returns the chip of a jax.Device.device_kind; None where it is unknown, as on CPUs."""
    found = [
        (len(start), chip)
        for chip in CHIPS.values()
        for start in chip.kinds
        if kind.startswith(start)
    ]
    return max(found, key=lambda pair: pair[0])[1] if found else None
