"""Images as VLMEvalKit stores them before the model sees them.

The state of spring 2025 made the card's numbers. It wrote a row's only image and every frame of a
video as JPEG with Pillow's defaults, whatever they were before. Several images of a row went into
files of the names in `image_path`, whose ending gives the format.
"""

import io

from PIL import Image

from internvl3_jax.data.media.images import open_image


def as_jpeg(image: bytes | Image.Image, name: str) -> bytes:
    """Returns an image as a JPEG file of Pillow's quality 75. name: what errors call it."""
    if isinstance(image, bytes):
        opened = open_image(image, name=name)
        with Image.open(io.BytesIO(image)) as plain:
            gray = plain.mode == "L"
        image = opened.convert("L") if gray else opened  # a gray image is stored as one
    data = io.BytesIO()
    image.save(data, "JPEG")
    return data.getvalue()


def as_stored(images: list[bytes | str], names: list[str], where: str) -> list[bytes | str]:
    """Returns the images of a row. Paths are files already.

    Args:
      names: of `image_path`, one per image of several; [] if the table has none.
      where: what errors call the row.
    """
    endings = [name.lower().rpartition(".")[2] for name in names]
    if len(images) == 1:
        endings = ["jpg"]
    elif len(endings) != len(images):
        endings = ["png"] * len(images)  # as the kit names them since 2025
    return [
        as_jpeg(image, where) if isinstance(image, bytes) and ending in ("jpg", "jpeg") else image
        for image, ending in zip(images, endings, strict=True)
    ]
