"""Files of the data: paths of this machine, and addresses (gs://, s3://, hf://) that fsspec opens.

fsspec and its drivers are imported only when an address is met.
"""

import functools
import glob
import hashlib
import os
import re
from collections.abc import Sequence

from internvl3_jax.safe_files import FileError


def is_remote(path: str) -> bool:
    return "://" in path


@functools.lru_cache(maxsize=64)
def _filesystem(root: str):
    try:
        import fsspec

        return fsspec.core.url_to_fs(root)[0]
    except ImportError as error:
        raise FileError(f"{root}: needs fsspec and the driver of its scheme ({error}): pip install fsspec gcsfs") from error
    except ValueError as error:  # an unknown scheme
        raise FileError(f"{root}: cannot be opened ({error})") from error


def filesystem(path: str):
    """fsspec's file system of an address; its methods take the whole address."""
    scheme, _, rest = path.partition("://")
    return _filesystem(f"{scheme}://{rest.partition('/')[0]}")


def exists(path: str) -> bool:
    return filesystem(path).exists(path) if is_remote(path) else os.path.exists(path)


def is_folder(path: str) -> bool:
    return filesystem(path).isdir(path) if is_remote(path) else os.path.isdir(path)


def list_folder(path: str) -> list[str]:
    """Names in a folder, those that begin with a dot left out; numbers in them sort by value: frame_9 before frame_10."""
    names = os.listdir(path) if not is_remote(path) else [os.path.basename(p) for p in filesystem(path).ls(path, detail=False)]
    return sorted((name for name in names if name and not name.startswith(".")), key=natural)


def natural(name: str) -> list[str | int]:
    return [int(part) if number % 2 else part for number, part in enumerate(re.split(r"(\d+)", name))]


def join(folder: str, name: str) -> str:
    """`name` inside `folder`, unless it is an absolute path or an address itself."""
    if is_remote(name) or not folder or os.path.isabs(name):
        return name
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def read_bytes(path: str) -> bytes:
    if not is_remote(path):
        with open_binary(path) as file:
            return file.read()
    return _remote(path, lambda: filesystem(path).cat_file(path))


def open_binary(path: str):
    """A binary file open for reading. FileError if there is none."""
    if is_remote(path):
        return _remote(path, lambda: filesystem(path).open(path, "rb"))
    try:
        return open(path, "rb")
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from error


def _remote(path: str, call):
    try:
        return call()
    except FileNotFoundError as error:
        raise FileError(f"{path}: no such file") from error
    except Exception as error:  # every driver has exceptions of its own
        raise FileError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error


def fingerprint(path: str) -> tuple[int, int]:
    """(bytes, a number that changes when the file is written again)."""
    if is_remote(path):
        info = _remote(path, lambda: filesystem(path).info(path))
        key = _remote(path, lambda: filesystem(path).ukey(path))
        return int(info["size"]), int(hashlib.sha256(str(key).encode()).hexdigest()[:15], 16)
    try:
        status = os.stat(path)
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from error
    return status.st_size, status.st_mtime_ns


def read_range(path: str, start: int, stop: int) -> bytes:
    """Bytes start..stop of a file. It is opened each time: sources may have more shards than a process may have open files."""
    if is_remote(path):
        data = _remote(path, lambda: filesystem(path).cat_file(path, start=start, end=stop))
    else:
        with open_binary(path) as file:
            file.seek(start)
            data = file.read(stop - start)
    if len(data) != stop - start:
        raise FileError(f"{path}: ends before byte {stop}; was it changed while in use?")
    return data


def resolve(name: str, base: str) -> str:
    """The path that a file in folder `base` means by `name`: relative to `base` or to the working directory.

    Raises:
      FileError: if nothing is there, or something in both places.
    """
    if is_remote(name) or os.path.isabs(name):
        candidates = [name]
    elif is_remote(base):
        candidates = [join(base, name), os.path.abspath(name)]
    else:
        candidates = list(dict.fromkeys(os.path.abspath(path) for path in (os.path.join(base, name), name)))
    found = [path for path in candidates if expand(path)]
    if not found:
        raise FileError(f"no such file: {' nor '.join(candidates)}")
    if len(found) > 1 and os.path.realpath(found[0]) != os.path.realpath(found[1]):
        raise FileError(f"{name!r} may be {found[0]} or {found[1]}; write the whole path")
    return found[0]


def expand(pattern: str) -> list[str]:
    """Existing files or folders of a path with {000..127} or {a,b} (all must exist) and * (as many as there are)."""
    paths = []
    for path in _braces(pattern):
        if "*" in path:
            found = filesystem(path).glob(path) if is_remote(path) else glob.glob(path)
            scheme = path.partition("://")[0] + "://" if is_remote(path) else ""
            paths += sorted((name if name.startswith(scheme) else scheme + name for name in found), key=natural)
        elif exists(path):
            paths.append(path)
        elif path != pattern and paths:
            raise FileError(f"{pattern}: {path} is missing")
    return paths


def _braces(pattern: str) -> Sequence[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        choices = [str(number).zfill(len(numbers[1])) for number in range(first, last + 1)]
    else:
        choices = match[1].split(",")
    return [text for choice in choices for text in _braces(pattern[: match.start()] + choice + pattern[match.end() :])]
