"""The files of a model's directory, as people download them: the right bytes, or an error that says
what lies there instead.

A download may leave a Git LFS pointer, a web page or a link to a file that never came. Files that
travel into what is exported must lie in the directory, so that a link in a stranger's checkpoint
does not carry a private file along; the links of the hub's own cache are fine.
"""

import os
import pathlib
from typing import BinaryIO

from internvl3_jax.io import remote_files
from internvl3_jax.io.remote_files import is_remote
from internvl3_jax.io.safe_files import FileError, open_regular, read_bytes
from internvl3_jax.io.terminal import one_line

# of one file beside the weights; the largest tokenizer.json of a released model has 11 MB
MAX_BYTES = 256 << 20
_POINTER = b"version https://git-lfs.github.com/spec/"
_PAGE = (b"<!doctype html", b"<html")


def exists(path: pathlib.Path) -> bool:
    """Whether the directory has an entry of this name, be it a pipe, a directory or a link to
    nothing; reading it says so.
    """
    if is_remote(path):
        return path.is_file()
    return os.path.lexists(path)


def open_file(path: pathlib.Path) -> BinaryIO:
    """A file open for reading in binary. FileError if it is missing, no regular file, or stands for
    a file that was not downloaded.
    """
    name = one_line(str(path))
    if path.is_symlink() and not path.exists():
        target = one_line(os.readlink(path))
        raise FileError(
            f"{name}: links to {target}, which is not there; the download is incomplete, so "
            "download the model again"
        )
    file = open_regular(path)
    head = file.read(len(_POINTER)).lower()
    file.seek(0)
    why = None
    if head.startswith(_POINTER):
        why = "is a Git LFS pointer, not the file itself; run `git lfs pull` in its directory"
    elif head.lstrip().startswith(_PAGE):
        why = "is a web page, not the file itself; download the file again"
    if why:
        file.close()
        raise FileError(f"{name}: {why}")
    return file


def read_file(path: pathlib.Path, max_bytes: int = MAX_BYTES) -> bytes:
    """All bytes of a file that belongs to a model's directory. FileError as `open_file`, or if it
    links out of its directory.
    """
    if is_remote(path):
        return remote_files.read_bytes(path, max_bytes=max_bytes)
    open_file(path).close()
    if path.is_symlink() and not _belongs(path):
        target = one_line(os.path.realpath(path))
        raise FileError(
            f"{one_line(str(path))}: links out of its directory, to {target}; put a copy of that "
            "file in its place"
        )
    return read_bytes(path, max_bytes=max_bytes)


def _belongs(path: pathlib.Path) -> bool:
    """Whether a link stays within its directory, or leads to a file that the hub's client keeps for
    a model.
    """
    real, home = pathlib.Path(os.path.realpath(path)), pathlib.Path(os.path.realpath(path.parent))
    return real.is_relative_to(home) or (
        real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")
    )
