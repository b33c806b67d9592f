"""Members of an uncompressed tar archive, read within limits.

Sizes in an archive are claims: a sparse member of 3 kB may say that it holds 40 GB, a header that
it is 32 TB long. Nothing is read that does not fit into the file, and no name or link of a member
is followed.
"""

import dataclasses
import functools
import tarfile
from collections.abc import Callable, Iterator

from internvl3_jax.data.sources.files import FileError
from internvl3_jax.io.terminal import excerpt, one_line

MAX_HEADER = 1 << 20  # bytes of a long name or of further fields


class TarError(FileError):
    """An archive that cannot be read, or claims sizes that it does not have."""


@dataclasses.dataclass(frozen=True)
class Member:
    """A regular file in an archive."""

    name: str
    size: int  # bytes of its content
    start: int  # of its headers in the archive
    end: int  # of its content and padding
    read: Callable[[], bytes]  # its content; only until the next member


def members(file, where: str, max_bytes: int, *, whole: bool = True) -> Iterator[Member]:
    """The regular files of an archive, in order; folders are passed over.

    Args:
      file: open for reading in binary, and seekable.
      where: what errors call it.
      max_bytes: of a member that is read.
      whole: an archive with its end mark; else a part of one.

    Raises:
      TarError: as its docstring says.
    """
    bounded = _Bounded(file, max(max_bytes, MAX_HEADER))
    where = one_line(where)
    try:
        with tarfile.open(fileobj=bounded, mode="r:") as archive:
            for member in archive:
                archive.members = []  # else it keeps every header it has seen
                _check(member, bounded.size, where)
                if member.isreg():
                    read = functools.partial(_read, archive, member, bounded.longest, where)
                    end = min(member.offset_data + _padded(member.size), bounded.size)
                    yield Member(member.name, member.size, member.offset, end, read)
            _check_end(bounded, archive.offset, where, whole)
    except TarError:
        raise
    # Damaged fields make tarfile raise nearly anything.
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
            f"{where}: {name} is a link, pipe or device; write the archive with the files themselves (tar --dereference)"
        )
    if member.isreg() and member.offset_data + member.size > size:
        raise TarError(
            f"{where}: {name} claims {member.size:,} bytes, but the archive ends after {size:,}; "
            f"was it written or downloaded completely?"
        )


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo, longest: int, where: str) -> bytes:
    if member.size > longest:
        raise TarError(
            f"{where}: {excerpt(member.name)} has {member.size:,} bytes; at most {longest:,} are read"
        )
    return archive.extractfile(member).read()


def _check_end(file: "_Bounded", place: int, where: str, whole: bool) -> None:
    """tarfile takes whatever is no header for the end."""
    file.seek(place)
    mark = file.read(tarfile.BLOCKSIZE)
    if mark.strip(b"\0"):
        raise TarError(
            f"{where}: is damaged at byte {place:,}: no header and no end; rows behind it would be lost"
        )
    if whole and len(mark) < tarfile.BLOCKSIZE:
        raise TarError(
            f"{where}: ends without an end mark; was it written or downloaded completely?"
        )
    while rest := file.read(MAX_HEADER):
        if rest.strip(b"\0"):
            raise TarError(
                f"{where}: has more behind its end; archives must not be joined, name both instead"
            )


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


class _Bounded:
    """A file that gives no more at once than is there, and than `longest` bytes."""

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
