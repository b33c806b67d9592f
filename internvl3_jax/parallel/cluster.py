"""Which processes belong to a run: from arguments, or from what the launcher put into the
environment.

Open MPI, SLURM, Cloud TPU and Kubernetes Jobs are those that `jax.distributed.initialize()` knows
by itself. Here it is only decided whether to call it, and with what: called where nothing is to be
found it raises, and some environments look like another.
"""

import dataclasses
from collections.abc import Mapping
from importlib.util import find_spec

SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
TPU_HOSTS = ("TPU_PROCESS_ADDRESSES_PATH", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
GIVE_ALL = "give --coordinator HOST:PORT, --processes and --process"


@dataclasses.dataclass(frozen=True)
class Environment:
    how: str  # for people
    arguments: dict  # of jax.distributed.initialize
    processes: int | None = None  # None: only jax finds out
    process: int | None = None


def find_environment(
    coordinator: str, processes: int, process: int, environ: Mapping[str, str]
) -> Environment | None:
    """None for a single process. ValueError for arguments that are incomplete or contradict each
    other or the environment.
    """
    if processes == 1 and not coordinator and process in (-1, 0):
        return None
    launcher = _launcher(environ)
    if not coordinator and processes == -1 and process == -1:
        return launcher if launcher is None or launcher.processes != 1 else None
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in given.items() if value in ("", -1)]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} missing; {GIVE_ALL}, or none of them to find them from the environment"
        )
    if processes < 1 or not 0 <= process < processes:
        raise ValueError(
            f"--process is {process} and --processes {processes}; processes are numbered from 0 to --processes - 1"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(
            f"--coordinator is {coordinator!r}; it must be HOST:PORT of process 0, such as node1:8476"
        )
    for name, ours, theirs in (
        ("--processes", processes, launcher and launcher.processes),
        ("--process", process, launcher and launcher.process),
    ):
        if theirs is not None and ours != theirs:
            raise ValueError(
                f"{name} is {ours}, but {launcher.how} says {theirs}; leave the three arguments out, or unset its variables"
            )
    arguments = {
        "coordinator_address": coordinator,
        "num_processes": processes,
        "process_id": process,
    }
    return Environment(
        "arguments", arguments | {"cluster_detection_method": "deactivate"}, processes, process
    )


def _launcher(environ: Mapping[str, str]) -> Environment | None:
    """The one that jax would take: mpirun may itself be started by SLURM's srun, and either runs on
    TPU and in Kubernetes.
    """
    for find in (_open_mpi, _slurm, _cloud_tpu, _kubernetes):
        if found := find(environ):
            return found
    return None


def _open_mpi(environ: Mapping[str, str]) -> Environment | None:
    if "OMPI_COMM_WORLD_SIZE" not in environ:
        return None
    size, rank = int(environ["OMPI_COMM_WORLD_SIZE"]), int(environ["OMPI_COMM_WORLD_RANK"])
    if "OMPI_MCA_orte_hnp_uri" in environ:
        return Environment("Open MPI", {"cluster_detection_method": "ompi"}, size, rank)
    # From version 5 on the environment no longer says where process 0 is.
    if size > 1 and find_spec("mpi4py") is None:
        raise ValueError(
            f"Open MPI 5 started {size} processes; install mpi4py so that they find each other, or {GIVE_ALL}"
        )
    return Environment("Open MPI", {"cluster_detection_method": "mpi4py"}, size, rank)


def _slurm(environ: Mapping[str, str]) -> Environment | None:
    if not all(name in environ for name in SLURM):
        return None
    # In an interactive step SLURM_NTASKS is of the allocation, and only one process runs.
    if environ.get("SLURM_STEP_NUM_TASKS") == "1":
        return Environment("SLURM", {}, 1, 0)
    arguments = {"cluster_detection_method": "slurm"}
    if (devices := slurm_devices(environ)) is not None:
        arguments["local_device_ids"] = devices
    return Environment(
        "SLURM", arguments, int(environ["SLURM_NTASKS"]), int(environ["SLURM_PROCID"])
    )


def slurm_devices(environ: Mapping[str, str]) -> list[int] | None:
    """The GPUs of this task by their number among those it sees; None to leave it to jax, which
    takes the one numbered SLURM_LOCALID.

    That one is wrong where a task has several GPUs (all but one would be idle) or sees only its own
    (there is no such number).
    """
    seen = len([name for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name])
    on_node = environ.get("SLURM_GPUS_ON_NODE", "")
    # "8(x2),4": tasks of each node; how many here is known only if all nodes are alike.
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0]
    if not (
        seen
        and on_node.isdecimal()
        and tasks.isdecimal()
        and "," not in environ["SLURM_STEP_TASKS_PER_NODE"]
    ):
        return None
    if seen < int(on_node) or int(tasks) == 1:
        return list(range(seen))
    each, local = seen // int(tasks), int(environ["SLURM_LOCALID"])
    return list(range(local * each, local * each + each)) or None


def _cloud_tpu(environ: Mapping[str, str]) -> Environment | None:
    # Importing jax sets it where it finds TPU chips. The other variables are also set to compile
    # for TPUs without having any.
    if environ.get("TPU_ML_PLATFORM") != "JAX":
        return None
    if any(name in environ for name in TPU_HOSTS):
        hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES", ""))
        alone = (
            "," not in hosts
            and TPU_HOSTS[0] not in environ
            and environ.get("MEGASCALE_NUM_SLICES", "1") == "1"
        )
        return Environment("GKE's TPU variables", {}, 1 if alone else None, 0 if alone else None)
    # A TPU VM outside GKE asks Google's metadata server.
    return None if "TPU_SKIP_MDS_QUERY" in environ else Environment("Cloud TPU", {})


def _kubernetes(environ: Mapping[str, str]) -> Environment | None:
    # Only pods of indexed Jobs have a number (JobSet makes such Jobs); any other pod is no reason
    # to ask the cluster.
    if not {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environ.keys():
        return None
    if find_spec("kubernetes") is None:
        text = "or pip install 'jax[k8s]' to find them; --processes 1 if it is alone"
        raise ValueError(f"a pod of a Kubernetes Job: {GIVE_ALL} (see launch/gke_gpu.yaml), {text}")
    return Environment("Kubernetes", {}, None, None)
