"""Local files, handled so that nothing is lost and nothing hangs.

`open_regular` and `read_bytes` refuse pipes, devices and files beyond a limit. `replace` writes a
file so that a crash at any moment leaves the old or the new one. `Lock` lets one process at a time
work on a directory or file; the system releases it when its holder dies, however that dies.
`mark_own`, `is_own` and `remove_own` are the one rule of deletion: a directory is deleted only if
it holds the marker that was put into it when it was created here.
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

# marker in a directory that is being filled, or that is about to be deleted
OWN = ".internvl3_jax_unfinished"


# --- reading -------------------------------------------------------------------------------------


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """A regular file open for reading in binary. FileError if there is none; it never waits for a
    pipe or device.
    """
    name = one_line(os.fspath(path))
    try:
        # A FIFO without a writer blocks in open() unless it is asked not to.
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
    """All bytes of a regular file, or of an object (remote_files.py). FileError if it has more than
    `max_bytes`.
    """
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
    """Why the system refused something, without the path, which the caller names."""
    return (
        (error.strerror if isinstance(error, OSError) else None)
        or str(error)
        or type(error).__name__
    )


# --- writing -------------------------------------------------------------------------------------


def replace(path: str | os.PathLike, content: bytes | str) -> None:
    """Writes a file whole: a crash at any moment leaves the old one or the new one. OSError names
    the file.

    A symbolic link stays one, and what it names is replaced; the permissions of an existing file
    stay. Objects (remote_files.py) are written whole by themselves.
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
    """Makes renames in a directory survive a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# --- one process at a time -----------------------------------------------------------------------


_HOLDER = b'{"host": '  # how a lock's file begins, unless it is empty
_NO_LOCK = "is not a lock file of this program; move it away"


class Lock:
    """Held by one process at a time, in a file that stays; a context manager.

    The system releases it when the process ends, also by kill -9, so a lock is never stale. Its
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
        file = open(descriptor, "r+b")
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
        file.seek(0)
        file.truncate()
        file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid()}).encode())
        file.flush()
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
    """A `Lock`, or in object storage a `Lease`; note: of the lease."""
    return Lease(path, what, note) if is_remote(path) else Lock(path, what)


# --- deleting ------------------------------------------------------------------------------------


def mark_own(directory: str | os.PathLike) -> None:
    """Notes in a directory that it was made here and may be deleted."""
    (pathlib.Path(directory) / OWN).write_bytes(b"")


def is_own(directory: str | os.PathLike) -> bool:
    """Whether a directory has the marker, and is no symbolic link."""
    path = pathlib.Path(directory)
    return path.is_dir() and not path.is_symlink() and (path / OWN).is_file()


def remove_own(directory: str | os.PathLike) -> bool:
    """Deletes a directory that has the marker; False, and nothing happens, for any other."""
    if not is_own(directory):
        return False
    marker = pathlib.Path(directory) / OWN
    # The marker goes last, so that a deletion that was killed can be taken up again.
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
