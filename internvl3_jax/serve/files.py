"""Files below the folders that the server may read."""

import os
import pathlib
import stat
import urllib.parse
from collections.abc import Sequence

from internvl3_jax.io.safe_files import reason
from internvl3_jax.io.terminal import short_name
from internvl3_jax.serve.errors import ApiError

_OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
_BELOW = "the server reads files only below the folders of --allow_files"


def as_path(url: str) -> str:
    """Returns the path of file:///a%20b, file://localhost/a, or of a path as it is.

    Raises:
      ApiError: the address names another host.
    """
    if not url.lower().startswith("file:"):
        return url
    parts = urllib.parse.urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise ApiError(f"{short_name(url)}: names a host; write file:///PATH")
    return urllib.parse.unquote(parts.path)


def read_below(url: str, roots: Sequence[pathlib.Path], max_bytes: int) -> bytes:
    """Returns the content of a regular file below one of the roots.

    No symbolic link is followed below the root, whoever made it and when: each folder is opened
    from the one above it.

    Args:
      url: file:// address or path; a relative one starts at each of the roots.
      roots: absolute, links resolved.
      max_bytes: larger files are refused.

    Raises:
      ApiError: the file may not be read, or cannot be.
    """
    if not roots:
        raise ApiError(
            f"{short_name(url)}: this server reads no files; send a data: URL, or start it with "
            "--allow_files DIR",
            403,
            code="files_not_allowed",
        )
    path = as_path(url)
    if "\0" in path or not path:
        raise ApiError(f"{short_name(url)}: is not a path")
    # `..` is taken out of the text, not followed.
    plain = os.path.normpath(path)
    for root in roots:
        inner = os.path.normpath(os.path.join(root, plain))
        parts = pathlib.Path(inner).parts[len(root.parts) :]
        if not parts or not pathlib.Path(inner).is_relative_to(root):
            continue
        if os.path.isabs(plain) or len(roots) == 1 or os.path.lexists(inner):
            return _read(root, parts, url, max_bytes)
    raise ApiError(f"{short_name(url)}: {_BELOW}", 403, code="files_not_allowed")


def _read(root: pathlib.Path, parts: Sequence[str], url: str, max_bytes: int) -> bytes:
    descriptors = []
    try:
        descriptors.append(os.open(root, _OPEN | os.O_DIRECTORY))
        for part in parts[:-1]:
            descriptors.append(os.open(part, _OPEN | os.O_DIRECTORY, dir_fd=descriptors[-1]))
        # Without O_NONBLOCK, open() waits for the writer of a pipe.
        file = os.open(parts[-1], _OPEN | os.O_NONBLOCK, dir_fd=descriptors[-1])
        descriptors.append(file)
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise ApiError(f"{short_name(url)}: is not a regular file; name an image file")
        if status.st_size > max_bytes:
            raise ApiError(
                f"{short_name(url)}: has {status.st_size:,} bytes; this server reads "
                f"{max_bytes:,} (--max_body_mb)",
                413,
                code="file_too_large",
            )
        with os.fdopen(os.dup(file), "rb") as opened:
            return opened.read(max_bytes)
    except (OSError, ValueError) as error:
        # Also a symbolic link: ELOOP or ENOTDIR.
        raise ApiError(
            f"{short_name(url)}: cannot be read below --allow_files ({reason(error)}); check the "
            "path; symbolic links are not followed",
            404 if isinstance(error, FileNotFoundError) else 400,
            code="file_not_readable",
        ) from error
    finally:
        for descriptor in reversed(descriptors):
            os.close(descriptor)
