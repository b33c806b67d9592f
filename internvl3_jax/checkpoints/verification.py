"""What is done before a checkpoint is used: its files are those that were written, its parameters
are finite.
"""

import contextlib
import hashlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from internvl3_jax.checkpoints.fingerprint import FingerprintError
from internvl3_jax.io import integrity
from internvl3_jax.io.checkpoint_paths import damage, is_checkpoint
from internvl3_jax.io.integrity import Damaged
from internvl3_jax.io.remote_files import is_remote
from internvl3_jax.io.terminal import one_line
from internvl3_jax.io.unfinished import MANIFEST


@contextlib.contextmanager
def undamaged(
    directory: pathlib.Path, verify: str, accept_fingerprint: bool, mesh: jax.sharding.Mesh | None
):
    """Encloses the reading of everything but a checkpoint's arrays. Damaged, before the block or at
    its end, if files are not those that were written.

    Of a released directory that was exported here only the weights are compared: the rest is free
    to change, within what the fingerprint allows. accept_fingerprint: the same for every directory.
    mesh: over which the arrays will be.
    """

    def found(only) -> str | None:
        return damage_for(directory, verify, mesh, only)

    if not is_checkpoint(directory):
        if (directory / MANIFEST).is_file() and (wrong := found(_is_weights)):
            raise _damaged(directory, wrong)
        yield
        return
    if wrong := found(_is_weights):
        raise _damaged(directory, wrong)
    # What the fingerprint says of a file that was changed on purpose is worth more than that it was
    # changed.
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
        f"{one_line(str(directory))} is damaged: {wrong}; bring it back from a copy, or use another checkpoint"
    )


def damage_for(
    directory: pathlib.Path, verify: str, mesh: jax.sharding.Mesh | None, only=lambda name: True
) -> str | None:
    """Returns `checkpoint_paths.damage`, or of a released directory `integrity.damage`.

    Over a mesh of all processes, those that see the same files each read a share of them, and all
    get an answer if one does.
    """
    look = damage if is_checkpoint(directory) else integrity.damage
    processes = 1 if mesh is None else len({device.process_index for device in mesh.devices.flat})
    if (
        processes < jax.process_count()
        or processes == 1
        or verify != "full"
        or is_remote(directory)
    ):
        return look(directory, verify, only=only)
    mine = np.frombuffer(
        hashlib.sha256(integrity.stamp(directory).encode()).digest()[:16], np.uint32
    )
    theirs = np.asarray(multihost_utils.process_allgather(mine))
    same = [process for process, stamp in enumerate(theirs) if (stamp == mine).all()]
    wrong = look(directory, verify, only=only, share=(same.index(jax.process_index()), len(same)))
    answers = np.asarray(multihost_utils.process_allgather(np.array([wrong is not None]))).reshape(
        -1
    )
    return wrong or (
        f"process {int(answers.argmax())} found damage there, and names it"
        if answers.any()
        else None
    )


def check_finite(leaves: dict[str, object], where: str) -> None:
    """ValueError naming the parameters, by path, that hold NaN or infinite values, and how many.
    All processes over which they are sharded call it together.
    """
    floating = {
        path: leaf for path, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    # Each process counts in its own shards: compiled programs over several processes could meet in
    # different orders.
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
    found = [(path, count) for path, count in zip(floating, counts, strict=True) if count]
    if found:
        named = ", ".join(
            f"{one_line(path)} ({count:,} of {leaves[path].size:,})" for path, count in found[:5]
        )
        more = f" and {len(found) - 5} more parameters" if len(found) > 5 else ""
        raise ValueError(
            f"{one_line(where)}: NaN or infinite values in {named}{more}; the training that made them failed. Use an earlier "
            f"checkpoint, or allow_nonfinite to look at this one"
        )


def _nonfinite(leaf) -> list:
    """How many elements are not finite, of each shard that is here and is no copy of another one."""
    if isinstance(leaf, np.ndarray):
        return [_counted(leaf)]
    shards = [shard.data for shard in leaf.addressable_shards if shard.replica_id == 0]
    # On a CPU numpy is quicker than to compile a program for each shape.
    return [
        _counted(np.asarray(part)) if part.device.platform == "cpu" else _count(part)
        for part in shards
    ]


def _counted(values: np.ndarray) -> int:
    return values.size - int(np.count_nonzero(np.isfinite(values)))


@jax.jit
def _count(part):
    return (~jnp.isfinite(part)).sum(dtype=jnp.uint32)
