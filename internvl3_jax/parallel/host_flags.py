"""How processes find each other where their launcher does not say: the flags of every program that
several hosts run.
"""

from absl import flags

COORDINATOR = flags.DEFINE_string(
    "coordinator",
    "",
    "HOST:PORT of process 0; not needed on Cloud TPU, SLURM, Open MPI, Kubernetes.",
)
PROCESSES = flags.DEFINE_integer("processes", -1, "How many processes the run has; as above.")
PROCESS = flags.DEFINE_integer("process", -1, "The number of this one, from 0; as above.")
