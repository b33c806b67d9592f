"""Reads the members of an uncompressed tar archive within limits.

Sizes in an archive are not trusted: a sparse member of 3 kB may claim 40 GB, and a header 32 TB.
Nothing is read that does not fit into the file, and no name or link of a member is followed.
"""

import dataclasses
import functools
import tarfile
from collections.abc import Callable, Iterator

from internvl3_jax.data.sources.files import FileError
from internvl3_jax.io.terminal import excerpt, one_line

MAX_HEADER = 1 << 20  # bytes of a long name or of further fields


class TarError(FileError):
    """An archive that cannot be read, or that claims sizes which it does not have."""


@dataclasses.dataclass(frozen=True)
class Member:
    """A regular file in an archive."""

    name: str
    size: int  # bytes of its content
    start: int  # where its headers begin in the archive
    end: int  # where its content and padding end
    read: Callable[[], bytes]  # returns its content; valid until the next member


def members(file, where: str, max_bytes: int, *, has_end: bool = True) -> Iterator[Member]:
    """Yields the regular files of an archive, in order; folders are skipped.

    Args:
      file: Open for reading in binary, and seekable.
      where: What errors call it.
      max_bytes: Largest size of a member that is read.
      has_end: Whether the archive has its end mark, or is a part of one.

    Raises:
      TarError: The archive is damaged.
    """
    bounded = _Bounded(file, max(max_bytes, MAX_HEADER))
    where = one_line(where)
    try:
        with tarfile.open(fileobj=bounded, mode="r:") as archive:
            for member in archive:
                archive.members = []  # tarfile would keep every header that it has read
                _check(member, bounded.size, where)
                if member.isreg():
                    read = functools.partial(_read, archive, member, bounded.longest, where)
                    end = min(member.offset_data + _padded(member.size), bounded.size)
                    yield Member(member.name, member.size, member.offset, end, read)
            _check_end(bounded, archive.offset, where, has_end)
    except TarError:
        raise
    # Damaged fields make tarfile raise exceptions of many types.
    except (
        tarfile.TarError,
        ValueError,
        OverflowError,
        EOFError,
        IndexError,
        RecursionError,
    ) as error:
        raise TarError(
            f"{where}: is not an uncompressed tar archive, or is damaged ({one_line(str(error))})"
        ) from error


def _check(member: tarfile.TarInfo, size: int, where: str) -> None:
    name = excerpt(member.name)
    if member.issparse():
        raise TarError(f"{where}: {name} is a sparse file; write the archive without sparse files")
    if member.size < 0:
        raise TarError(f"{where}: {name} has the size {member.size:,}; the archive is damaged")
    if not member.isreg() and not member.isdir():
        raise TarError(
            f"{where}: {name} is a link, pipe or device; write the archive with the files "
            f"themselves (tar --dereference)"
        )
    if member.isreg() and member.offset_data + member.size > size:
        raise TarError(
            f"{where}: {name} claims {member.size:,} bytes, but the archive ends after {size:,}; "
            f"was it written or downloaded completely?"
        )


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo, longest: int, where: str) -> bytes:
    if member.size > longest:
        raise TarError(
            f"{where}: {excerpt(member.name)} has {member.size:,} bytes; at most {longest:,} are "
            f"read"
        )
    return archive.extractfile(member).read()


def _check_end(file: "_Bounded", place: int, where: str, has_end: bool) -> None:
    """Checks the end mark: tarfile takes anything that is not a header for the end."""
    file.seek(place)
    mark = file.read(tarfile.BLOCKSIZE)
    if mark.strip(b"\0"):
        raise TarError(
            f"{where}: is damaged at byte {place:,}: no header and no end; rows after it would "
            f"be lost"
        )
    if has_end and len(mark) < tarfile.BLOCKSIZE:
        raise TarError(
            f"{where}: ends without an end mark; was it written or downloaded completely?"
        )
    while rest := file.read(MAX_HEADER):
        if rest.strip(b"\0"):
            raise TarError(
                f"{where}: has more after its end; archives must not be joined, name both instead"
            )


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


class _Bounded:
    """A file that returns at most `longest` bytes per read, and never claims more."""

    def __init__(self, file, longest: int):
        self.file, self.longest = file, longest
        self.size = file.seek(0, 2)
        file.seek(0)

    def read(self, count: int = -1) -> bytes:
        if count < 0 or count > self.longest:
            raise tarfile.ReadError(
                f"a part claims {count:,} bytes; at most {self.longest:,} are read"
            )
        return self.file.read(min(count, max(0, self.size - self.file.tell())))

    def seek(self, place: int, whence: int = 0) -> int:
        if place < 0 and whence == 0:
            raise tarfile.ReadError("a part begins before the archive")
        return self.file.seek(place, whence)

    def tell(self) -> int:
        return self.file.tell()
