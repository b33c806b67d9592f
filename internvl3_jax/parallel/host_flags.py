"""Flags with which processes find each other; for every program that runs on several hosts."""

from absl import flags

COORDINATOR = flags.DEFINE_string(
    "coordinator",
    "",
    "HOST:PORT of process 0; not needed on Cloud TPU, SLURM, Open MPI, Kubernetes.",
)
PROCESSES = flags.DEFINE_integer(
    "processes", -1, "Number of processes of the run; not needed where --coordinator is not."
)
PROCESS = flags.DEFINE_integer(
    "process", -1, "Index of this process, from 0; not needed where --coordinator is not."
)
