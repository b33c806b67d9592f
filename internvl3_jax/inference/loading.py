"""Loads checkpoints for infer.py, onto one device, several, or those of all hosts."""

import contextlib
import os
import pathlib
import sys
from collections.abc import Sequence

import jax

from internvl3_jax.checkpoints.checkpoint import Checkpoint, load
from internvl3_jax.config import MeshConfig
from internvl3_jax.inference.answering import note
from internvl3_jax.inference.progress import progress_line
from internvl3_jax.parallel import multihost, sharding


def check_cache(directory: str) -> None:
    """Raises ValueError unless compiled programs can be kept in a directory; "" keeps none."""
    if directory:
        try:
            os.makedirs(os.path.expanduser(directory), exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"--compilation_cache {directory}: no such folder can be made ({error.strerror})"
            ) from error


def use_compilation_cache(directory: str) -> None:
    """Keeps compiled programs in a directory; "" keeps none."""
    if directory:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def join_hosts(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Joins the other hosts. All of them compute; only the first prints and writes."""
    with contextlib.redirect_stdout(sys.stderr):
        multihost.initialize(coordinator, processes, process)
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")


def open_checkpoint(
    path: str, *, dtype: str | None, mesh, adapters: Sequence[str] = (), **options
) -> Checkpoint:
    """Loads a checkpoint and its adapters, and says on stderr which step of a run it is.

    Args:
      dtype: None is float32 on a CPU, elsewhere as stored.
      adapters: "NAME=DIR" or "DIR".
      options: further ones of `load`.
    """
    # A CPU multiplies bfloat16 vectors several times more slowly than float32 ones.
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else None)
    with progress_line(f"loading {path}"):
        checkpoint = load(
            path, dtype=dtype, mesh=mesh, adapters=named_adapters(adapters), **options
        )
    if checkpoint.directory.parent.name == "checkpoints":
        note(f"step {checkpoint.directory.name} of {checkpoint.directory.parents[1]}")
    return checkpoint


def named_adapters(arguments: Sequence[str]) -> dict[str, str]:
    """Returns name -> directory of "NAME=DIR", or of "DIR", whose last component is the name.

    Raises:
      ValueError: an argument lacks one of them, or a name occurs twice.
    """
    pairs = [
        text.split("=", 1) if "=" in text else (pathlib.Path(text).name, text) for text in arguments
    ]
    for text, (name, directory) in zip(arguments, pairs, strict=True):
        if not name.strip() or not directory.strip():
            raise ValueError(
                f"--adapter is {text!r}; it must be a directory, or NAME=DIR with both"
            )
    names = [name for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two adapters are called {twice[0]!r}; name them: --adapter NAME=DIR")
    return dict(pairs)


def make_mesh(devices: int | None, fsdp: int, hosts: bool) -> jax.sharding.Mesh | None:
    """Returns a mesh of the first `devices` devices, or None for one device.

    Args:
      devices: None is one, or all devices of all hosts with `hosts`.
      fsdp: size of the FSDP axis; the rest is for tensor parallelism.

    Raises:
      ValueError: there are not that many devices, or `fsdp` does not divide them.
    """
    available = len(jax.devices())
    count = devices or (available if hosts else 1)
    if fsdp < 1 or count % fsdp:
        raise ValueError(
            f"--fsdp is {fsdp}; it must be a positive number that divides the number of devices, "
            f"{count}"
        )
    if count == 1:
        return None
    if count > available or (hosts and count < available):
        all_hosts = ", and all hosts take part" if hosts else ""
        raise ValueError(f"--devices is {count}; there are {available}{all_hosts}: {jax.devices()}")
    mesh = MeshConfig(fsdp=fsdp, tensor=count // fsdp)
    return sharding.make_mesh(mesh, jax.devices()[:count])
