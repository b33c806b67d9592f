"""Videos and documents as a question names them, which of their frames and pages are shown, and
limits for them.
"""

import dataclasses
import math
import os
from collections.abc import Sequence

from internvl3_jax.config import ProcessorConfig
from internvl3_jax.data.media.documents import MAX_PAGES
from internvl3_jax.data.media.video_file import MOST_FRAMES
from internvl3_jax.io.terminal import excerpt

DEFAULT_FRAMES = 32  # of a video, as `load_video` of InternVL's quick start
MOST_SHOWN_FRAMES = 4096

Data = str | os.PathLike | bytes


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits above which a file is refused before it is decoded.

    Attributes:
      max_bytes: of a file.
      max_pixels: of an image, a frame or a rendered page; None: as of `open_image`, 0: no limit.
      max_pages: pages of a document that are shown.
      max_frames: frames of a video that are shown.
      max_video_frames: frames that a video has.
      max_seconds: duration of a video, if it says its frame rate.
      allow_truncated: use files whose end is missing.
    """

    max_bytes: int = 4 << 30
    max_pixels: int | None = None
    max_pages: int = MAX_PAGES
    max_frames: int = MOST_SHOWN_FRAMES
    max_video_frames: int = MOST_FRAMES
    max_seconds: float = math.inf
    allow_truncated: bool = False


LOCAL = Limits()  # for files that the user names
UNTRUSTED = Limits(
    max_bytes=64 << 20,
    max_pixels=16 << 20,
    max_pages=32,
    max_frames=128,
    max_video_frames=60 * 3600,
    max_seconds=3600,
)


@dataclasses.dataclass(frozen=True)
class Video:
    """A video, and which of its frames are shown.

    Attributes:
      source: path of a file, of a GIF or of a folder with one image per frame; or the bytes of a
        file, or an open file, which is read.
      num_frames: how many frames; a shorter video repeats some, as in InternVL's code. None: up to
        DEFAULT_FRAMES, fewer if the video has fewer or the prompt has no room for them.
      fps: as many frames as the video has seconds times this, at most `num_frames`.
      clip: (start, end) in seconds.
      tiles: largest number of tiles of a frame; 1 in InternVL's quick start and training.
      label: text before each frame, with {} for its number; None: as of the checkpoint.

    Raises:
      ValueError: a value is out of range.
    """

    source: Data
    num_frames: int | None = None
    fps: float | None = None
    clip: tuple[float, float] | None = None
    tiles: int = 1
    label: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "source", _check_source(self.source, "video"))
        for name in ("num_frames", "tiles"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not (whole and value >= 1) and not (name == "num_frames" and value is None):
                raise ValueError(f"{name} is {excerpt(value)}; it must be a number from 1")
        number = isinstance(self.fps, int | float) and not isinstance(self.fps, bool)
        if self.fps is not None and not (number and 0 < self.fps < math.inf):
            raise ValueError(f"fps is {excerpt(self.fps)}; it must be a number above 0")
        if self.label is not None:
            check_label(self.label)


@dataclasses.dataclass(frozen=True)
class Document:
    """A PDF, and which of its pages are shown.

    Attributes:
      source: path or bytes of the file, or an open file, which is read.
      pages: a text such as "2-5,8" or "3-", or a list of numbers from 1; None is all.
      dpi: resolution; None renders as many pixels as the tiles of the page have.

    Raises:
      ValueError: `dpi` is out of range.
    """

    source: Data
    pages: str | Sequence[int] | None = None
    dpi: float | None = None

    def __post_init__(self):
        object.__setattr__(self, "source", _check_source(self.source, "document"))
        number = isinstance(self.dpi, int | float) and not isinstance(self.dpi, bool)
        if self.dpi is not None and not (number and 1 <= self.dpi <= 4800):
            raise ValueError(f"dpi is {excerpt(self.dpi)}; it must be from 1 to 4800")


def _check_source(source, kind: str) -> Data:
    """Returns a path or bytes; reads an open file. ValueError if it is none of these."""
    if hasattr(source, "read"):
        source = source.read()
    if isinstance(source, bytearray | memoryview):
        source = bytes(source)
    if not isinstance(source, str | bytes | os.PathLike):
        more = "; give frames as images, with Frame-1: <image> and so on" * (kind == "video")
        raise ValueError(
            f"{kind} is of type {type(source).__name__}; give a path or the bytes of a file{more}"
        )
    return source


def check_label(label: str) -> None:
    """Raises ValueError unless a frame label has one {} and no <image>."""
    ProcessorConfig(frame_label=label)
