"""Devices by name, for ahead-of-time compilation without having them.

    v5e:16x16  v5p:4x4x8  v6e:8x8  tpu7x:4x4x4   chips along each side of the torus; a tpu7x chip is
                                                 two devices
    h100:1x16x8                                  1 slice of 16 hosts with 8 GPUs each
    cpu:8                                        8 devices on this machine's CPU, for trials

The compilers come with jax[tpu] and with jax's CUDA plugin. Neither needs a device or a driver. The
TPU's is in libtpu; CUDA's takes the description of the GPU from `h100.txtpb`.
"""

import dataclasses
import math
import os
import pathlib

import jax

from internvl3_jax.training.hardware import CHIPS, Chip

TPUS = {"v5e": 1, "v5p": 1, "v6e": 1, "tpu7x": 2}  # devices per chip
GPUS = {"h100": "h100.txtpb"}  # file with the compilation target
EXAMPLES = "v5e:4x4, v5p:4x4x8, v6e:16x16, tpu7x:4x4x4 or h100:1x16x8"
# Without these, libtpu asks Google's metadata server about the machine, and locks the TPU that it
# expects to find.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """The devices of a run.

    Attributes:
      name: As on the command line, such as "v5e:16x16".
      chip: Rates and memory; None on a CPU.
      sides: The numbers of the name.
    """

    name: str
    chip: Chip | None
    sides: tuple[int, ...]

    @property
    def kind(self) -> str:
        return self.name.partition(":")[0]

    @property
    def count(self) -> int:
        """Returns the number of devices."""
        return math.prod(self.sides) * TPUS.get(self.kind, 1)

    @property
    def near(self) -> int:
        """Devices that the fast network connects: those of a TPU slice, or of a GPU host."""
        return self.sides[-1] if self.kind in GPUS else self.count

    def seconds(self, size: float, group: int, stride: int = 1) -> float:
        """Returns the least time in which a device receives `size` bytes from its group.

        On a torus, a group uses the links of the fewest sides that hold it. Among GPUs, data of
        other hosts arrives once per host, over the adapters of all local members, and is passed on
        over the fast links.

        Args:
          size: Bytes.
          group: Devices of the group.
          stride: Distance between members of the group, in devices.
        """
        if group <= 1 or not size:
            return 0.0
        if self.kind in GPUS:
            local = max(1, min(group, self.near // stride))
            outside = size * (1 - local / group) / local / self.chip.outside_bytes
            return max(size / self.chip.network_bytes, outside)
        longest = sorted(self.sides, reverse=True)
        used = next(
            count
            for count in range(1, len(longest) + 1)
            if math.prod(longest[:count]) * TPUS[self.kind] >= group
        )
        return size / (self.chip.network_bytes * used / len(longest))

    def gathers_by_sums(self, group: int) -> bool:
        """Returns whether the compiler all-gathers over a group by summing zero-padded arrays.

        That moves twice the bytes. Compiled programs for v5p and tpu7x do it over a complete slice
        whose three sides close to rings.
        """
        return (
            len(self.sides) == 3
            and self.kind in TPUS
            and group == self.count
            and min(self.sides) >= 4
        )

    def devices(self) -> list:
        """Returns the devices for `sharding.make_mesh`.

        Raises:
          ImportError: The compiler is missing; the message says what to install.
        """
        if self.kind == "cpu":
            return jax.devices("cpu")[: self.count]
        from jax.experimental import topologies

        # TPU compilers know topologies by name, CUDA's needs a description of the GPU.
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
                f"{self.name}: programs for it cannot be compiled here: {_first_line(error)}; "
                f"{self._missing()}"
            ) from error

    def options(self) -> dict:
        """Returns options for `lowered.compile`: without a GPU kernels cannot be autotuned."""
        return {"xla_gpu_autotune_level": "0"} if self.kind in GPUS else {}

    def _missing(self) -> str:
        compiler = "libtpu (pip install 'jax[tpu]')"
        if self.kind in GPUS:
            packages = " ".join(
                f"jax-cuda13-{name}=={jax.__version__}" for name in ("plugin", "pjrt")
            )
            compiler = f"the CUDA plugin (pip install --no-deps {packages})"
        return f"install {compiler}, or use --analytic, which needs no compiler"


def parse(text: str) -> Topology:
    """Parses a name such as "v5e:16x16".

    Raises:
      ValueError: The name is invalid; the message shows valid ones.
    """
    kind, _, shape = text.partition(":")
    sides = shape.split("x")
    if not shape or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ValueError(f"--topology is {text!r}; it must be like {EXAMPLES}")
    if kind not in (*TPUS, *GPUS, "cpu"):
        raise ValueError(
            f"--topology is {text!r}; use one of {', '.join((*TPUS, *GPUS))}, as in {EXAMPLES}"
        )
    # Numbers that follow the name of these devices.
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
