"""Local files, handled so that nothing is lost and nothing hangs.

`open_regular` and `read_bytes` refuse pipes, devices and files beyond a limit. `replace` writes a
file atomically. `Lock` lets one process at a time use a directory or file; the system releases it
when its holder ends in any way. `mark_own`, `is_own` and `remove_own` are the one rule of deletion:
a directory is deleted only if it holds the marker that this program put into it.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import secrets
import shutil
import socket
import stat
from collections.abc import Callable
from typing import BinaryIO

from internvl3_jax.io import remote_files
from internvl3_jax.io.file_errors import FileError, InUse
from internvl3_jax.io.lease import Lease, holder
from internvl3_jax.io.remote_files import is_remote
from internvl3_jax.io.terminal import one_line

# Marker in a directory that is being filled or about to be deleted.
OWN = ".internvl3_jax_unfinished"


# --- reading -------------------------------------------------------------------------------------


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Opens a regular file for reading in binary; FileError for anything else.

    It never waits for a pipe or device.
    """
    name = one_line(os.fspath(path))
    try:
        # Without O_NONBLOCK, open() waits for the writer of a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise FileError(f"{name}: cannot be read ({reason(error)})") from error
    kind = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(kind):
        os.close(descriptor)
        what = (
            "a directory" if stat.S_ISDIR(kind) else "not a regular file (a pipe, socket or device)"
        )
        raise FileError(f"{name}: is {what}; name a regular file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: str | os.PathLike, *, max_bytes: int) -> bytes:
    """Returns the bytes of a regular file or object; FileError if it has more than `max_bytes`."""
    if is_remote(path):
        return remote_files.read_bytes(path, max_bytes=max_bytes)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise FileError(
                f"{one_line(os.fspath(path))}: has {size:,} bytes; at most {max_bytes:,} are read"
            )
        return file.read(size)  # a larger number would be allocated


def reason(error: BaseException) -> str:
    """Returns the system's reason for an error, without the path, which the caller names."""
    return (
        (error.strerror if isinstance(error, OSError) else None)
        or str(error)
        or type(error).__name__
    )


# --- writing -------------------------------------------------------------------------------------


def replace(path: str | os.PathLike, content: bytes | str) -> None:
    """Writes a file atomically: a crash leaves the old content or the new. OSError names the file.

    A symbolic link stays, and its target is replaced. An existing file keeps its permissions.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    if is_remote(path):
        remote_files.forget(path)
        remote_files.write_bytes(path, data)
        return
    target = pathlib.Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            with contextlib.suppress(FileNotFoundError):
                os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, f"cannot be written ({reason(error)})", str(path)) from error
    sync_directory(target.parent)


def sync_directory(path: str | os.PathLike) -> None:
    """Makes renames in a directory survive a power cut, if the file system supports it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# --- one process at a time -----------------------------------------------------------------------


_HOLDER = b'{"host": '  # start of a lock's file, unless it is empty
_NO_LOCK = "is not a lock file of this program; move it away"


class Lock:
    """A lock that one process at a time holds on a file, which stays; a context manager.

    The system releases it when the process ends, also by kill -9, so a lock is never stale. The
    file names the holder.

    Args:
      path: the lock's file; its directory must exist.
      what: what errors say is in use.

    Raises:
      InUse: from `acquire` and `with`, naming the process and host that hold it.
      FileError: the path is a link, a directory, a pipe or a file with other content, which is left
        as it is.
    """

    def __init__(self, path: str | os.PathLike, what: str):
        self.path, self.what, self.file = pathlib.Path(path), what, None

    def acquire(self) -> None:
        name, flags = one_line(str(self.path)), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            # O_NOFOLLOW: a link would lock a file elsewhere. O_NONBLOCK: never wait for a pipe.
            descriptor = os.open(self.path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except OSError as error:
            if self.path.is_symlink() or self.path.is_dir():
                raise FileError(f"{name}: {_NO_LOCK}") from error
            raise OSError(
                error.errno, f"cannot be locked ({reason(error)})", str(self.path)
            ) from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise FileError(f"{name}: {_NO_LOCK}")
        file = open(descriptor, "r+b", buffering=0)
        content = file.read(4096)
        if content and not content.startswith(_HOLDER[: len(content)]):
            file.close()
            raise FileError(f"{name}: {_NO_LOCK}")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            who = holder(content)
            file.close()
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise OSError(
                    error.errno, f"cannot be locked ({reason(error)})", str(self.path)
                ) from error
            raise InUse(
                f"{self.what} is in use by another process{who}; wait for it or end it, or use "
                "another place"
            ) from error
        try:
            file.seek(0)
            file.truncate()
            file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid()}).encode())
        except OSError as error:
            file.close()
            raise OSError(
                error.errno, f"cannot be written ({reason(error)})", str(self.path)
            ) from error
        self.file = file

    def release(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def __enter__(self) -> "Lock":
        self.acquire()
        return self

    def __exit__(self, *exception) -> None:
        self.release()


def lock_at(
    path: str | os.PathLike, what: str, note: Callable[[str], None] = lambda text: None
) -> "Lock | Lease":
    """Returns a `Lock` or, for an address, a `Lease`, which calls `note` before waiting."""
    return Lease(path, what, note) if is_remote(path) else Lock(path, what)


# --- deleting ------------------------------------------------------------------------------------


def mark_own(directory: str | os.PathLike) -> None:
    """Marks a directory as created by this program, so that it may be deleted."""
    (pathlib.Path(directory) / OWN).write_bytes(b"")


def is_own(directory: str | os.PathLike) -> bool:
    """Returns whether a directory has the marker and is not a symbolic link."""
    path = pathlib.Path(directory)
    return path.is_dir() and not path.is_symlink() and (path / OWN).is_file()


def remove_own(directory: str | os.PathLike) -> bool:
    """Deletes a directory that has the marker; returns False for any other and leaves it."""
    if not is_own(directory):
        return False
    marker = pathlib.Path(directory) / OWN
    # The marker goes last, so that an interrupted deletion can be continued.
    for entry in list(os.scandir(directory)):
        if entry.name == OWN:
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)
    marker.unlink()
    os.rmdir(directory)
    return True
