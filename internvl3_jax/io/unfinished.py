"""Directories that are created atomically and never replace what this program did not create.

A directory is filled as .NAME.RANDOM.partial next to its final place, with the marker of
safe_files.py in it, which its process keeps locked, and is then renamed. What killed processes left
is recognized by marker and lock only.
"""

import contextlib
import ctypes
import errno
import os
import pathlib
import re
import secrets
import shutil

from internvl3_jax.io import integrity, remote_files
from internvl3_jax.io.remote_files import as_path, is_remote
from internvl3_jax.io.replaceable import foreign_files
from internvl3_jax.io.safe_files import (
    OWN,
    InUse,
    Lock,
    is_own,
    mark_own,
    remove_own,
    sync_directory,
)
from internvl3_jax.io.terminal import one_line

_NOREPLACE, _EXCHANGE = 1, 2  # of renameat2
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


def absolute(path: str | os.PathLike) -> pathlib.Path:
    """Returns an absolute path or address, with ~ expanded; ValueError if it cannot hold arrays."""
    final = as_path(path)
    check_name(final)
    return final


def check_name(path: pathlib.Path) -> None:
    """Raises ValueError for a path with a null character, bytes that are not UTF-8, or a backslash.

    TensorStore takes a backslash for a slash.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{one_line(str(path))}: a path that is not UTF-8 cannot hold arrays; choose another "
            "name"
        ) from error
    if "\\" in str(path) or "\0" in str(path):
        raise ValueError(
            f"{one_line(str(path))}: a backslash or null character in a path is not supported; "
            "choose another name"
        )


class Unfinished:
    """A directory that is being filled at `path`, to become `final`.

    Args:
      final: where the directory is moved.
      name: the random part of its name, the same in all processes.
      creates: whether this process creates, moves and removes it.
    """

    def __init__(self, final: pathlib.Path, name: str, creates: bool):
        self.final, self.creates, self.lock = final, creates, None
        self.path = final.with_name(f".{final.name}.{name}.partial")
        self._made_parents = []
        if creates:
            self._made_parents = [folder for folder in final.parents if not folder.exists()]
            final.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir()
            # Lock the marker before it has the name by which others may delete it.
            new = self.path / f"{OWN}.new"
            try:
                self.lock = _locked(new)
                mark_own(self.path) if self.lock is None else os.rename(new, self.path / OWN)
            except OSError:  # the disk is full
                shutil.rmtree(self.path, ignore_errors=True)
                self._remove_parents()
                self._release()
                raise

    def abandon(self) -> None:
        """Removes it, and the parent folders created for it if nothing else is in them."""
        if self.creates:
            try:
                with contextlib.suppress(OSError):
                    remove_own(self.path)
                self._remove_parents()
            finally:
                self._release()

    def _remove_parents(self) -> None:
        with contextlib.suppress(OSError):
            for folder in self._made_parents:
                os.rmdir(folder)

    def commit(self, overwrite: bool) -> None:
        """Moves it to its final place, atomically if the system can.

        FileExistsError, and nothing is moved, if something is there and `overwrite` is false.
        """
        if not self.creates:
            return
        if not overwrite or not os.path.lexists(self.final):
            _move(self.path, self.final)
        elif not _renameat2(self.path, self.final, _EXCHANGE, mark_own):
            self._replace_in_two_steps()
        sync_directory(self.final.parent)
        (self.final / OWN).unlink(missing_ok=True)
        self._release()
        remove_own(self.path)  # after an exchange: the replaced directory

    def _replace_in_two_steps(self) -> None:
        old = self.final.with_name(f".{self.final.name}.{secrets.token_hex(4)}.replaced")
        mark_own(self.final)
        os.rename(self.final, old)
        os.rename(self.path, self.final)
        remove_own(old)

    def _release(self) -> None:
        if self.lock is not None:
            self.lock.release()
            self.lock = None


class InPlace:
    """A directory in object storage that is filled in its final place; like `Unfinished`.

    It has the marker until `integrity.seal` or `publish` has written files.json, its last object.
    """

    def __init__(self, final, creates: bool):
        self.final, self.path, self.creates = final, final, creates
        if creates:
            remote_files.write_bytes(final / OWN, b"")

    def abandon(self) -> None:
        """Removes it unless it is complete."""
        if self.creates:
            with contextlib.suppress(OSError):
                remove_incomplete(self.final)

    def commit(self, overwrite: bool) -> None:
        if self.creates:
            remote_files.remove(self.final, [OWN])


def remove_incomplete(directory) -> bool:
    """Deletes a directory in object storage that has the marker and no files.json.

    Returns False for any other, and leaves it.
    """
    present = remote_files.objects(directory)
    if OWN not in present or integrity.FILES in present:
        return False
    remote_files.remove(directory, [*(name for name in present if name != OWN), OWN])
    return True


def _locked(path: pathlib.Path) -> Lock | None:
    """Locks a marker; None if the file system has no locks, InUse if another process has it."""
    lock = Lock(path, f"{one_line(str(path.parent))}")
    try:
        lock.acquire()
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return lock


def _move(source: pathlib.Path, target: pathlib.Path) -> None:
    if _renameat2(source, target, _NOREPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(
            errno.EEXIST,
            "something else was created there meanwhile; choose another place",
            str(target),
        )
    os.rename(source, target)


def _renameat2(
    source: pathlib.Path, target: pathlib.Path, flags: int, before=lambda target: None
) -> bool:
    """Calls renameat2; returns False if the system or file system does not support it.

    `before` is called first if the system has the call.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    before(target)
    at = -100  # AT_FDCWD
    if call(at, os.fsencode(source), at, os.fsencode(target), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(
        code,
        f"cannot be moved to its place ({os.strerror(code)}); nothing was changed there",
        str(target),
    )


# --- remains of killed processes -----------------------------------------------------------------


def clean(parent: pathlib.Path, name: str | None = None) -> None:
    """Removes what killed processes left of the directory `name`, or of any step, in `parent`.

    InUse if the process is alive. A directory whose replacement was interrupted is moved back if
    its place is free. In object storage the caller's lease ensures that nobody else writes there.
    """
    if is_remote(parent):
        for entry in [parent / name] if name else remote_folders(parent):
            remove_incomplete(entry)
        return
    start = re.escape(name) if name else r"\d+"
    found = re.compile(rf"\.(?P<name>{start})\.[0-9a-f]{{8}}\.(?P<kind>partial|replaced)")
    for entry in sorted(parent.iterdir()) if parent.is_dir() else []:
        match = found.fullmatch(entry.name)
        if match is None:
            continue
        if not is_own(entry):
            # Killed before its marker was written or after it was removed, it is empty. rmdir
            # removes nothing else.
            with contextlib.suppress(OSError):
                os.rmdir(entry)
            continue
        if match["kind"] == "replaced" and not os.path.lexists(parent / match["name"]):
            (entry / OWN).unlink(missing_ok=True)
            os.rename(entry, parent / match["name"])
            continue
        _remove_dead(entry, parent / match["name"])


def remote_folders(parent) -> list:
    """Returns the folders directly below an address."""
    return [
        parent / name
        for name in sorted(
            {name.split("/")[0] for name in remote_files.objects(parent) if "/" in name}
        )
    ]


def _remove_dead(directory: pathlib.Path, final: pathlib.Path) -> None:
    marker = directory / OWN
    try:
        lock = _locked(marker)
    except InUse as error:
        raise InUse(str(error).replace(one_line(str(directory)), one_line(str(final)))) from error
    except OSError:  # another process is removing it as well
        return
    if lock is None:
        return
    try:
        # The lock counts only if the marker is still the file that was locked.
        if os.path.samestat(os.fstat(lock.file.fileno()), os.stat(marker)):
            remove_own(directory)
    except FileNotFoundError:
        pass
    finally:
        lock.release()


# --- finished directories ------------------------------------------------------------------------


def remove_finished(directory: pathlib.Path) -> str | None:
    """Deletes a directory that this program created.

    If it holds a file that was not written with it, nothing is deleted and that name is returned.
    """
    foreign = integrity.unlisted(directory) if is_remote(directory) else foreign_files(directory)
    if foreign is None or foreign:
        return foreign[0] if foreign else "no list of its files"
    if is_remote(directory):
        # With the marker and without files.json it no longer counts as a step.
        remote_files.write_bytes(directory / OWN, b"")
        remote_files.remove(directory, [integrity.FILES])
        remove_incomplete(directory)
        return None
    mark_own(directory)
    # Rename first: half deleted it would look like a damaged step.
    aside = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.partial")
    os.rename(directory, aside)
    remove_own(aside)
    return None


def set_aside(directory: pathlib.Path) -> None:
    """Renames a damaged directory to .NAME.RANDOM.damaged; it may be all that is left."""
    if is_remote(directory):
        raise FileExistsError(
            f"{directory} is damaged and cannot be renamed in object storage; move it away"
        )
    os.rename(directory, directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.damaged"))
