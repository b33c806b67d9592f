"""Detects the processes of a run, from arguments or from the environment of the launcher.

`jax.distributed.initialize()` itself recognizes Open MPI, SLURM, Cloud TPU and Kubernetes Jobs.
This module only decides whether to call it, and with which arguments: it raises where it finds no
cluster, and some environments look like another one.
"""

import dataclasses
from collections.abc import Mapping
from importlib.util import find_spec

SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
TPU_HOSTS = ("TPU_PROCESS_ADDRESSES_PATH", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
GIVE_ALL = "give --coordinator HOST:PORT, --processes and --process"


@dataclasses.dataclass(frozen=True)
class Environment:
    """A run of several processes.

    Attributes:
      source: How it was found, for messages.
      arguments: For jax.distributed.initialize.
      processes: Number of processes; None where only jax can tell.
      process: Index of this one; None where only jax can tell.
    """

    source: str
    arguments: dict
    processes: int | None = None
    process: int | None = None


def find_environment(
    coordinator: str, processes: int, process: int, environ: Mapping[str, str]
) -> Environment | None:
    """Returns the environment of a run of several processes, or None for a single process.

    Args:
      coordinator: HOST:PORT of process 0, or "".
      processes: Number of processes, or -1. 1 alone is a single process in any environment.
      process: Index of this process, or -1.
      environ: Environment variables.

    Raises:
      ValueError: The arguments are incomplete, or contradict each other or the environment.
    """
    if processes == 1 and not coordinator and process in (-1, 0):
        return None

    # Without arguments, the launcher's variables decide.
    launcher = _launcher(environ)
    if not coordinator and processes == -1 and process == -1:
        return launcher if launcher is None or launcher.processes != 1 else None

    # With one argument, all three must be there and make sense.
    arguments = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in arguments.items() if value in ("", -1)]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} missing; {GIVE_ALL}, or none of them to find them from the "
            "environment"
        )
    if processes < 1 or not 0 <= process < processes:
        raise ValueError(
            f"--process is {process} and --processes {processes}; processes are numbered from 0 to "
            "--processes - 1"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(
            f"--coordinator is {coordinator!r}; it must be HOST:PORT of process 0, such as "
            "node1:8476"
        )
    for name, value, launched in (
        ("--processes", processes, launcher and launcher.processes),
        ("--process", process, launcher and launcher.process),
    ):
        if launched is not None and value != launched:
            raise ValueError(
                f"{name} is {value}, but {launcher.source} says {launched}; leave the three "
                "arguments out, or unset its variables"
            )
    jax_arguments = {
        "coordinator_address": coordinator,
        "num_processes": processes,
        "process_id": process,
        "cluster_detection_method": "deactivate",
    }
    return Environment("arguments", jax_arguments, processes, process)


def _launcher(environ: Mapping[str, str]) -> Environment | None:
    """Returns the environment that jax would detect, in its order of precedence.

    SLURM's srun may start mpirun, and both run on TPUs and in Kubernetes.
    """
    detectors = (_open_mpi, _slurm, _cloud_tpu, _kubernetes)
    return next(filter(None, (detect(environ) for detect in detectors)), None)


def _open_mpi(environ: Mapping[str, str]) -> Environment | None:
    if "OMPI_COMM_WORLD_SIZE" not in environ:
        return None
    size, rank = int(environ["OMPI_COMM_WORLD_SIZE"]), int(environ["OMPI_COMM_WORLD_RANK"])
    if "OMPI_MCA_orte_hnp_uri" in environ:
        return Environment("Open MPI", {"cluster_detection_method": "ompi"}, size, rank)
    # Since version 5 the environment no longer says where process 0 is.
    if size > 1 and find_spec("mpi4py") is None:
        raise ValueError(
            f"Open MPI 5 started {size} processes; install mpi4py so that they find each other, or "
            f"{GIVE_ALL}"
        )
    return Environment("Open MPI", {"cluster_detection_method": "mpi4py"}, size, rank)


def _slurm(environ: Mapping[str, str]) -> Environment | None:
    if not all(name in environ for name in SLURM):
        return None
    # In an interactive step only one process runs, and SLURM_NTASKS is that of the allocation.
    if environ.get("SLURM_STEP_NUM_TASKS") == "1":
        return Environment("SLURM", {}, 1, 0)
    arguments = {"cluster_detection_method": "slurm"}
    if (devices := slurm_devices(environ)) is not None:
        arguments["local_device_ids"] = devices
    return Environment(
        "SLURM", arguments, int(environ["SLURM_NTASKS"]), int(environ["SLURM_PROCID"])
    )


def slurm_devices(environ: Mapping[str, str]) -> list[int] | None:
    """Returns the GPUs of this task, as indices among those that it sees; None leaves it to jax.

    jax takes the GPU numbered SLURM_LOCALID. That is wrong where a task has several GPUs (all but
    one would be idle), or sees only its own (there may be no such number).
    """
    visible = len([name for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name])
    on_node = environ.get("SLURM_GPUS_ON_NODE", "")
    # "8(x2),4" lists the tasks of each node. The number here is known only if all are alike.
    tasks_per_node = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    tasks = tasks_per_node.partition("(")[0]
    if not (visible and on_node.isdecimal() and tasks.isdecimal() and "," not in tasks_per_node):
        return None
    if visible < int(on_node) or int(tasks) == 1:
        return list(range(visible))
    per_task, local = visible // int(tasks), int(environ["SLURM_LOCALID"])
    return list(range(local * per_task, local * per_task + per_task)) or None


def _cloud_tpu(environ: Mapping[str, str]) -> Environment | None:
    # jax sets this variable on import where it finds TPU chips. The others are also set to compile
    # for TPUs where there are none.
    if environ.get("TPU_ML_PLATFORM") != "JAX":
        return None
    if any(name in environ for name in TPU_HOSTS):
        hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES", ""))
        is_single = (
            "," not in hosts
            and TPU_HOSTS[0] not in environ
            and environ.get("MEGASCALE_NUM_SLICES", "1") == "1"
        )
        count, index = (1, 0) if is_single else (None, None)
        return Environment("GKE's TPU variables", {}, count, index)
    # On a TPU VM outside of GKE, jax asks Google's metadata server.
    return None if "TPU_SKIP_MDS_QUERY" in environ else Environment("Cloud TPU", {})


def _kubernetes(environ: Mapping[str, str]) -> Environment | None:
    # Only pods of indexed Jobs (which JobSet makes) have a number; the cluster is not asked about
    # other pods.
    if not {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environ.keys():
        return None
    if find_spec("kubernetes") is None:
        raise ValueError(
            f"a pod of a Kubernetes Job: {GIVE_ALL} (see launch/gke_gpu.yaml), or pip install "
            "'jax[k8s]' to find them; --processes 1 if it is alone"
        )
    return Environment("Kubernetes", {}, None, None)
