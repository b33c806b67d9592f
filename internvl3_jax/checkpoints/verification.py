"""Checks before a checkpoint is used: files are as they were written, parameters are finite."""

import contextlib
import hashlib
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from internvl3_jax.checkpoints.fingerprint import FingerprintError
from internvl3_jax.io import integrity
from internvl3_jax.io.checkpoint_paths import (
    completed_steps,
    damage,
    is_checkpoint,
    latest_step,
)
from internvl3_jax.io.integrity import MANIFEST, Damaged
from internvl3_jax.io.remote_files import as_path, is_remote
from internvl3_jax.io.terminal import one_line
from internvl3_jax.parallel.multihost import assert_same_on_all_hosts


@contextlib.contextmanager
def undamaged(
    directory: pathlib.Path, verify: str, accept_fingerprint: bool, *, together: bool = False
):
    """Encloses the reading of everything but a checkpoint's arrays.

    Raises Damaged, before the block or at its end, if files are not those that were written. Of a
    released directory that was exported here only the weights are compared: the rest is free to
    change, within what the fingerprint allows.

    Args:
      verify: how closely files are compared; see `integrity.damage`.
      accept_fingerprint: whether files other than the weights may have changed.
      together: whether all processes call this, so that each can hash a share of the files.
    """

    def found(only) -> str | None:
        return damage_for(directory, verify, together, only)

    if not is_checkpoint(directory):
        if (directory / MANIFEST).is_file() and (wrong := found(_is_weights)):
            raise _damaged(directory, wrong)
        yield
        return
    if wrong := found(_is_weights):
        raise _damaged(directory, wrong)
    # A FingerprintError says more about a deliberate change than that a file differs.
    wrong = None if accept_fingerprint else found(lambda name: not _is_weights(name))
    try:
        yield
    except FingerprintError:
        raise
    except Exception as error:
        if wrong is None:
            raise
        reason = f" ({error})" if isinstance(error, ValueError | OSError) else ""
        raise _damaged(directory, wrong + reason) from error
    if wrong is not None:
        raise _damaged(directory, wrong)


def _is_weights(name: str) -> bool:
    return name.startswith(("params/", "opt_state/")) or name.endswith(
        (".safetensors", ".safetensors.index.json")
    )


def _damaged(directory: pathlib.Path, wrong: str) -> Damaged:
    return Damaged(
        f"{one_line(str(directory))} is damaged: {wrong}; restore it from a copy, or use another "
        "checkpoint"
    )


def damage_for(
    directory: pathlib.Path, verify: str, together: bool = False, only=lambda name: True
) -> str | None:
    """Returns `checkpoint_paths.damage`, or of a released directory `integrity.damage`.

    If all processes call it together, those that see the same files each hash a share of them, and
    all get an answer if one does.
    """
    look = damage if is_checkpoint(directory) else integrity.damage
    if not together or jax.process_count() == 1 or verify != "full" or is_remote(directory):
        return look(directory, verify, only=only)
    # Processes with the same stamp read the same disk; a copy on a local disk has other inodes.
    digest = hashlib.sha256(integrity.stamp(directory).encode()).digest()[:16]
    stamp = np.frombuffer(digest, np.uint32)
    stamps = np.asarray(multihost_utils.process_allgather(stamp))
    same = [process for process, other in enumerate(stamps) if (other == stamp).all()]
    share = (same.index(jax.process_index()), len(same))
    wrong = look(directory, verify, only=only, share=share)
    answers = np.asarray(multihost_utils.process_allgather(np.array([wrong is not None])))
    if wrong is None and answers.any():
        return f"damaged; see the message of process {int(answers.reshape(-1).argmax())}"
    return wrong


def agreed_step(run: str | os.PathLike, verify: str = "full") -> int | None:
    """Returns `latest_step`, the same in all processes, which call it together.

    ValueError if they see different steps, as they do if the run's directory is not shared.
    """
    steps = [
        step
        for step in completed_steps(run)
        if is_checkpoint(as_path(run) / "checkpoints" / str(step))
    ]
    # Their data may have been indexed until now, on one host faster than on another.
    seen = ", ".join(map(str, steps)) or "none"
    assert_same_on_all_hosts(0, {"complete steps": seen}, seconds=1800)

    def look(directory: pathlib.Path, verify: str) -> str | None:
        if int(directory.name) not in steps:
            return damage(directory, verify)
        return damage_for(directory, verify, together=True)

    return latest_step(run, verify, look)


def spans_all_processes(mesh: jax.sharding.Mesh | None) -> bool:
    """Returns whether every process has devices of the mesh, so that all load onto it."""
    if mesh is None:
        return False
    return len({device.process_index for device in mesh.devices.flat}) == jax.process_count()


def check_finite(leaves: dict[str, object], where: str) -> None:
    """Raises ValueError naming the parameters that hold NaN or infinite values, with their counts.

    All processes over which they are sharded call it together.
    """
    floating = {
        path: leaf for path, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    # Each process counts in its local shards, so that no compiled program spans processes.
    mine = jax.device_get([_nonfinite(leaf) for leaf in floating.values()])
    counts = np.array([int(sum(parts)) for parts in mine], np.int64)
    if any(
        isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in floating.values()
    ):
        # jax has no int64 by default
        halves = np.stack([counts >> 31, counts & (2**31 - 1)]).astype(np.int32)
        high, low = (
            np.asarray(multihost_utils.process_allgather(halves)).astype(np.int64).sum(axis=0)
        )
        counts = (high << 31) + low
    nonfinite = [(path, count) for path, count in zip(floating, counts, strict=True) if count]
    if nonfinite:
        named = ", ".join(
            f"{one_line(path)} ({count:,} of {leaves[path].size:,})"
            for path, count in nonfinite[:5]
        )
        more = f" and {len(nonfinite) - 5} more parameters" if len(nonfinite) > 5 else ""
        raise ValueError(
            f"{one_line(where)}: NaN or infinite values in {named}{more}; the training that made "
            "them failed. Use an earlier checkpoint, or allow_nonfinite to look at this one"
        )


def _nonfinite(leaf) -> list:
    """Returns the number of non-finite elements of each local shard, replicas left out."""
    if isinstance(leaf, np.ndarray):
        return [_counted(leaf)]
    shards = [shard.data for shard in leaf.addressable_shards if shard.replica_id == 0]
    # On a CPU, numpy is faster than compiling a program for each shape.
    return [
        _counted(np.asarray(part)) if part.device.platform == "cpu" else _count(part)
        for part in shards
    ]


def _counted(values: np.ndarray) -> int:
    return values.size - int(np.count_nonzero(np.isfinite(values)))


@jax.jit
def _count(part):
    return (~jnp.isfinite(part)).sum(dtype=jnp.uint32)
