"""Renders the pages of a PDF as images, with as many pixels as their tiles take.

PDFium (pypdfium2) reads the file; it is not thread-safe, so that one thread at a time renders. A
page is rendered at the size of the grid of tiles that it is cut into: fewer pixels would waste
tiles, more would be scaled down again. Form fields are drawn; scripts are not run.
"""

import math
import os
import re
import threading
from collections.abc import Sequence

from PIL import Image

from internvl3_jax.config import ProcessorConfig
from internvl3_jax.data.media.images import check_pixels
from internvl3_jax.data.media.tiles import image_grid
from internvl3_jax.io.safe_files import FileError, read_bytes
from internvl3_jax.io.terminal import excerpt, short_name

POINTS_PER_INCH = 72
MAX_BYTES = 1 << 30
MAX_PAGES = 100  # of one document in a prompt
# A page of an extreme aspect is rendered with at most this many times the pixels of its tiles.
MOST_EXCESS = 4

# Sides are rounded up, and sizes are float32: without this a side of 448 pixels may become 449.
_DOWN = 1 - 1e-6

_pdfium_lock = threading.Lock()


class DocumentError(ValueError):
    """A document that cannot be used. The message names it, the reason and the remedy."""


class PdfFile:
    """A PDF whose pages are rendered.

    Attributes:
      name: what errors call it.
      pages: numbers of the pages that are shown, from 1.
      sizes: width and height of each of them, in points.
    """

    def __init__(
        self,
        document: str | os.PathLike | bytes,
        pages: str | Sequence[int] | None = None,
        *,
        name: str = "",
        max_bytes: int = MAX_BYTES,
        max_pages: int = MAX_PAGES,
    ):
        """Opens a PDF without rendering it.

        Args:
          document: a path, or the bytes of a file.
          pages: as of `parse_pages`; None is all.
          max_bytes, max_pages: of the file, and of the pages that are shown; more are refused.

        Raises:
          DocumentError: the file is not a PDF, is damaged, encrypted or empty, or lacks a page.
        """
        is_bytes = isinstance(document, bytes | bytearray | memoryview)
        self.name = short_name(
            name or (f"document of {len(document)} bytes" if is_bytes else os.fspath(document))
        )
        self._data = bytes(document) if is_bytes else _read(document, max_bytes)
        if len(self._data) > max_bytes:
            raise DocumentError(
                f"{self.name}: {len(self._data):,} bytes are more than {max_bytes:,}; split it"
            )
        with _pdfium_lock, self._opened() as pdf:
            count = len(pdf)
            self.pages = parse_pages(pages, count, self.name)
            if len(self.pages) > max_pages:
                raise DocumentError(
                    f"{self.name}: {len(self.pages)} pages are more than {max_pages}; choose some, "
                    f"such as 1-{max_pages}"
                )
            self.sizes = [pdf.get_page_size(page - 1) for page in self.pages]
        for page, (width, height) in zip(self.pages, self.sizes, strict=True):
            if not (width > 0 and height > 0 and math.isfinite(width * height)):
                raise DocumentError(f"{self.name}, page {page}: has no area; leave it out")

    def render(
        self, processor: ProcessorConfig, max_tiles: int, dpi: float | None = None
    ) -> list[Image.Image]:
        """Returns the pages as RGB images of `page_pixels`.

        Raises:
          DocumentError: a page cannot be rendered.
        """
        images = []
        with _pdfium_lock, self._opened() as pdf:
            if pdf.get_formtype():
                pdf.init_forms()
            for page, size in zip(self.pages, self.sizes, strict=True):
                scale = _page_scale(*size, processor, max_tiles, dpi)
                images.append(self._render_page(pdf, page, scale))
        return images

    def check_pixels(
        self, processor: ProcessorConfig, max_tiles: int, dpi: float | None, max_pixels: int | None
    ) -> None:
        """Raises ImageError if a page would have more pixels; None and 0 are no limit."""
        for page, size in zip(self.pages, self.sizes, strict=True):
            width, height = page_pixels(*size, processor, max_tiles, dpi)
            check_pixels(width, height, max_pixels, f"{self.name}, page {page}")

    def _opened(self):
        try:
            import pypdfium2
        except ImportError as error:
            raise DocumentError(
                f"{self.name}: PDFs need pypdfium2: pip install -e '.[documents]'"
            ) from error
        return _Opened(pypdfium2, self._data, self.name)

    def _render_page(self, pdf, page: int, scale: float) -> Image.Image:
        import pypdfium2

        try:
            loaded = pdf.get_page(page - 1)
            image = loaded.render(scale=scale).to_pil().convert("RGB")
            loaded.close()
        except pypdfium2.PdfiumError as error:
            raise DocumentError(
                f"{self.name}, page {page}: cannot be rendered; leave it out, or print the "
                "document to a new PDF"
            ) from error
        return image


class _Opened:
    """A context manager of an open document, which turns PDFium's errors into DocumentError."""

    def __init__(self, pdfium, data: bytes, name: str):
        self.pdfium, self.data, self.name = pdfium, data, name

    def __enter__(self):
        # PDFium searches for the header; its first kilobyte is where readers accept it.
        if b"%PDF-" not in self.data[:1024]:
            raise DocumentError(f"{self.name}: is not a PDF; give an image with --image")
        try:
            self.pdf = self.pdfium.PdfDocument(self.data)
        except self.pdfium.PdfiumError as error:
            # PDFium keeps the error of an earlier file if it reports none of its own.
            if error.err_code == self.pdfium.raw.FPDF_ERR_PASSWORD and b"/Encrypt" in self.data:
                raise DocumentError(
                    f"{self.name}: is encrypted; save a copy without a password"
                ) from error
            raise self._damaged() from error
        return self.pdf

    def __exit__(self, kind, error, trace) -> None:
        self.pdf.close()
        if isinstance(error, self.pdfium.PdfiumError):  # such as for a page that is not there
            raise self._damaged() from error

    def _damaged(self) -> DocumentError:
        return DocumentError(
            f"{self.name}: is damaged, incomplete or without pages; fetch it again, or print it to "
            "a new PDF"
        )


def _read(path: str | os.PathLike, max_bytes: int) -> bytes:
    try:
        return read_bytes(path, max_bytes=max_bytes)
    except (FileError, OSError) as error:
        raise DocumentError(str(error)) from error


def parse_pages(pages: str | Sequence[int] | None, count: int, name: str) -> list[int]:
    """Returns page numbers from 1 of a text such as "2-5,8" or "3-", or of a list, in its order.

    Args:
      count: pages of the document.
      name: what errors call it.

    Raises:
      DocumentError: the text is not a list of pages, or a page does not exist or occurs twice.
    """
    if pages is None:
        return list(range(1, count + 1))
    if isinstance(pages, str):
        numbers = []
        for part in pages.split(","):
            match = re.fullmatch(r"\s*(\d{1,9})\s*(?:(-)\s*(\d{1,9})?)?\s*", part)
            if not match:
                raise DocumentError(
                    f"{name}: pages is {excerpt(pages)}; write for example 2-5, or 1,3,7-"
                )
            first = int(match[1])
            last = int(match[3]) if match[3] else count if match[2] else first
            if first <= last and last - first > count:  # before the range is written out
                raise DocumentError(f"{name}: there is no page {last}; it has {count}")
            if first > last:
                raise DocumentError(
                    f"{name}: pages is {excerpt(pages)}: {part.strip()} is empty; it has {count} "
                    "pages"
                )
            numbers += range(first, last + 1)
    else:
        numbers = list(pages)
        if not numbers or not all(
            isinstance(page, int) and not isinstance(page, bool) for page in numbers
        ):
            raise DocumentError(f"{name}: pages is {excerpt(pages)}; give numbers, from 1")
    for page in numbers:
        if not 1 <= page <= count:
            raise DocumentError(f"{name}: there is no page {page}; it has {count}")
    if len(set(numbers)) < len(numbers):
        raise DocumentError(f"{name}: pages is {excerpt(pages)}; a page occurs twice")
    return numbers


def page_pixels(
    width: float,
    height: float,
    processor: ProcessorConfig,
    max_tiles: int,
    dpi: float | None = None,
) -> tuple[int, int]:
    """Returns the width and height in pixels at which a page of width x height points is rendered.

    By default neither side has fewer pixels than the grid of at most `max_tiles` tiles.
    """
    scale = _page_scale(width, height, processor, max_tiles, dpi)
    return math.ceil(width * scale), math.ceil(height * scale)  # as PDFium's bindings round


def _page_scale(
    width: float, height: float, processor: ProcessorConfig, max_tiles: int, dpi: float | None
) -> float:
    """Returns the pixels of a point."""
    if dpi is not None:
        return dpi / POINTS_PER_INCH * _DOWN
    # The grid of a large image of this aspect: between equally near ones, that of more tiles.
    enlarge = max_tiles * processor.image_size / min(width, height)
    columns, rows = image_grid(
        math.ceil(width * enlarge), math.ceil(height * enlarge), processor, max_tiles
    )
    grid = columns * processor.image_size, rows * processor.image_size
    most = math.sqrt(MOST_EXCESS * grid[0] * grid[1] / (width * height))
    return min(max(grid[0] / width, grid[1] / height), most) * _DOWN
