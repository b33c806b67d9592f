"""Reads data files: local paths, and addresses (gs://, s3://, hf://) that fsspec opens.

fsspec and its drivers are imported only for an address.
"""

import functools
import glob
import hashlib
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator

from internvl3_jax.io import safe_files
from internvl3_jax.io.remote_files import configured_fsspec
from internvl3_jax.io.safe_files import FileError, open_regular, reason
from internvl3_jax.io.terminal import excerpt, one_line

MAX_BYTES = 4 << 30  # of a file that is read at once
INDEX = ".index.npy"  # suffix of the indexes of row_index.py
MAX_FILES = 100_000  # named by the braces of one path
# Fields of fsspec's file information that change when a file is written again.
_CHANGING = (
    "etag",
    "ETag",
    "md5Hash",
    "crc32c",
    "generation",
    "VersionId",
    "LastModified",
    "Last-Modified",
    "mtime",
    "updated",
)


class ChangedError(FileError):
    """A file has changed since it was opened."""


def is_remote(path: str) -> bool:
    return "://" in path


@functools.lru_cache(maxsize=64)
def _filesystem(root: str):
    try:
        return configured_fsspec().core.url_to_fs(root)[0]
    except ImportError as error:
        raise FileError(
            f"{root}: needs the driver of its scheme ({error}); for gs:// and s3://: "
            f"pip install -e '.[storage]'"
        ) from error
    except ValueError as error:  # an unknown scheme
        raise FileError(f"{one_line(root)}: cannot be opened ({one_line(str(error))})") from error


def filesystem(path: str):
    """Returns fsspec's file system of an address; its methods take the full address."""
    scheme, _, rest = path.partition("://")
    return _filesystem(f"{scheme}://{rest.partition('/')[0]}")


def exists(path: str) -> bool:
    if is_remote(path):
        return _remote(path, lambda: filesystem(path).exists(path))
    try:
        return os.path.exists(path)
    except ValueError:  # a null character
        return False


def is_folder(path: str) -> bool:
    return filesystem(path).isdir(path) if is_remote(path) else os.path.isdir(path)


def list_folder(path: str) -> list[str]:
    """Returns the names in a folder that do not begin with a dot, frame_9 before frame_10."""
    names = (
        os.listdir(path)
        if not is_remote(path)
        else [os.path.basename(p) for p in filesystem(path).ls(path, detail=False)]
    )
    return sorted((name for name in names if name and not name.startswith(".")), key=natural)


def natural(name: str) -> list[str | int]:
    return [
        int(part) if number % 2 else part
        for number, part in enumerate(re.split(r"(\d{1,4000})", name))
    ]


def join(folder: str, name: str) -> str:
    """Returns `name` inside `folder`; an absolute path or address stays as it is."""
    if is_remote(name) or not folder or os.path.isabs(name):
        return name
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def folder_of(path: str) -> str:
    """Returns the folder of a file, absolute for a local one."""
    return path.rpartition("/")[0] if is_remote(path) else os.path.dirname(os.path.abspath(path))


def read_bytes(path: str, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Reads a file. FileError if it is missing, not regular, or larger than `max_bytes`."""
    if not is_remote(path):
        return safe_files.read_bytes(path, max_bytes=max_bytes)
    size = _remote(path, lambda: filesystem(path).size(path))
    if size is not None and size > max_bytes:
        raise FileError(f"{one_line(path)}: has {size:,} bytes; at most {max_bytes:,} are read")
    return _remote(path, lambda: filesystem(path).cat_file(path))


def open_binary(path: str):
    """Opens a binary file for reading. FileError if it is missing, a pipe, device or folder."""
    return (
        _remote(path, lambda: filesystem(path).open(path, "rb"))
        if is_remote(path)
        else open_regular(path)
    )


def _remote(path: str, call):
    try:
        return call()
    except FileError:
        raise
    except FileNotFoundError as error:
        raise FileError(f"{one_line(path)}: no such file") from error
    except Exception as error:  # each driver has its own exceptions
        raise FileError(
            f"{one_line(path)}: cannot be read ({type(error).__name__}: {one_line(str(error))})"
        ) from error


def fingerprint(path: str) -> tuple[int, int, int]:
    """Returns (bytes, time of writing, time of change) without reading the file.

    No program can set the time of change back. For an address, the second number is a hash of what
    its file system says of it and the third is 0.
    """
    if is_remote(path):
        info = _remote(path, lambda: filesystem(path).info(path))
        key = _remote(path, lambda: filesystem(path).ukey(path))
        fields = [str(key), *(f"{name}={info[name]}" for name in _CHANGING if name in info)]
        return (
            int(info["size"] or 0),
            int(hashlib.sha256("\n".join(fields).encode()).hexdigest()[:15], 16),
            0,
        )
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise FileError(f"{one_line(path)}: cannot be read ({reason(error)})") from error
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def read_range(path: str, start: int, stop: int) -> bytes:
    """Reads the bytes start..stop of a file.

    The file is opened each time: sources may have more shards than a process may have open files.
    """
    if is_remote(path):
        data = _remote(path, lambda: filesystem(path).cat_file(path, start=start, end=stop))
    else:
        with open_binary(path) as file:
            # Checked first, so that no memory is taken for bytes that are missing.
            if os.fstat(file.fileno()).st_size < stop:
                raise ChangedError(
                    f"{one_line(path)}: ends before byte {stop:,}; it was changed while in use"
                )
            file.seek(start)
            data = file.read(stop - start)
    if len(data) != stop - start:
        raise ChangedError(
            f"{one_line(path)}: ends before byte {stop:,}; it was changed while in use"
        )
    return data


def resolve(name: str, base: str, find: Callable[[str], list[str]] | None = None) -> str:
    """Returns the path or address that a file in folder `base` means by `name`.

    Patterns of `expand` stay in it.

    find: Returns the existing files of a path; by default `expand`.

    Raises:
      FileError: There is no such file; the error says if the working directory has one.
    """
    find = find or expand
    if name.startswith("~"):
        name = os.path.expanduser(name)
    path = name if is_remote(name) or os.path.isabs(name) else os.path.normpath(join(base, name))
    if is_remote(base) and path != name:
        path = join(base, name)
    if find(path):
        return path
    in_working_directory = os.path.abspath(name)
    if in_working_directory != path != name and find(in_working_directory):
        raise FileError(
            f"no such file: {one_line(path)}; found {one_line(in_working_directory)} in the "
            f"working directory, but paths are relative to the meta file: write the absolute path, "
            f"or the path from there"
        )
    raise FileError(f"no such file: {one_line(path)}")


def expand(pattern: str) -> list[str]:
    """Returns the existing files or folders of a path.

    {000..127} and {a,b} name files that must all exist; * matches those that exist.

    Raises:
      FileError: Some files of the braces are missing, or they name more than `MAX_FILES`.
    """
    if exists(pattern):  # braces and stars may be part of a name
        return [pattern]
    folder, rest = _split(pattern)
    paths, missing = [], ""
    for name in _braces(rest):
        if "*" in name:
            paths += _glob(folder, name)
        elif exists(folder + name):
            paths.append(folder + name)
        else:
            missing = missing or folder + name
    if paths and missing:
        raise FileError(f"{one_line(pattern)}: {one_line(missing)} is missing")
    return paths


def _split(pattern: str) -> tuple[str, str]:
    """Splits a pattern into existing folders, whose braces and stars are literal, and the rest."""
    if is_remote(pattern):
        scheme, _, rest = pattern.partition("://")
        return f"{scheme}://", rest
    parts = pattern.split("/")
    count = 0
    while count < len(parts) - 1 and exists("/".join(parts[: count + 1]) or "/"):
        count += 1
    folder = "".join(f"{part}/" for part in parts[:count])
    return folder, pattern[len(folder) :]


def _glob(folder: str, name: str) -> list[str]:
    # Only * is a wildcard, and only in the name.
    escaped = glob.escape(folder) + re.sub(r"([\[?])", r"[\1]", name)
    if not is_remote(folder):
        return sorted(
            (path for path in glob.glob(escaped) if not path.endswith(INDEX)), key=natural
        )
    address = folder + re.sub(r"([\[?])", r"[\1]", name)
    matches = _remote(address, lambda: filesystem(folder + name).glob(address))
    return sorted(
        (path if path.startswith(folder) else folder + path for path in matches), key=natural
    )


def _braces(pattern: str) -> Iterator[str]:
    """Yields the paths of a pattern's braces. FileError first if there are too many."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [_choices(part, pattern) for part in parts[1::2]]
    if math.prod(map(len, choices)) > MAX_FILES:
        raise FileError(
            f"{excerpt(pattern)}: its braces stand for more than {MAX_FILES:,} files; use * or "
            f"list fewer"
        )
    texts = parts[0::2]
    for chosen in itertools.product(*choices):
        yield texts[0] + "".join(
            choice + text for choice, text in zip(chosen, texts[1:], strict=True)
        )


def _choices(braces: str, pattern: str):
    numbers = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", braces)
    if not numbers:
        return braces.split(",")
    first, last = int(numbers[1]), int(numbers[2])
    if last - first >= MAX_FILES:
        raise FileError(
            f"{excerpt(pattern)}: {{{braces}}} stands for more than {MAX_FILES:,} files; use * or "
            f"list fewer"
        )
    if last < first:
        raise FileError(
            f"{excerpt(pattern)}: {{{braces}}} counts down; write the smaller number first"
        )
    return [str(number).zfill(len(numbers[1])) for number in range(first, last + 1)]
