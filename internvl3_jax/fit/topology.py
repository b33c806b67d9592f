"""Devices that are not there: a TPU slice or GPU hosts by name, for the compilers that come with
jax[tpu] and with jax's CUDA plugin.

    v5e:16x16  v5p:4x4x8  v6e:8x8  tpu7x:4x4x4     chips along each side of the torus; a tpu7x chip is two devices
    h100:1x16x8                                    1 slice of 16 hosts with 8 GPUs each
    cpu:8                                          this machine's CPU as so many devices, to try something out

Neither compiler needs a device or a driver: the TPU's is libtpu, CUDA's takes the description of
the GPU from `h100.txtpb`.
"""

import dataclasses
import math
import os
import pathlib

import jax

from internvl3_jax.training.hardware import CHIPS, Chip

TPUS = {"v5e": 1, "v5p": 1, "v6e": 1, "tpu7x": 2}  # devices of a chip
GPUS = {"h100": "h100.txtpb"}
EXAMPLES = "v5e:4x4, v5p:4x4x8, v6e:16x16, tpu7x:4x4x4 or h100:1x16x8"
# libtpu asks Google's metadata server for the machine it runs on, and locks the TPU that it thinks
# it has.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    name: str
    chip: Chip | None  # None on a CPU
    sides: tuple[int, ...]

    @property
    def kind(self) -> str:
        return self.name.partition(":")[0]

    @property
    def count(self) -> int:
        """Devices."""
        return math.prod(self.sides) * TPUS.get(self.kind, 1)

    @property
    def near(self) -> int:
        """Devices that the fast network joins: a TPU's slice, a GPU's host."""
        return self.sides[-1] if self.kind in GPUS else self.count

    def seconds(self, size: float, group: int, stride: int = 1) -> float:
        """To receive so many bytes from the other devices of a group, at the most that its links
        can carry.

        On a torus a group has the links of the fewest sides that hold it. Among GPUs what comes
        from other hosts comes over each member's own adapter to one of its host's members, and from
        there over the fast links.
        """
        if group <= 1 or not size:
            return 0.0
        if self.kind in GPUS:
            local = max(1, min(group, self.near // stride))
            outside = size * (1 - local / group) / local / self.chip.outside_bytes
            return max(size / self.chip.network_bytes, outside)
        longest = sorted(self.sides, reverse=True)
        held = next(
            count
            for count in range(1, len(longest) + 1)
            if math.prod(longest[:count]) * TPUS[self.kind] >= group
        )
        return size / (self.chip.network_bytes * held / len(longest))

    def gathers_by_sums(self, group: int) -> bool:
        """Whether the compiler gathers over the group by summing arrays that are zero but for one
        part, which moves twice the bytes. Seen in compiled programs for v5p and tpu7x: over all of
        a slice whose three sides close to rings.
        """
        return (
            len(self.sides) == 3
            and self.kind in TPUS
            and group == self.count
            and min(self.sides) >= 4
        )

    def devices(self) -> list:
        """For `sharding.make_mesh`. ImportError that says what to install where the compiler is
        missing.
        """
        if self.kind == "cpu":
            return jax.devices("cpu")[: self.count]
        from jax.experimental import topologies

        os.environ.update(
            {name: value for name, value in _LIBTPU.items() if name not in os.environ}
        )
        try:
            if self.kind in TPUS:
                return topologies.get_topology_desc(platform="tpu", topology_name=self.name).devices
            target = (pathlib.Path(__file__).parent / GPUS[self.kind]).read_text(encoding="utf-8")
            sides = "x".join(map(str, self.sides))
            return topologies.get_topology_desc(
                platform="cuda", topology_name="", target_config=target, topology=sides
            ).devices
        except (RuntimeError, NotImplementedError) as error:
            raise ImportError(
                f"{self.name} cannot be compiled for here: {_first_line(error)}; {self._missing()}"
            ) from error

    def options(self) -> dict:
        """Of `lowered.compile`: without a GPU there is nothing to tune kernels on."""
        return (
            {"xla_gpu_autotune_level": "0", "xla_gpu_enable_triton_gemm": False}
            if self.kind in GPUS
            else {}
        )

    def _missing(self) -> str:
        what = "libtpu (pip install 'jax[tpu]')"
        if self.kind in GPUS:
            version = jax.__version__
            what = f"the CUDA plugin (pip install --no-deps jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version})"
        return f"it needs {what}, or --analytic, which needs neither"


def parse(text: str) -> Topology:
    """ValueError that says what a topology looks like."""
    kind, _, shape = text.partition(":")
    sides = shape.split("x")
    if not shape or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ValueError(f"--topology is {text!r}; it must be like {EXAMPLES}")
    if kind not in (*TPUS, *GPUS, "cpu"):
        raise ValueError(
            f"--topology is {text!r}; known are {', '.join((*TPUS, *GPUS))}, as in {EXAMPLES}"
        )
    wanted = 1 if kind == "cpu" else 3 if kind in GPUS else CHIPS[kind].torus
    if len(sides) != wanted:
        meaning = {1: "devices", 2: "sides of the torus"}.get(
            wanted, "slices x hosts x GPUs" if kind in GPUS else "sides of the torus"
        )
        raise ValueError(
            f"--topology is {text!r}; {kind} has {wanted} numbers: {meaning}, as in {EXAMPLES}"
        )
    return Topology(text, CHIPS.get(kind), tuple(map(int, sides)))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]
