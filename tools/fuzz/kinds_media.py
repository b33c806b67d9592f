"""Damaged images and videos."""

import random
import struct
import zlib
from collections.abc import Iterator

from tools.fuzz import programs
from tools.fuzz.case import Case, Kind
from tools.fuzz.kinds_data import DATA, DOCTOR, row_value
from tools.fuzz.kinds_models import corpus
from tools.fuzz.mutate import byte_changes, edit_bytes


def image_cases(rng: random.Random) -> Iterator[Case]:
    kind = "images"
    for path in sorted((corpus() / "images").iterdir()):
        file = f"images/{path.name}"
        # A bitmap cut at 99 %, or with a flipped pixel, may still be valid.
        for change, _, spoil in rng.sample(list(byte_changes(file, rng, "either", 4)), 9):
            certain = any(
                what in change
                for what in (
                    "empty",
                    "cut at 0.02",
                    "missing",
                    "pipe",
                    "directory",
                    "link",
                    "device",
                    "of noise",
                    "of text",
                    "of zeros",
                    "64 GB",
                )
            )
            expected = (
                "refuse"
                if certain and "last byte" not in change and "second half" not in change
                else "either"
            )
            yield Case(kind, change, expected, spoil, (path.name,))
    for name, content in _strange().items():
        for suffix in ("png", "jpg"):
            file = f"images/good.{suffix}"
            yield Case(
                kind,
                f"{name} as {suffix}",
                "either" if "text chunk" in name else "refuse",
                edit_bytes(file, lambda data, content=content: content),
                (f"good.{suffix}",),
            )


def _strange() -> dict[str, bytes]:
    """Returns files by name that must not be opened as images."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n(id) print\nshowpage\n%%EOF\n"
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    return {
        "EPS": eps,
        "EPS with a preview": b"\xc5\xd0\xd3\xc6"
        + struct.pack("<7I", 32, len(eps), 0, 0, 0, 0, 0xFFFF)
        + eps,
        "PDF": b"%PDF-1.4\n1 0 obj<<>>endobj\ntrailer<<>>\n%%EOF",
        "SVG": svg,
        "HTML": b"<!DOCTYPE html><html><body>404</body></html>",
        "pickle": b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x02id\x94\x85\x94R\x94.",
        "ZIP": b"PK\x03\x04" + bytes(100),
        "WMF": b"\xd7\xcd\xc6\x9a" + bytes(100),
        "bomb of 60,000 x 60,000": _png(60_000, 60_000, zlib.compress(bytes(10_000_000))),
        "bomb of 2^31 x 1": _png(2**31 - 1, 1, zlib.compress(bytes(1000))),
        "bomb in a text chunk": _png(
            8,
            8,
            zlib.compress(bytes(8 * 25)),
            _chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(3 << 30 >> 4)) * 16),
        ),
        "no width": _png(0, 10, zlib.compress(b"")),
        "GIF bomb": b"GIF89a"
        + struct.pack("<HH", 65535, 65535)
        + b"\0\0\0,"
        + struct.pack("<4H", 0, 0, 65535, 65535)
        + b"\0\2\x02\x4c\x01\0;",
        "BMP bomb": b"BM"
        + struct.pack("<IHHI", 100, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
    }


def _png(width: int, height: int, packed: bytes, *more: bytes) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(more)
        + _chunk(b"IDAT", packed)
        + _chunk(b"IEND", b"")
    )


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def video_cases(rng: random.Random) -> Iterator[Case]:
    kind, file = "video", "data/clip.mp4"
    if not (corpus() / file).exists():
        return
    for change, _, spoil in byte_changes(file, rng, "either", 12):
        certain = any(
            what in change
            for what in (
                "empty",
                "0.02",
                " missing",
                "pipe",
                "directory",
                "link",
                "device",
                "noise",
                "of text",
                "of zeros",
            )
        )
        expected = (
            "refuse"
            if certain and "last byte" not in change and "second half" not in change
            else "either"
        )
        yield Case(kind, change, expected, spoil, ("clip.mp4", "video"))
    for name, text in {
        "a playlist": "#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n",
        "a list of files": "ffconcat version 1.0\nfile /etc/passwd\n",
        "a description": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    }.items():
        yield Case(
            kind,
            name,
            "refuse",
            edit_bytes(file, lambda data, text=text: text.encode()),
            ("clip.mp4",),
        )
    for text in (
        "[]",
        "[1]",
        '"x"',
        "[0, 1e999]",
        "[NaN, 1]",
        "[-5, 1]",
        "[2, 1]",
        "[0, 1, 2]",
        '["0", "1"]',
        "[1e300, 1e301]",
        "true",
    ):
        yield Case(
            kind,
            f"clip = {text}",
            "refuse",
            row_value("data/video.jsonl", 0, ("clip",), text),
            ("clip", "video"),
        )
    for text in (
        "5",
        "[]",
        "{}",
        '"../clip.mp4"',
        '"/dev/zero"',
        '"http://127.0.0.1:9/x.mp4"',
        '"concat:clip.mp4|clip.mp4"',
        '""',
        "true",
    ):
        yield Case(
            kind,
            f"video = {text}",
            "either" if text in ("[]", '""') else "refuse",
            row_value("data/video.jsonl", 0, ("video",), text),
            ("video", "clip"),
        )


KINDS = [
    Kind("images", ("images",), programs.open_images, image_cases, programs.printed),
    Kind("video", DATA, cases=video_cases, **DOCTOR),
]
