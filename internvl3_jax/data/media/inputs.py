"""The images, videos and documents of a question, opened within limits.

A video becomes one image per frame and a document one per page. Opening reads as much as is needed
to count them; `plan.py` then decides how many frames and tiles there is room for.

`video_images` and `document_images` do both for a caller that has no model at hand, such as a
server. With `UNTRUSTED` they are meant for data of strangers: sizes, pages, frames and seconds are
limited before anything is decoded. Decoders are C libraries: a process of its own is what bounds
their time and memory.
"""

import math
import os

from PIL import Image

from internvl3_jax.config import ProcessorConfig
from internvl3_jax.data.media.documents import PdfFile, page_pixels
from internvl3_jax.data.media.given import (
    DEFAULT_FRAMES,
    LOCAL,
    UNTRUSTED,
    Data,
    Document,
    Limits,
    Video,
)
from internvl3_jax.data.media.tiles import count_tiles, image_limit
from internvl3_jax.data.media.video import (
    Footage,
    VideoError,
    frame_range,
    middle_frames,
    probe,
    read_frames,
)
from internvl3_jax.data.text.media_tags import frame_lines, page_lines
from internvl3_jax.io.remote_files import is_remote
from internvl3_jax.io.safe_files import open_regular
from internvl3_jax.io.terminal import short_name


class OpenedImage:
    """An image of a question.

    Attributes:
      image: RGB; None if only its size counts.
      size: width and height in pixels.
    """

    def __init__(self, image: Image.Image | None = None, size: tuple[int, int] | None = None):
        self.image, self.size = image, size or image.size

    def tiles(self, processor: ProcessorConfig, max_tiles: int, frames: int) -> list[int]:
        """Returns the number of tiles of each image that this becomes, thumbnails included."""
        return [count_tiles(*self.size, processor, max_tiles)]

    def images(self, processor: ProcessorConfig, max_tiles: int, frames: int) -> list[Image.Image]:
        return [self.image]


class OpenedVideo:
    """A video whose frames were counted.

    Attributes:
      video: as it was asked for.
      footage: its number of frames and frames per second.
      frames: number of frames to show, if there is room.
      is_fixed: whether the caller gave that number.
    """

    def __init__(self, video: Video, limits: Limits = LOCAL):
        self.video, self.limits = video, limits
        source = video.source
        is_bytes = isinstance(source, bytes)
        self._source = source if is_bytes else os.path.expanduser(os.fspath(source))
        ending = ".gif" if is_bytes and self._source[:4] == b"GIF8" else ""
        self.name = f"video of {len(source)} bytes{ending}" if is_bytes else self._source
        _check_bytes(self._source, self.name, limits.max_bytes)
        self.footage = probe(self._source, self.name, **self._read_limits())
        seconds = self.footage.total / self.footage.fps if self.footage.fps else 0
        if seconds > limits.max_seconds:
            raise VideoError(
                f"{short_name(self.name)}: {seconds:,.0f} s are more than "
                f"{limits.max_seconds:,.0f}; cut it into parts"
            )
        try:
            self.frames, self.is_fixed = self._count()
            frame_range(self.footage, video.clip)
        except VideoError as error:
            raise VideoError(f"{short_name(self.name)}: {error}") from error
        if self.frames > limits.max_frames:
            raise VideoError(
                f"{short_name(self.name)}: {self.frames:,} frames are more than "
                f"{limits.max_frames:,}; ask for fewer with num_frames, fps or a clip"
            )

    def tiles(self, processor: ProcessorConfig, max_tiles: int, frames: int) -> list[int]:
        """Returns the tiles of each frame; for several tiles a frame the most that it can have."""
        most = self.video.tiles
        per_frame = most + (most > 1 and processor.use_thumbnail)
        return [per_frame] * self.shown(frames)

    def shown(self, frames: int) -> int:
        """Returns the number of frames if those of each video may be at most `frames`."""
        return self.frames if self.is_fixed else min(self.frames, frames)

    def images(self, processor: ProcessorConfig, max_tiles: int, frames: int) -> list[Image.Image]:
        """Decodes the frames."""
        count = self.shown(frames)
        return read_frames(
            self._source,
            lambda footage: self._choose(footage, count),
            self.name,
            **self._read_limits(),
        )

    def _count(self) -> tuple[int, bool]:
        """Returns the number of frames, and whether the caller gave it."""
        video, footage = self.video, self.footage
        if video.fps is not None:
            if not footage.fps:
                raise VideoError("fps: the frame rate is unknown; give num_frames instead")
            start, end = video.clip or (0, math.inf)
            seconds = min(end, footage.total / footage.fps) - start
            count = max(1, int(seconds * video.fps))
            return min(count, video.num_frames or count), True
        if video.num_frames is not None:
            return video.num_frames, True
        first, last = frame_range(footage, video.clip)
        return min(DEFAULT_FRAMES, last - first + 1, self.limits.max_frames), False

    def _choose(self, footage: Footage, count: int) -> list[int]:
        return middle_frames(footage, count, self.video.clip)

    def _read_limits(self) -> dict:
        return {
            "max_pixels": self.limits.max_pixels
            if self.limits.max_pixels is not None
            else Image.MAX_IMAGE_PIXELS,
            "allow_truncated": self.limits.allow_truncated,
            "most_frames": self.limits.max_video_frames,
        }


class OpenedDocument:
    """A PDF whose pages were counted.

    Attributes:
      document: as it was asked for.
      pdf: the file, with the numbers and sizes of the pages.
    """

    def __init__(self, document: Document, limits: Limits = LOCAL):
        self.document, self.limits = document, limits
        source = document.source
        if not isinstance(source, bytes):
            source = os.path.expanduser(os.fspath(source))
        self.pdf = PdfFile(
            source, document.pages, max_bytes=limits.max_bytes, max_pages=limits.max_pages
        )

    def tiles(self, processor: ProcessorConfig, max_tiles: int, frames: int) -> list[int]:
        """Returns the number of tiles of each page, thumbnails included."""
        sizes = self.page_pixels(processor, max_tiles)
        return [count_tiles(*size, processor, max_tiles) for size in sizes]

    def page_pixels(self, processor: ProcessorConfig, max_tiles: int) -> list[tuple[int, int]]:
        """Returns the width and height of each page as it is rendered."""
        dpi = self.document.dpi
        return [page_pixels(*size, processor, max_tiles, dpi) for size in self.pdf.sizes]

    def images(self, processor: ProcessorConfig, max_tiles: int, frames: int) -> list[Image.Image]:
        """Renders the pages."""
        dpi, most = self.document.dpi, self.limits.max_pixels
        most = Image.MAX_IMAGE_PIXELS if most is None else most
        self.pdf.check_pixels(processor, max_tiles, dpi, most)
        return self.pdf.render(processor, max_tiles, dpi)


Opened = OpenedImage | OpenedVideo | OpenedDocument


def _check_bytes(source: str | bytes, name: str, most: int) -> None:
    if isinstance(source, bytes):
        size = len(source)
    elif is_remote(source) or not os.path.isfile(source):
        return  # `read_frames` opens it, or says what it is
    else:
        with open_regular(source) as file:
            size = os.fstat(file.fileno()).st_size
    if size > most:
        raise VideoError(
            f"{short_name(name)}: {size:,} bytes are more than {most:,}; cut it into parts"
        )


def video_images(
    video: Video | Data, processor: ProcessorConfig, limits: Limits = UNTRUSTED
) -> tuple[list[Image.Image], str]:
    r"""Returns the frames of a video as RGB images, and the text that shows them in a prompt.

    Args:
      video: with its settings, or its path or bytes alone.
      processor: of the checkpoint; it has the frames' label.

    Returns:
      images, and a line such as "Frame-1: <image>\n" for each.

    Raises:
      VideoError, ImageError, FileError: one line that says what is wrong with the video.
    """
    opened = OpenedVideo(video if isinstance(video, Video) else Video(video), limits)
    images = opened.images(processor, 1, opened.frames)
    return images, frame_lines(len(images), opened.video.label or processor.frame_label)


def document_images(
    document: Document | Data,
    processor: ProcessorConfig,
    limits: Limits = UNTRUSTED,
    max_tiles: int | None = None,
    first_number: int = 1,
) -> tuple[list[Image.Image], str]:
    r"""Returns the pages of a PDF as RGB images, and the text that shows them in a prompt.

    Args:
      document: with its settings, or its path or bytes alone.
      processor: of the checkpoint; pages are rendered for its tiles.
      max_tiles: of a page, in place of the processor's.
      first_number: of the first page in "Image-1: ".

    Returns:
      images, and a line such as "Image-1: <image>\n" for each.

    Raises:
      DocumentError, ImageError: one line that says what is wrong with the document.
    """
    opened = OpenedDocument(
        document if isinstance(document, Document) else Document(document), limits
    )
    limit = image_limit(processor, len(opened.pdf.pages), max_tiles)
    images = opened.images(processor, limit, 0)
    return images, page_lines(len(images), first_number)
