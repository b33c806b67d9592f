"""Atomic directories of checkpoints: one is complete, or it is not there."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterable

import jax
import numpy as np
from jax.experimental import multihost_utils

from internvl3_jax.io import remote_files
from internvl3_jax.io.checkpoint_paths import damage
from internvl3_jax.io.integrity import FILES, publish, seal
from internvl3_jax.io.remote_files import is_remote
from internvl3_jax.io.replaceable import check_replaceable
from internvl3_jax.io.safe_files import mark_own
from internvl3_jax.io.unfinished import (
    InPlace,
    Unfinished,
    absolute,
    clean,
    set_aside,
)


@contextlib.contextmanager
def new_directory(
    directory: str | os.PathLike, overwrite: bool = False, sources: Iterable[str | os.PathLike] = ()
):
    """Yields an empty directory to fill, which becomes `directory` if the block succeeds.

    It is removed if the block fails. All processes enter the block; the first creates and moves.

    Args:
      directory: local path or address of the new directory.
      overwrite: replace an existing directory that this program wrote and that holds nothing else.
      sources: directories that are read and must not be replaced.

    Raises:
      FileExistsError: something is there, and may not be replaced.
      InUse: another process is filling the same directory.
    """
    final = absolute(directory)
    if is_remote(final):
        with _new_remote(final, overwrite, sources) as filled:
            yield filled
        return
    unfinished = start_directory(final, overwrite, sources)
    try:
        yield unfinished.path
        seal_directory(unfinished)
        commit_directory(unfinished, overwrite)
    except BaseException:
        unfinished.abandon()
        raise


@contextlib.contextmanager
def _new_remote(final, overwrite: bool, sources: Iterable[str | os.PathLike]):
    """Fills a directory on the local disk and uploads it; for a single process."""
    if jax.process_count() > 1:
        raise ValueError(f"{final}: only a single process can write a checkpoint to object storage")
    clean(final.parent, final.name)
    before = remote_files.objects(final)
    if before and not overwrite:
        raise FileExistsError(
            f"{final} exists; choose another place or allow overwriting (--overwrite)"
        )
    if before:
        check_replaceable(final, sources)
    with tempfile.TemporaryDirectory(prefix="internvl3_jax_") as local:
        filled = pathlib.Path(local) / "filled"
        filled.mkdir()
        mark_own(filled)
        yield filled
        seal(filled)
        unfinished = InPlace(final, True)
        try:
            remote_files.remove(final, [FILES, *(name for name in before if name != FILES)])
            publish(filled, final)
        except BaseException:
            unfinished.abandon()
            raise


def start_directory(
    final: pathlib.Path, overwrite: bool = False, sources: Iterable[str | os.PathLike] = ()
) -> Unfinished:
    """Creates an empty directory to fill, after removing remains of killed processes."""
    if jax.process_index() == 0:
        clean(final.parent, final.name)
    if os.path.lexists(final):
        if not overwrite:
            raise FileExistsError(
                f"{final} exists; choose another place or allow overwriting (--overwrite)"
            )
        check_replaceable(final, sources)
    return _create(final)


def start_step(final: pathlib.Path) -> Unfinished | InPlace:
    """Creates the directory of a training step.

    A damaged directory of the same step is renamed; an intact one raises FileExistsError.
    """
    if jax.process_index() == 0:
        clean(final.parent)
    # No process looks while the first one removes remains, and every process looks before the first
    # one renames what it finds.
    _barrier(f"clean {final.parent} for {final.name}")
    exists = bool(remote_files.objects(final)) if is_remote(final) else os.path.lexists(final)
    intact = exists and damage(final) is None
    _barrier(f"look at {final}")
    if intact:
        raise FileExistsError(f"{final} exists and is intact; it is not replaced")
    if exists and jax.process_index() == 0:
        set_aside(final)
    return _create(final)


def _create(final: pathlib.Path) -> Unfinished | InPlace:
    token = np.frombuffer(os.urandom(4), np.uint8)
    if jax.process_count() > 1:
        token = np.asarray(multihost_utils.broadcast_one_to_all(token))
    if is_remote(final):
        unfinished = InPlace(final, jax.process_index() == 0)
        _barrier(f"start {final}")
        return unfinished
    unfinished = Unfinished(final, token.tobytes().hex(), jax.process_index() == 0)
    _barrier(f"start {final}")
    return unfinished


def seal_directory(unfinished: Unfinished) -> None:
    """Waits until all processes have filled it, and writes the list of files with hashes."""
    _barrier(f"filled {unfinished.final}")
    if unfinished.creates:
        seal(unfinished.path)


def commit_directory(unfinished: Unfinished, overwrite: bool = False) -> None:
    """Moves the filled directory to its final place; all processes wait for it."""
    _barrier(f"sealed {unfinished.final}")
    unfinished.commit(overwrite)
    _barrier(f"committed {unfinished.final}")


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
