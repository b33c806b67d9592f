"""What of Pillow's behavior is a matter of the whole process, or of chance, made a matter of one
call.
"""

import contextlib
import functools
import io
import struct
import threading
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from PIL import Image, ImageFile

# What Pillow decodes by itself. Missing on purpose: EPS (runs Ghostscript), WMF, stubs for other
# programs, containers of containers.
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
    """Settings of Pillow, which hold for the whole process, while at least one thread needs them
    otherwise.
    """

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
    """Pillow's own limits out of the way; `images.check_pixels` stands in their place."""
    with contextlib.ExitStack() as stack:
        if any_size:
            stack.enter_context(_Raised.set(Image, "MAX_IMAGE_PIXELS", None))
        if truncated:
            stack.enter_context(_Raised.set(ImageFile, "LOAD_TRUNCATED_IMAGES", True))
        yield


@functools.cache
def readable() -> tuple[str, ...]:
    """Those of FORMATS that this build of Pillow can open."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def without_long_texts(file: BinaryIO) -> BinaryIO:
    """The file; of a PNG with texts or a color profile that Pillow refuses as too long, a copy in
    memory without these.
    """
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
    """Bytes of a text chunk when unpacked; more than LONGEST_TEXT are not counted."""
    packed = content.partition(b"\0")[2]
    if kind == b"iTXt" and packed[:1] == b"\1":
        packed = packed[2:].partition(b"\0")[2].partition(b"\0")[2]
    elif kind in (b"zTXt", b"iCCP"):
        packed = packed[1:]
    else:
        return len(content)
    with contextlib.suppress(zlib.error):  # Pillow says what is wrong with it
        return len(zlib.decompressobj().decompress(packed, LONGEST_TEXT + 1))
    return len(content)
