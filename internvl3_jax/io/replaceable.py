"""Decides what --overwrite may replace: directories of this program that hold nothing else."""

import os
import pathlib
from collections.abc import Iterable

from internvl3_jax.io import integrity
from internvl3_jax.io.integrity import TRAINING
from internvl3_jax.io.remote_files import is_remote
from internvl3_jax.io.safe_files import FileError, reason
from internvl3_jax.io.terminal import one_line


def check_replaceable(
    final: pathlib.Path, sources: Iterable[str | os.PathLike] = (), program: str = "--overwrite"
) -> None:
    """Raises FileExistsError unless this program created a directory and nothing else is in it.

    It must neither be, contain nor be inside one of `sources`, which are read.

    Args:
      final: the directory to replace.
      sources: directories that are read.
      program: what the message says does not replace it.
    """

    def refuse(why: str):
        return FileExistsError(
            f"{one_line(str(final))}: {why}; {program} does not replace it. Choose another place, "
            "or move it away"
        )

    if is_remote(final):
        foreign = integrity.unlisted(final)
        if foreign is None:
            raise refuse("was not made by this program")
        if foreign:
            raise refuse(f"holds {one_line(foreign[0])}, not written by this program")
        if any(str(final) == str(source) for source in sources):
            raise refuse("is what is read")
        return
    if final.is_symlink():
        raise refuse("is a symbolic link")
    if not final.is_dir():
        raise refuse("is not a directory")
    target = final.resolve()
    for source in sources:
        read = pathlib.Path(source).resolve()
        if target == read or target in read.parents or read in target.parents:
            raise refuse(f"is, contains or is inside {one_line(str(source))}, which is read")
    if (final / TRAINING).exists():
        raise refuse("is a step of a training run")
    try:
        foreign = foreign_files(final)
    except OSError as error:
        raise refuse(f"cannot be read ({reason(error)})") from error
    except FileError as error:
        raise refuse(str(error)) from error
    if foreign is None:
        raise refuse("was not made by this program")
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise refuse(f"holds {one_line(foreign[0])}{more}, not written by this program")


def foreign_files(directory: pathlib.Path) -> list[str] | None:
    """Returns the files that this program did not write, None if the directory is not its own."""
    names = [name for name, _ in integrity.files_of(directory)]
    if not names and not any(directory.iterdir()):
        return []
    return integrity.unlisted(directory)
