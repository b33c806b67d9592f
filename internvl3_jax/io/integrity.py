"""files.json: size and sha256 of every file of a directory, written last, to find damage.

    {"format": 2, "made_by": "internvl3_jax",
     "files": {"params/...": {"bytes": 123, "sha256": "..."}}}

In object storage (remote_files.py) the list has the storage's own checksums, which listings give:
"full" and "sizes" read no array there.
"""

import collections
import concurrent.futures
import hashlib
import json
import os
import pathlib
import stat
import time
from collections.abc import Callable, Iterator

from internvl3_jax.io import remote_files, strict_json
from internvl3_jax.io.remote_files import is_remote
from internvl3_jax.io.safe_files import OWN, FileError, open_regular, sync_directory
from internvl3_jax.io.terminal import one_line

FILES = "files.json"
MANIFEST = "internvl3_jax.json"  # of a checkpoint, and of what is exported from one
TRAINING = "training.json"  # of a step of a training run
FORMAT = 2
MADE_BY = "internvl3_jax"
LEVELS = ("full", "sizes", "none")  # of verification: all bytes, names and sizes, nothing
_MAX_DEPTH = 16  # of folders; a symbolic link to its own parent never ends
_THREADS = min(16, os.cpu_count() or 1)
# Seconds. A younger file may change again within the resolution of its time stamp.
_SETTLED = 2.0
# sha256 and checksum are "" where they are unknown.
_Entry = collections.namedtuple("_Entry", "bytes sha256 checksum", defaults=("", ""))

_seen: dict[str, tuple] = {}  # file -> stamp of the content that was hashed and correct


class Damaged(FileError):
    """A checkpoint whose files differ from what was written; the message names the first."""


def check_level(level: str) -> None:
    if level not in LEVELS:
        raise ValueError(f"verify is {level!r}; expected one of {', '.join(LEVELS)}")


def files_of(
    directory: pathlib.Path, depth: int = _MAX_DEPTH
) -> Iterator[tuple[str, os.stat_result]]:
    """Yields (path below the directory, status) of all files, following symbolic links.

    FileError if folders are nested too deep, as by a link to its own parent.
    """
    for entry in sorted(directory.iterdir()):
        try:
            status = entry.stat()
        except OSError as error:
            raise FileError(f"{one_line(str(entry))}: cannot be read ({error.strerror})") from error
        if not stat.S_ISDIR(status.st_mode):
            yield entry.name, status
        elif depth == 0:
            raise FileError(f"{one_line(str(entry))}: folders are nested too deep")
        else:
            for name, below in files_of(entry, depth - 1):
                yield f"{entry.name}/{name}", below


# --- writing -------------------------------------------------------------------------------------


def seal(directory: pathlib.Path) -> None:
    """Writes files.json, after every other file has reached the disk."""
    if is_remote(directory):
        objects = remote_files.objects(directory)
        listed = {
            name: _Entry(*known[:1], checksum=known[1])
            for name, known in objects.items()
            if name not in (FILES, OWN)
        }
        remote_files.write_bytes(directory / FILES, json.dumps(_values(listed), indent=1).encode())
        return
    names = [name for name, _ in files_of(directory) if name not in (FILES, OWN)]
    listed = dict(zip(names, _spread(lambda name: _sealed(directory / name), names), strict=True))
    for folder, _, _ in os.walk(directory):
        sync_directory(folder)
    with (directory / FILES).open("w", encoding="utf-8") as file:
        json.dump(_values(listed), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(directory)


def _values(listed: dict[str, _Entry]) -> dict:
    files = {
        name: {key: value for key, value in entry._asdict().items() if value != ""}
        for name, entry in listed.items()
    }
    return {"format": FORMAT, "made_by": MADE_BY, "files": files}


def publish(directory: pathlib.Path, remote) -> None:
    """Uploads a sealed local directory. The copy is complete with files.json, written last."""
    listed = listed_files(directory)
    remote_files.upload(directory, remote, list(listed))
    stored = remote_files.objects(remote)
    for name, entry in listed.items():
        size, checksum = stored.get(name, (None, ""))
        if size != entry.bytes:
            raise OSError(
                f"{remote / name}: {entry.bytes} bytes were uploaded and {size} are stored; try "
                "again"
            )
        listed[name] = entry._replace(checksum=checksum)
    remote_files.write_bytes(remote / FILES, json.dumps(_values(listed), indent=1).encode())
    remote_files.remove(remote, [OWN])


def _sealed(path: pathlib.Path) -> _Entry:
    with open_regular(path) as file:
        entry = _Entry(
            os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
        )
        os.fsync(file.fileno())
    return entry


def _spread(function: Callable, items: list) -> list:
    # hashlib releases the GIL while it hashes.
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(function, items))


# --- reading -------------------------------------------------------------------------------------


def listed_files(directory: pathlib.Path) -> dict[str, _Entry] | None:
    """Returns the entries of files.json, None if there is none; JsonError if it is damaged."""
    path = directory / FILES
    if not (remote_files.exists(path) if is_remote(path) else os.path.lexists(path)):
        return None
    values = strict_json.read_object(path)
    values.get("format", int, low=FORMAT, high=FORMAT)
    values.get("made_by", str)
    files = values.object("files")
    entries = {}
    for name in files.values:
        entry = files.object(name)
        sha256, checksum = (
            entry.get("sha256", str, "", low=64, high=64),
            entry.get("checksum", str, ""),
        )
        if not sha256 and not checksum:
            raise strict_json.JsonError(f"{entry.where} has neither sha256 nor checksum")
        entries[name] = _Entry(entry.get("bytes", int, low=0), sha256, checksum)
    return entries


def damage(
    directory: pathlib.Path,
    level: str = "full",
    *,
    only: Callable[[str], bool] = lambda name: True,
    share: tuple[int, int] = (0, 1),
) -> str | None:
    """Says how a directory differs from its files.json, None if it does not or there is no list.

    The first file is named that is missing, differs in size or content, is not a regular file, or
    is in a listed folder without being listed.

    Args:
      directory: a local directory or an address.
      level: "full" compares all bytes, once per process; "sizes" names and sizes; "none" nothing.
      only: takes a file's name and returns whether to compare it.
      share: (index, count): hash only every count-th file, starting at the index.
    """
    check_level(level)
    if level == "none":
        return None
    if is_remote(directory):
        return _remote_damage(directory, level, only)
    try:
        listed, present = listed_files(directory), dict(files_of(directory))
    except strict_json.JsonError as error:
        return f"{FILES} is damaged ({error})"
    except (FileError, OSError) as error:
        return str(error)
    for name, status in present.items():
        if not stat.S_ISREG(status.st_mode) and only(name):
            return f"{name} is not a regular file"
    if listed is None:
        return None
    names = [name for name in listed if only(name)]
    for name in names:
        if name not in present:
            return f"{name} is missing"
        if present[name].st_size != listed[name].bytes:
            return f"{name} has {present[name].st_size} bytes, {listed[name].bytes} were written"
    hidden = (name for name in present if not any(part.startswith(".") for part in name.split("/")))
    folders = {name.split("/")[0] for name in listed if "/" in name}
    for name in hidden:
        if "/" in name and name.split("/")[0] in folders and name not in listed and only(name):
            return f"{name} was not written with it"
    return (
        _differing(
            directory, {name: listed[name] for name in names if listed[name].sha256}, present, share
        )
        if level == "full"
        else None
    )


def _remote_damage(directory, level: str, only: Callable[[str], bool]) -> str | None:
    try:
        listed = listed_files(directory)
    except strict_json.JsonError as error:
        return f"{FILES} is damaged ({error})"
    present = remote_files.objects(directory)
    for name, entry in (listed or {}).items():
        size, checksum = present.get(name, (None, ""))
        if size is None and only(name):
            return f"{name} is missing"
        if size != entry.bytes and only(name):
            return f"{name} has {size} bytes, {entry.bytes} were written"
        same_kind = entry.checksum.partition(":")[0] == checksum.partition(":")[0]
        if (
            level == "full"
            and only(name)
            and entry.checksum
            and same_kind
            and entry.checksum != checksum
        ):
            return f"{name} has other content than was written (its checksum differs)"
    return None


def _differing(
    directory: pathlib.Path, listed: dict[str, _Entry], present: dict, share: tuple[int, int]
) -> str | None:
    index, count = share
    mine = sorted(listed, key=lambda name: (-listed[name].bytes, name))[index::count]
    wrong = _spread(lambda name: _wrong(directory / name, listed[name].sha256, present[name]), mine)
    return next((f"{name} {text}" for name, text in zip(mine, wrong, strict=True) if text), None)


def _wrong(path: pathlib.Path, sha256: str, status: os.stat_result) -> str | None:
    stamp = (sha256, status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
    if _seen.get(str(path)) == stamp:
        return None
    try:
        with open_regular(path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (FileError, OSError) as error:
        return f"cannot be read ({error})"
    if digest != sha256:
        return "has other content than was written (its sha256 differs)"
    if time.time() - max(status.st_mtime, status.st_ctime) > _SETTLED:
        _seen[str(path)] = stamp
    return None


def stamp(directory: pathlib.Path) -> str:
    """Returns a text that is the same in two processes if they see the same files, not copies.

    For local directories.
    """
    lines = [
        f"{name} {status.st_size} {status.st_ino} {status.st_mtime_ns}"
        for name, status in files_of(directory)
    ]
    return "\n".join(lines)


def unlisted(directory: pathlib.Path) -> list[str] | None:
    """Returns the files that were not written with a directory, None if it has no readable list."""
    try:
        listed = listed_files(directory)
    except FileError:
        return None
    present = (
        remote_files.objects(directory)
        if is_remote(directory)
        else [name for name, _ in files_of(directory)]
    )
    return (
        None if listed is None else [name for name in present if name not in {*listed, FILES, OWN}]
    )
