"""Images as callers give them: one or several, as paths, bytes, arrays or PIL images."""

import os

from PIL import Image

from internvl3_jax.config import ProcessorConfig
from internvl3_jax.data.media.images import open_image
from internvl3_jax.data.text.chat_template import ChatError
from internvl3_jax.io.terminal import excerpt

_SINGLE = (str, bytes, bytearray, memoryview, os.PathLike, Image.Image)


def as_list(images, kind: str = "images") -> list:
    """Returns images, videos or documents as a list: of None, one of them, or several.

    Raises:
      ChatError: it is none of these.
    """
    if images is None:
        return []
    single = isinstance(images, _SINGLE) or hasattr(images, "read")
    if single or (hasattr(images, "ndim") and images.ndim < 4):
        return [images]
    if isinstance(images, dict) or not hasattr(images, "__iter__"):
        raise ChatError(
            f"{kind} is {excerpt(images)}; give one or a list: paths, bytes"
            + (", arrays or PIL images" if kind == "images" else f", or a {kind[:-1].title()}")
        )
    return list(images)


def open_images(images, processor: ProcessorConfig, options) -> list[Image.Image]:
    """Returns RGB images.

    Args:
      images: as of `Chat`.
      processor: says whether their EXIF orientation is applied.
      options: with `max_image_pixels` and `allow_truncated`.

    Raises:
      ImageError: one cannot be read.
    """
    limits = {"max_pixels": options.max_image_pixels, "allow_truncated": options.allow_truncated}
    return [
        open_image(image, apply_exif=processor.apply_exif, **limits) for image in as_list(images)
    ]
