"""Checks of the path of an output before anything is written there, and of the files next to it."""

import os
import pathlib
from collections.abc import Sequence

from internvl3_jax.io.remote_files import is_remote
from internvl3_jax.io.safe_files import FileError
from internvl3_jax.io.terminal import one_line


def check_output_path(
    path: pathlib.Path, inputs: Sequence[str | os.PathLike], flag: str = "--output"
) -> None:
    """Checks that a file can be written at `path`.

    Args:
      path: the output.
      inputs: files that the program reads, which must not be overwritten.
      flag: the flag that the path was given with, for messages.

    Raises:
      FileError: the directory does not exist or is not writable, the path is not a regular file, or
        it is one of the inputs.
    """
    name = one_line(str(path))
    if is_remote(path):
        if any(str(source) == str(path) for source in inputs):
            raise FileError(f"{flag} {name}: is read as well; name another file")
        return
    if "\0" in str(path):
        raise FileError(f"{flag} {name}: a name cannot have a null character in it")
    folder = path.parent
    if not folder.is_dir():
        raise FileError(
            f"{flag} {name}: there is no folder {one_line(str(folder))}; make it, or name another "
            "place"
        )
    if path.is_dir():
        raise FileError(f"{flag} {name}: is a folder; name a file in it")
    if path.is_symlink() and not path.exists():
        raise FileError(f"{flag} {name}: is a link to nothing; remove it, or name another place")
    if path.exists() and not path.is_file():
        raise FileError(
            f"{flag} {name}: is not a regular file (a pipe, socket or device); name a regular file"
        )
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise FileError(f"{flag} {name}: cannot be written (no permission); name another place")
    for source in inputs:
        if os.path.exists(source) and path.exists() and os.path.samefile(source, path):
            raise FileError(
                f"{flag} {name}: is {one_line(os.fspath(source))}, which is read; name another file"
            )


def path_beside(path: pathlib.Path, ending: str) -> pathlib.Path:
    """Returns OUTPUT.ending. A symbolic link is resolved first, so that all names of one output
    share one lock.
    """
    target = path if is_remote(path) else pathlib.Path(os.path.realpath(path))
    return target.with_name(f"{target.name}.{ending}")
