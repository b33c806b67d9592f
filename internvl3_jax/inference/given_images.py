"""Images as people hand them in: one or several, as paths, bytes, arrays or PIL images."""

import os

from PIL import Image

from internvl3_jax.config import ProcessorConfig
from internvl3_jax.data.media.images import open_image
from internvl3_jax.data.text.chat_template import ChatError
from internvl3_jax.io.terminal import excerpt


def as_list(images) -> list:
    """Images as a list: of one image, a path or what `open_image` takes, or of several. ChatError
    for what is neither.
    """
    if images is None:
        return []
    single = isinstance(images, str | bytes | os.PathLike | Image.Image) or hasattr(images, "read")
    if single or (hasattr(images, "ndim") and images.ndim < 4):
        return [images]
    if isinstance(images, dict) or not hasattr(images, "__iter__"):
        raise ChatError(
            f"images is {excerpt(images)}; give one image or a list of them: paths, bytes, arrays or PIL images"
        )
    return list(images)


def open_images(images, processor: ProcessorConfig, options) -> list[Image.Image]:
    """RGB images of one or several given as for `Chat`. options: whose max_image_pixels and
    allow_truncated count.
    """
    limits = {"max_pixels": options.max_image_pixels, "allow_truncated": options.allow_truncated}
    return [
        open_image(image, apply_exif=processor.apply_exif, **limits) for image in as_list(images)
    ]
