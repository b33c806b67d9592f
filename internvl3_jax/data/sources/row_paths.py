"""Where the images and videos of a row are, and which of them a row may name.

A row comes from whoever made the data. It names files under its source's root, and no others: not
with .., not with an absolute path or an address elsewhere. With the root "" absolute paths and
addresses are what rows are expected to have, unless the annotation itself comes from an address;
then they are addresses alone. "allow_outside_root": true in the meta JSON lifts all of this. A row
of a tar archive names files of its archive, whatever the meta JSON says. Symbolic links under a
root are followed: they are the owner's.
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
    """The path or address that a row means by `name`, or `name` itself for a file of its archive.

    archive: files that came with the row; None for a row of no archive.

    Raises:
      RowError: the row may not name it, or it is no path.
    """
    if archive is not None:
        if name in archive:
            return name
        held = one_line(", ".join(list(archive)[:10])) or "nothing else"
        raise RowError(
            f"{excerpt(name)}: is not in the row's sample of the archive, which holds {held}; rows of an archive name no other "
            f"files: put it there, or use a .jsonl annotation"
        )
    if name.startswith("data:"):
        raise RowError(
            f"{excerpt(name)}: holds the data itself; save it as a file and give its path"
        )
    if len(name) > MAX_PATH or "\0" in name:
        raise RowError(f"{excerpt(name)}: is no path (it has {len(name):,} characters)")
    whole = is_remote(name) or os.path.isabs(name)
    if (
        spec.outside == "yes"
        or (whole and spec.outside == "whole")
        or (spec.outside == "addresses" and _is_elsewhere(name))
    ):
        return name if whole else join(spec.root, name)
    path = join(spec.root, name)
    if is_remote(path):
        scheme, _, rest = path.partition("://")
        inside = (
            is_remote(spec.root)
            and _is_inside(f"{scheme}://", rest, spec.root)
            and "::" not in name
        )
    else:
        path = os.path.normpath(path)  # what is checked is what is opened
        inside = not is_remote(spec.root) and _is_inside("", path, os.path.abspath(spec.root))
    if not inside or (not whole and posixpath.normpath(name).split("/")[0] == ".."):
        raise RowError(
            f"{excerpt(name)}: is outside of the source's root, {one_line(spec.root)}; move it there, or set "
            f'"allow_outside_root": true for the source in the meta JSON'
        )
    return path


def _is_elsewhere(name: str) -> bool:
    """Whether it is an address, and of another machine."""
    return is_remote(name) and "::" not in name and name.partition("://")[0].lower() not in _LOCAL


def _is_inside(scheme: str, path: str, root: str) -> bool:
    folder = posixpath.normpath(root.removeprefix(scheme)) if root.startswith(scheme) else None
    if folder is None:
        return False
    path = posixpath.normpath(path)
    return path == folder or path.startswith(folder.rstrip("/") + "/")
