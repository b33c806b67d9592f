"""Object storage as directories: gs:// (Google Cloud Storage) and s3:// (Amazon S3 or compatible).

`as_path` turns what a user names into a `pathlib.Path` or, for an address, an `etils.epath.Path`
with the same methods. Writing an object is atomic. A directory cannot be renamed, so it is complete
with its last object, files.json. An object cannot be appended to: `append` buffers and rewrites the
object from time to time; `flush` rewrites it at once.

Credentials and endpoints are those of gcsfs and s3fs, and of TensorStore for arrays: the machine's
own on Google Cloud and AWS. STORAGE_EMULATOR_HOST with TENSORSTORE_GCS_HTTP_URL, or
AWS_ENDPOINT_URL, name another server.
"""

import atexit
import contextlib
import functools
import importlib.util
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator

from internvl3_jax.io.file_errors import FileError
from internvl3_jax.io.terminal import excerpt, one_line

SCHEMES = ("gs://", "s3://")
_DRIVERS = {"gs": "gcsfs", "s3": "s3fs"}
_TRIES = 4  # with a growing pause between them
_SMALL = 16 << 20  # bytes of a file that is uploaded from memory
_FLUSH_SECONDS = 5.0  # between two writes of an object that is appended to


def is_remote(path) -> bool:
    return str(path).startswith(SCHEMES)


def as_path(path: str | os.PathLike):
    """Returns an absolute local path with ~ expanded, or an address as epath.Path.

    Raises:
      FileError: the scheme is unknown, the bucket is missing, or a driver is not installed.
    """
    text = os.fspath(path)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    if "://" not in text:
        return pathlib.Path(os.path.expanduser(text)).absolute()
    if not text.startswith(SCHEMES):
        raise FileError(
            f"{one_line(text)}: is an address of an unknown kind; use {', '.join(SCHEMES)} or a "
            "local path"
        )
    bucket = text.partition("://")[2].partition("/")[0]
    if not bucket or "@" in bucket:  # credentials belong in the environment, not in logs
        raise FileError(
            f"{one_line(text.partition('://')[0])}://: names no bucket; write gs://BUCKET/PATH or "
            "s3://BUCKET/PATH"
        )
    check_driver(text)
    configured_fsspec()
    from etils import epath  # slow to import, and local paths do not need it

    return epath.Path(text.rstrip("/"))


def check_driver(path) -> None:
    """Raises FileError if the packages that an address needs are not installed."""
    driver = _DRIVERS[str(path).partition("://")[0]]
    if missing := [name for name in ("fsspec", driver) if importlib.util.find_spec(name) is None]:
        raise FileError(
            f"{one_line(str(path))}: needs {' and '.join(missing)}: pip install -e '.[storage]'"
        )


def filesystem(path):
    """Returns fsspec's file system of an address; its methods take the full address."""
    return _filesystem(str(path).partition("://")[0])


@functools.cache
def _filesystem(scheme: str):
    return configured_fsspec().filesystem(scheme)


def configured_fsspec():
    """Returns fsspec, set up for every library here that makes a file system with it.

    Other processes write to the same directories, so that listings are not cached: a checkpoint
    saved by another one would stay unseen. gcsfs asks for the kind of a bucket by gRPC at its
    import: only Google's servers answer, and with another one each call would wait for minutes.
    """
    is_emulated = "STORAGE_EMULATOR_HOST" in os.environ
    if is_emulated:
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec

    for scheme in _DRIVERS:
        fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    if is_emulated:
        fsspec.config.conf["gs"].setdefault("token", "anon")
    return fsspec


@contextlib.contextmanager
def named(path) -> Iterator[None]:
    """Turns any error of a driver into an OSError or FileNotFoundError that names the address."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: there is no such object") from error
    except FileError:
        raise
    except Exception as error:  # every driver has its own exceptions
        raise OSError(
            f"{path}: {type(error).__name__}: {excerpt(str(error), 200)[1:-1]}"
        ) from error


def _tried(path, call: Callable):
    """Calls a function, again after network and server errors; a missing object is final."""
    for left in reversed(range(_TRIES)):
        try:
            with named(path):
                return call()
        except OSError as error:
            final = isinstance(error.__cause__, FileNotFoundError | PermissionError)
            if final or not left:
                raise
            time.sleep(0.5 * 2 ** (_TRIES - 1 - left))
    raise AssertionError


def exists(path) -> bool:
    return _tried(path, lambda: filesystem(path).exists(str(path)))


def read_bytes(path, *, max_bytes: int) -> bytes:
    """Returns the bytes of an object; FileError if it is missing or has more than `max_bytes`."""

    def read() -> bytes:
        size = filesystem(path).info(str(path))["size"]
        if size > max_bytes:
            raise FileError(f"{path}: has {size:,} bytes; at most {max_bytes:,} are read")
        return filesystem(path).cat_file(str(path))

    try:
        return _tried(path, read)
    except FileNotFoundError as error:
        raise FileError(str(error)) from error


def write_bytes(path, data: bytes) -> None:
    """Writes an object atomically. OSError names the address."""
    # gcsfs ends a single-request upload with \n and the boundary. After a last byte \r a server
    # reads \r\n as the delimiter and drops the byte; a resumable upload has no delimiter.
    ends_in_delimiter = str(path).startswith("gs://") and data.endswith(b"\r")
    options = {"chunksize": len(data)} if ends_in_delimiter else {}
    _tried(path, lambda: filesystem(path).pipe_file(str(path), data, **options))


def objects(directory) -> dict[str, tuple[int, str]]:
    """Returns path below a directory -> (bytes, the storage's checksum), from listings only.

    The checksum is "crc32c:..." for gs:// and "etag:..." for s3://. It changes with the content.
    """
    root = filesystem(directory)._strip_protocol(str(directory)).rstrip("/") + "/"
    entries = _tried(directory, lambda: filesystem(directory).find(str(directory), detail=True))
    return {
        name.removeprefix(root): (int(info["size"]), _checksum(info))
        for name, info in sorted(entries.items())
        if info["type"] == "file" and not name.endswith("/")
    }


def _checksum(info: dict) -> str:
    for name in ("crc32c", "md5Hash", "ETag", "etag"):
        if info.get(name):
            return f"{name.lower()}:{str(info[name]).strip(chr(34))}"
    return ""


def upload(local: pathlib.Path, remote, names: list[str]) -> None:
    """Uploads files of a local directory, in this order."""
    for name in names:
        source, target = local / name, remote / name
        if source.stat().st_size < _SMALL:
            write_bytes(target, source.read_bytes())
        else:
            _tried(
                target,
                lambda source=source, target=target: filesystem(remote).put_file(
                    str(source), str(target)
                ),
            )


def remove(directory, names: list[str]) -> None:
    """Deletes objects below a directory, in this order; missing ones are ignored."""
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            _tried(
                directory / name,
                lambda name=name: filesystem(directory).rm_file(str(directory / name)),
            )


# --- appending to an object ----------------------------------------------------------------------


class _Growing:
    """An object that only this process appends to."""

    def __init__(self, path, content: bytes):
        self.path, self.content, self.written = path, bytearray(content), len(content)
        self.lock, self.flushed = threading.Lock(), 0.0

    def add(self, data: bytes) -> None:
        with self.lock:
            self.content += data
        if time.monotonic() - self.flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        with self.lock:
            if self.written < len(self.content):
                write_bytes(self.path, bytes(self.content))
                self.written, self.flushed = len(self.content), time.monotonic()


_growing: dict[str, _Growing] = {}


def append(path, data: bytes) -> None:
    """Appends to an object, which is created if it is missing.

    A kill may lose what was appended since the last `flush`.
    """
    known = _growing.get(str(path))
    if known is None:
        try:
            content = read_bytes(path, max_bytes=1 << 30)
        except FileError:
            content = b""
        known = _growing[str(path)] = _Growing(path, content)
    known.add(data)


def forget(path) -> None:
    """Drops the buffer of an object that is about to be replaced."""
    _growing.pop(str(path), None)


def flush() -> None:
    """Writes everything that was appended."""
    for growing in list(_growing.values()):
        growing.flush()


@atexit.register
def _flush_at_exit() -> None:
    with contextlib.suppress(OSError):  # the program has reported its own errors
        flush()
