"""Reads the files of a downloaded model directory, or says what is there instead.

A failed download may leave a Git LFS pointer, a web page or a dangling link. Files that are copied
into exports must be in the directory itself: a link in an untrusted checkpoint must not export a
private file. Links into the hub's cache are allowed.
"""

import os
import pathlib
from typing import BinaryIO

from internvl3_jax.io import remote_files
from internvl3_jax.io.remote_files import is_remote
from internvl3_jax.io.safe_files import FileError, open_regular, read_bytes
from internvl3_jax.io.terminal import one_line

# Limit of one file other than the weights; the largest released tokenizer.json has 11 MB.
MAX_BYTES = 256 << 20
_POINTER = b"version https://git-lfs.github.com/spec/"
_PAGE = (b"<!doctype html", b"<html")


def exists(path: pathlib.Path) -> bool:
    """Returns whether there is an entry of this name, of any kind, even a dangling link."""
    if is_remote(path):
        return path.is_file()
    return os.path.lexists(path)


def open_file(path: pathlib.Path) -> BinaryIO:
    """Opens a file for reading in binary.

    FileError if it is missing, not a regular file, a Git LFS pointer or a web page.
    """
    name = one_line(str(path))
    if path.is_symlink() and not path.exists():
        target = one_line(os.readlink(path))
        raise FileError(
            f"{name}: links to {target}, which does not exist; the download is incomplete, "
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
    """Returns the bytes of a file of a model's directory.

    FileError as in `open_file`, or if it is a link out of its directory.
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
    """Returns whether a link stays in its directory or leads into the hub's cache."""
    real, home = pathlib.Path(os.path.realpath(path)), pathlib.Path(os.path.realpath(path.parent))
    return real.is_relative_to(home) or (
        real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")
    )
