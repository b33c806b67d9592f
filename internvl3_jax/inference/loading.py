"""Checkpoints as infer.py opens them: from its flags, onto one device, several, or those of all
hosts.
"""

import os
import pathlib
from collections.abc import Sequence

import jax

from internvl3_jax.checkpoints.checkpoint import Checkpoint, load
from internvl3_jax.config import MeshConfig
from internvl3_jax.parallel import sharding


def check_cache(directory: str) -> None:
    """Raises ValueError unless compiled programs can be kept there; "" keeps none."""
    if directory:
        try:
            os.makedirs(os.path.expanduser(directory), exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"--compilation_cache {directory}: no such folder can be made ({error.strerror})"
            ) from error


def use_compilation_cache(directory: str) -> None:
    """Keeps compiled programs there; "" keeps none."""
    if directory:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def open_checkpoint(
    path: str, *, dtype: str | None, mesh, adapters: Sequence[str] = (), **options
) -> Checkpoint:
    """Loads a checkpoint, and adapters beside it. dtype: None is float32 on a CPU and what is
    stored elsewhere.
    """
    # A CPU multiplies bfloat16 vectors several times more slowly than float32 ones.
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else None)
    return load(path, dtype=dtype, mesh=mesh, adapters=named_adapters(adapters), **options)


def named_adapters(given: Sequence[str]) -> dict[str, str]:
    """Name -> directory of "NAME=DIR" or of "DIR", whose last part is its name. ValueError for a
    name that occurs twice.
    """
    pairs = [
        text.split("=", 1) if "=" in text else (pathlib.Path(text).name, text) for text in given
    ]
    for text, (name, directory) in zip(given, pairs, strict=True):
        if not name.strip() or not directory.strip():
            raise ValueError(
                f"--adapter is {text!r}; it must be a directory, or NAME=DIR with both"
            )
    names = [name for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two adapters are called {twice[0]!r}; name them: --adapter NAME=DIR")
    return dict(pairs)


def make_mesh(devices: int | None, fsdp: int, hosts: bool) -> jax.sharding.Mesh | None:
    """Of the first `devices` devices, or of all of all hosts; None for one. devices: None is one,
    or all with `hosts`.
    """
    here = len(jax.devices())
    count = devices or (here if hosts else 1)
    if fsdp < 1 or count % fsdp:
        raise ValueError(
            f"--fsdp is {fsdp}; it must be a positive number that divides the number of devices, {count}"
        )
    if count == 1:
        return None
    if count > here or (hosts and count < here):
        raise ValueError(
            f"--devices is {count}; there are {here}{', and all hosts take part' if hosts else ''}: {jax.devices()}"
        )
    return sharding.make_mesh(MeshConfig(fsdp=fsdp, tensor=count // fsdp), jax.devices()[:count])
