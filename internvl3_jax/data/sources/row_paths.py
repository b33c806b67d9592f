"""Resolves the paths in a row, and refuses those that a row may not name.

Rows may come from someone else, so they name files under the root of their source and no others:
not with "..", and not with an absolute path or an address elsewhere. With the root "", rows may
have absolute paths and addresses, or addresses only if the annotation itself is at an address.
"allow_outside_root": true in the meta JSON lifts all of this. A row of a tar archive names files of
its archive only. Symbolic links under a root are followed: its owner made them.
"""

import os
import posixpath

from internvl3_jax.data.sources.files import is_remote, join
from internvl3_jax.data.sources.meta import SourceSpec
from internvl3_jax.data.sources.rows import RowError
from internvl3_jax.io.terminal import excerpt, one_line

MAX_PATH = 4096  # characters
_LOCAL = ("file", "local")  # schemes of this machine


def locate(name: str, spec: SourceSpec, archive: dict[str, bytes] | None) -> str:
    """Returns the path or address that a row means by `name`.

    archive: Files of the row's sample, by name; None if the row is not in an archive.

    Raises:
      RowError: The row may not name this file, or it is not a path.
    """
    if archive is not None:
        if name in archive:
            return name
        held = one_line(", ".join(list(archive)[:10])) or "nothing else"
        raise RowError(
            f"{excerpt(name)}: is not in the row's sample of the archive, which holds {held}; "
            f"rows of an archive name no other files: put it there, or use a .jsonl annotation"
        )
    if name.startswith("data:"):
        raise RowError(
            f"{excerpt(name)}: holds the data itself; save it as a file and give its path"
        )
    if len(name) > MAX_PATH or "\0" in name:
        raise RowError(f"{excerpt(name)}: is not a path (it has {len(name):,} characters)")
    is_absolute = is_remote(name) or os.path.isabs(name)
    if (
        spec.outside == "yes"
        or (is_absolute and spec.outside == "absolute")
        or (spec.outside == "addresses" and _is_elsewhere(name))
    ):
        return name if is_absolute else join(spec.root, name)
    path = join(spec.root, name)
    if is_remote(path):
        scheme, _, rest = path.partition("://")
        inside = (
            is_remote(spec.root)
            and _is_inside(f"{scheme}://", rest, spec.root)
            and "::" not in name
        )
    else:
        path = os.path.normpath(path)  # the path that is checked is the one that is opened
        inside = not is_remote(spec.root) and _is_inside("", path, os.path.abspath(spec.root))
    if not inside or (not is_absolute and posixpath.normpath(name).split("/")[0] == ".."):
        raise RowError(
            f"{excerpt(name)}: is outside of the source's root, {one_line(spec.root)}; move it "
            f'there, or set "allow_outside_root": true for the source in the meta JSON'
        )
    return path


def _is_elsewhere(name: str) -> bool:
    """Returns whether a path is an address of another machine."""
    return is_remote(name) and "::" not in name and name.partition("://")[0].lower() not in _LOCAL


def _is_inside(scheme: str, path: str, root: str) -> bool:
    folder = posixpath.normpath(root.removeprefix(scheme)) if root.startswith(scheme) else None
    if folder is None:
        return False
    path = posixpath.normpath(path)
    return path == folder or path.startswith(folder.rstrip("/") + "/")
