"""The requests of a pack, and their images. Each needs a rule that engines have got wrong."""

import pathlib

import numpy as np
from PIL import Image

from internvl3_jax.parity.folder import Request

# Name -> width and height, in tiles. The square is equally near to 1 x 1, 2 x 2 and 3 x 3 tiles.
_IMAGES = {"wide": (2.2, 1.1), "square": (1, 1), "tall": (0.8, 1.7)}
_FRAMES = 3


def write_images(folder: pathlib.Path, tile: int, seed: int = 0) -> None:
    """Writes the test images as PNG: blocks of noise over a gradient. tile: its side in pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, (width, height)) in enumerate(_IMAGES.items()):
        _write(folder / f"{name}.png", round(width * tile), round(height * tile), seed + number)
    (folder / "video").mkdir(exist_ok=True)
    for number in range(_FRAMES):
        path = folder / "video" / f"{number + 1}.png"
        _write(path, round(1.3 * tile), tile, seed + 100 + number)


def _write(path: pathlib.Path, width: int, height: int, seed: int) -> None:
    block = max(1, min(width, height) // 12)
    shape = (-(-height // block), -(-width // block), 3)
    noise = np.random.default_rng(seed).integers(0, 128, shape, dtype=np.uint8)
    noise = noise.repeat(block, axis=0).repeat(block, axis=1)[:height, :width]
    ramp = (np.arange(width) * 127 // width).astype(np.uint8)
    Image.fromarray(noise + ramp[None, :, None]).save(path)


def requests(folder: str, delta: str | None, max_new_tokens: int) -> dict[str, Request]:
    """Returns the requests by name.

    Args:
      folder: of the images, below the pack.
      delta: V2PE step of all images; None: the checkpoint's, and 1/4 in the case "v2pe".
      max_new_tokens: of each answer.
    """
    frames = [f"{folder}/video/{number + 1}.png" for number in range(_FRAMES)]
    asked = {
        "text": Request("What is 2 + 3?"),
        "image": Request("What is in the image?", [f"{folder}/wide.png"]),
        "square": Request("What is the color?", [f"{folder}/square.png"]),
        "images": Request(
            "What is in both images?", [f"{folder}/tall.png", f"{folder}/square.png"]
        ),
        "video": Request("What is happening?", frames=frames),
        "v2pe": Request("What is in the image?", [f"{folder}/wide.png"], delta="1/4"),
    }
    for request in asked.values():
        request.max_new_tokens = max_new_tokens
        if request.images or request.frames:
            request.delta = request.delta or delta
    return asked
