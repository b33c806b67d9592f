"""Pillow's settings that hold for the whole process, applied to single calls instead."""

import contextlib
import functools
import io
import struct
import threading
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from PIL import Image, ImageFile

# Formats that Pillow decodes by itself. EPS (which runs Ghostscript), WMF, stubs for other programs
# and nested containers are left out.
FORMATS = (
    *(
        "PNG",
        "JPEG",
        "MPO",
        "GIF",
        "WEBP",
        "BMP",
        "DIB",
        "TIFF",
        "PPM",
        "AVIF",
        "JPEG2000",
        "ICO",
        "CUR",
        "ICNS",
        "TGA",
        "PCX",
    ),
    *("PSD", "SGI", "SUN", "DDS", "QOI", "MSP", "XBM", "XPM", "IM"),
)

PNG = b"\x89PNG\r\n\x1a\n"
LONGEST_TEXT = 2**20  # Pillow's MAX_TEXT_CHUNK
LONGEST_TEXTS = 2**24  # of a file; well below Pillow's MAX_TEXT_MEMORY


class _Raised:
    """Changes settings of Pillow while at least one thread needs it; they hold for all threads."""

    lock = threading.Lock()
    users: dict = {}  # (module, name) -> [number of users, the value before]

    @classmethod
    @contextlib.contextmanager
    def set(cls, module, name: str, value) -> Iterator[None]:
        with cls.lock:
            entry = cls.users.setdefault((module, name), [0, getattr(module, name)])
            entry[0] += 1
            setattr(module, name, value)
        try:
            yield
        finally:
            with cls.lock:
                entry[0] -= 1
                if not entry[0]:
                    setattr(module, name, entry[1])
                    del cls.users[module, name]


@contextlib.contextmanager
def allows(any_size: bool, truncated: bool) -> Iterator[None]:
    """Lifts Pillow's limits, in whose place `images.check_pixels` is used.

    any_size: Lifts the limit of pixels. truncated: Accepts files whose end is missing.
    """
    with contextlib.ExitStack() as stack:
        if any_size:
            stack.enter_context(_Raised.set(Image, "MAX_IMAGE_PIXELS", None))
        if truncated:
            stack.enter_context(_Raised.set(ImageFile, "LOAD_TRUNCATED_IMAGES", True))
        yield


@functools.cache
def readable() -> tuple[str, ...]:
    """Returns the FORMATS that this build of Pillow can open."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def without_long_texts(file: BinaryIO) -> BinaryIO:
    """Returns the file, or a copy in memory of a PNG without texts that are too long for Pillow."""
    file.seek(0)
    if file.read(8) != PNG:
        return file
    long, place, total = [], 8, 0
    while len(header := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        if kind in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            size = (
                LONGEST_TEXT + 1
                if length > LONGEST_TEXT
                else _unpacked_size(kind, file.read(length))
            )
            if size > LONGEST_TEXT or total + size > LONGEST_TEXTS:
                long.append((place, place + 12 + length))
            else:
                total += size
        place += 12 + length
        file.seek(place)
    if not long:
        return file
    file.seek(0)
    data, pieces, kept = file.read(), [], 0
    for start, stop in long:
        pieces.append(data[kept:start])
        kept = stop
    return io.BytesIO(b"".join([*pieces, data[kept:]]))


def _unpacked_size(kind: bytes, content: bytes) -> int:
    """Returns the size of an unpacked text chunk, at most LONGEST_TEXT + 1."""
    packed = content.partition(b"\0")[2]
    if kind == b"iTXt" and packed[:1] == b"\1":
        packed = packed[2:].partition(b"\0")[2].partition(b"\0")[2]
    elif kind in (b"zTXt", b"iCCP"):
        packed = packed[1:]
    else:
        return len(content)
    with contextlib.suppress(zlib.error):  # Pillow raises the error
        return len(zlib.decompressobj().decompress(packed, LONGEST_TEXT + 1))
    return len(content)
