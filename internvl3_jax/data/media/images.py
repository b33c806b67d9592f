"""Opens images of any kind as RGB images with the pixels that the released model sees.

The rule is Pillow's `convert("RGB")`, as in the InternVL code, with these decisions:

  transparency          dropped: a transparent pixel has the color stored beneath it, without a
                        background
  palette, CMYK, 1-bit  as Pillow converts them
  16-bit grayscale      the high byte, which Pillow also keeps of 16-bit color; Pillow itself clips
                        16-bit gray at 255, so that most images become white. 12-bit data in 16-bit
                        files has to be scaled by the caller
  32-bit integer,       refused: their range is unknown
    float
  several frames        the first one, unless `frame` says which; a GIF can also be a video
                        (video.py)
  EXIF orientation      ignored by default, as in the released code; Pillow always turns TIFF files
  formats               those that hold pixels; EPS, PostScript, WMF and the like are refused,
                        whatever their name: Pillow passes them to other programs
  PNG texts, profiles   of any size are skipped; Pillow refuses files with more than 1 MB
  truncated files       refused, unless `allow_truncated` (InternVL's trainer accepts them)
  very large files      refused above `max_pixels`, by default PIL.Image.MAX_IMAGE_PIXELS, 89
                        million (InternVL's trainer has no limit)
"""

import contextlib
import io
import os
import pathlib
import stat
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from internvl3_jax.data.media import pillow
from internvl3_jax.data.media.pillow import FORMATS
from internvl3_jax.io.remote_files import is_remote
from internvl3_jax.io.safe_files import FileError, open_regular, read_bytes, reason
from internvl3_jax.io.terminal import one_line, short_name

MAX_PIXELS = 89_478_485  # Pillow's default limit
MAX_REMOTE_BYTES = 512 << 20  # of an image in object storage, which is read at once
# Formats whose 16-bit grayscale Pillow returns as 32-bit integers.
WIDE_GRAY_FORMATS = ("PNG", "PPM")

# Pillow refuses twice MAX_IMAGE_PIXELS and warns below that. The warning is raised where warnings
# are errors.
TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
TOO_LARGE_REMEDY = (
    "scale it down, or, if you trust it, raise the limit: --max_image_pixels of the programs, "
    "data.max_image_pixels in training, max_image_pixels of Chat, max_pixels of open_image; 0 is "
    "no limit"
)
TRUNCATED_REMEDY = (
    "fetch it again, or accept such files: data.allow_truncated in training, --allow_truncated of "
    "the programs, allow_truncated of open_image"
)

Source = str | os.PathLike | bytes | bytearray | memoryview | BinaryIO | Image.Image | np.ndarray


class ImageError(ValueError):
    """An image that cannot be used. The message names it, the reason and the remedy."""


def open_image(
    source: Source,
    *,
    apply_exif: bool = False,
    frame: int | None = None,
    name: str | None = None,
    max_pixels: int | None = None,
    allow_truncated: bool = False,
) -> Image.Image:
    """Opens and decodes an image; returns it in RGB, with memory of its own.

    Args:
      source: A path, the bytes of a file, an open binary file (read from its beginning), a PIL
        image (its current frame), or an array u8[H, W], u8[H, W, 1], u8[H, W, 3], u8[H, W, 4] or
        u16[H, W] of numpy, jax or PyTorch.
      apply_exif: Whether the image is turned as its EXIF orientation says.
      frame: Number of a frame of an animation or page of a document, from 0; None takes the first.
      name: What errors call the image; by default its path, or a description.
      max_pixels: Files with more are refused. None takes PIL.Image.MAX_IMAGE_PIXELS, 0 is no limit.
      allow_truncated: Whether the missing end of a file becomes gray instead of an error.

    Raises:
      ImageError: The image cannot be read.
    """
    if isinstance(source, bytearray | memoryview):
        source = bytes(source)
    elif hasattr(source, "__array__") and not isinstance(source, np.ndarray | Image.Image):
        source = _as_numpy(source)
    name = short_name(name or _describe(source))
    if isinstance(source, np.ndarray):
        source = _from_array(source, name)
    limit = Image.MAX_IMAGE_PIXELS if max_pixels is None else max_pixels
    with pillow.allows(max_pixels is not None, allow_truncated), contextlib.ExitStack() as opened:
        if isinstance(source, Image.Image):
            if source.format is not None and source.format not in FORMATS:
                raise ImageError(
                    f"{name}: is {one_line(source.format)}, not an image of pixels; convert it to "
                    f"PNG or JPEG"
                )
            return _decode(source, apply_exif, frame, name)
        image = opened.enter_context(_identify(_open_file(source, name, opened), name))
        check_pixels(image.width, image.height, limit, name)
        return _decode(image, apply_exif, frame, name)


def check_pixels(width: int, height: int, limit: int | None, name: str) -> None:
    """Raises ImageError if there are more than `limit` pixels; None and 0 are no limit."""
    if limit and width * height > limit:
        raise ImageError(
            f"{name}: {width} x {height} pixels are more than {limit:,}; {TOO_LARGE_REMEDY}"
        )


def _describe(source) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source) if source else "''"
    if isinstance(source, bytes):
        return f"image of {len(source)} bytes"
    if isinstance(source, Image.Image):
        return (
            getattr(source, "filename", "")
            or f"{source.mode} image of {source.width} x {source.height} pixels"
        )
    if isinstance(source, np.ndarray):
        return f"array {source.dtype}{list(source.shape)}"
    return str(getattr(source, "name", type(source).__name__))


def _as_numpy(array) -> np.ndarray:
    try:
        return np.asarray(array)
    except (TypeError, ValueError, RuntimeError) as error:  # on a GPU, or with a gradient
        raise ImageError(
            f"{type(array).__name__}: cannot be read as a numpy array ({_reason(error)}); pass a "
            f"numpy array"
        ) from error


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    color = array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] in (3, 4)
    gray = array.dtype in (np.uint8, np.uint16) and array.ndim == 2
    if not color and not gray:
        raise ImageError(
            f"{name}: is not an image array; give uint8 [height, width, 3] with values from 0 to "
            f"255, channels last"
        )
    if array.size == 0:
        raise ImageError(f"{name}: has no pixels; give at least one row and one column")
    return Image.fromarray(np.ascontiguousarray(array))


def _open_file(source, name: str, opened: contextlib.ExitStack) -> BinaryIO:
    """Opens a path, bytes or binary file as a binary file; `opened` closes it."""
    if isinstance(source, (str, os.PathLike)) and is_remote(source):
        try:
            return io.BytesIO(read_bytes(source, max_bytes=MAX_REMOTE_BYTES))
        except (FileError, OSError) as error:
            raise ImageError(f"{error}; check the address") from error
    if isinstance(source, (str, os.PathLike)):
        if not os.fspath(source):
            raise ImageError(f"{name}: an empty text is not a path; name the image's file")
        _check_path(pathlib.Path(source), name)
        try:
            return opened.enter_context(open_regular(source))
        except FileError as error:
            raise ImageError(f"{error}; check its permissions") from error
    if isinstance(source, bytes):
        if not source:
            raise ImageError(f"{name}: is empty; was it read or downloaded completely?")
        return io.BytesIO(source)
    if not hasattr(source, "read"):
        raise ImageError(
            f"{name}: not something to open; give a path, bytes, a binary file, a PIL image or a "
            f"numpy array"
        )
    if isinstance(source, io.TextIOBase):
        raise ImageError(f"{name}: is open as text; open it in binary mode, 'rb'")
    try:
        source.seek(0)
        return source
    except (AttributeError, OSError):  # a stream
        return io.BytesIO(source.read())


def _identify(file: BinaryIO, name: str) -> Image.Image:
    """Returns Pillow's lazy image of a file: it reads the header, not the pixels."""
    try:
        return Image.open(pillow.without_long_texts(file), formats=pillow.readable())
    except TOO_LARGE as error:
        raise ImageError(f"{name}: {_reason(error)}; {TOO_LARGE_REMEDY}") from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: is not an image of pixels that Pillow can read; {_advice(file)}"
        ) from error
    except Exception as error:  # damaged headers make decoders raise errors of many types
        raise ImageError(
            f"{name}: cannot be opened ({_reason(error)}); is it complete and readable?"
        ) from error


def _advice(file: BinaryIO) -> str:
    file.seek(0)
    head = file.read(64).lstrip()
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer: fetch the file that it stands for, with `git lfs pull`"
    if head[:9].lower() in (b"<!doctype", b"<html>") or head[:5].lower() == b"<html":
        return "it is a web page: was it downloaded from the right address?"
    if head[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc"):
        return "it is HEIC, as phones store it: convert it to PNG or JPEG"
    return "convert it to PNG or JPEG (EPS, PDF, SVG and the like are not read)"


def _check_path(path: pathlib.Path, name: str) -> None:
    if name.startswith("data:"):
        raise ImageError(
            f"{name}: is an image written as text; store it in a file, or pass its bytes"
        )
    try:
        status = path.stat()
    except FileNotFoundError as error:
        if "://" in name:
            raise ImageError(
                f"{name}: addresses are not fetched; download the image first"
            ) from error
        raise ImageError(
            f"{name}: no such file in {short_name(str(path.absolute().parent))}; check the path"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise ImageError(
            f"{name}: is not a usable path ({_reason(error)}); check its spelling and permissions"
        ) from error
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(f"{name}: is a directory; name the image inside it")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{name}: is not a regular file; pass its bytes instead")
    if status.st_size == 0:
        raise ImageError(f"{name}: is empty; was it written or downloaded completely?")


def _decode(image: Image.Image, apply_exif: bool, frame: int | None, name: str) -> Image.Image:
    if image.width < 1 or image.height < 1:
        raise ImageError(
            f"{name}: has no pixels ({image.width} x {image.height}); give at least one row and "
            f"one column"
        )
    file_format = image.format
    try:
        if frame is not None:
            _seek(image, frame, name)
        image.load()
        if apply_exif:
            image = ImageOps.exif_transpose(image)
        return _to_rgb(image, file_format, name)
    except ImageError:
        raise
    except TOO_LARGE as error:
        raise ImageError(f"{name}: {_reason(error)}; {TOO_LARGE_REMEDY}") from error
    except Exception as error:  # damaged pixels make decoders raise errors of many types
        advice = f"; {TRUNCATED_REMEDY}" if "truncated" in str(error) else ""
        raise ImageError(
            f"{name}: cannot be decoded ({_reason(error)}); the file is damaged or incomplete"
            f"{advice}"
        ) from error


def _seek(image: Image.Image, frame: int, name: str) -> None:
    frames = _count_frames(image)
    if not 0 <= frame < frames:
        raise ImageError(f"{name}: has no frame {frame}; choose from 0 to {frames - 1}")
    if frames > 1:
        image.seek(frame)


def _count_frames(image: Image.Image) -> int:
    return getattr(image, "n_frames", 1)


def _to_rgb(image: Image.Image, file_format: str | None, name: str) -> Image.Image:
    """Converts a decoded image by the rules at the top of this file."""
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in WIDE_GRAY_FORMATS):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating point numbers"
        raise ImageError(
            f"{name}: holds {kind} of unknown range; scale them to 0..255 and save or pass 8-bit "
            f"values"
        )
    if isinstance(image.info.get("transparency"), bytes):
        # Without it the pixels are the same, and Pillow does not warn that transparency is lost.
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    return short_name(reason(error).strip().rstrip(".") or type(error).__name__)
