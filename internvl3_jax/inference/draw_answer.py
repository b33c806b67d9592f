"""Draws what an answer points at on the images of its question: infer.py --draw."""

import dataclasses
import pathlib
from collections.abc import Sequence

from PIL import Image

from internvl3_jax.config import ProcessorConfig
from internvl3_jax.data.boxes import Box, ShownImage
from internvl3_jax.data.media.drawing import draw_boxes, draw_tiles
from internvl3_jax.inference.answer import Answer
from internvl3_jax.io.terminal import one_line

LEAST_SIDE = 640  # of the longer side, so that labels have room


def draw_answer(
    answer: Answer,
    images: Sequence[Image.Image],
    processor: ProcessorConfig,
    path: pathlib.Path,
    with_tiles: bool = False,
) -> list[str]:
    """Writes the images that an answer points at, and returns one line for each file and problem.

    One image goes to `path`; of several, those with boxes go to NAME-1.png and so on. A box that
    names none of several images is drawn on each. Without boxes all images are written.

    Args:
      images: of the question, RGB.
      processor: its tile rule, for `with_tiles`.
      with_tiles: draw the grid of tiles, too.
    """
    numbers = range(1, len(images) + 1)
    usable = [box for box in answer.boxes if box.values]
    named = {box.image for box in usable}
    wanted = [n for n in numbers if n in named or None in named] or list(numbers)
    remarks = [] if answer.boxes else ["the answer has no boxes"]
    remarks += [
        f"{name_of(box, number)}: {box.problem}"
        for number, box in enumerate(answer.boxes, 1)
        if box.problem
    ]
    unnamed = sum(box.image is None for box in usable)
    if unnamed:
        remarks.append(f"no image is named for {unnamed} of them: drawn on all {len(images)}")
    tiles = answer.tiles[-len(images) :]
    for number in wanted:
        image, factor = enlarged(images[number - 1])
        boxes = _on(usable, number, image, factor)
        if with_tiles:
            image = draw_tiles(image, tiles[number - 1], processor)
        image, about_labels = draw_boxes(image, boxes)
        target = path if len(images) == 1 else path.with_stem(f"{path.stem}-{number}")
        image.save(target)
        drawn = sum(box.pixels is not None for box in boxes)
        count = f"{drawn} box{'' if drawn == 1 else 'es'} drawn"
        larger = f" at {factor} times its size" if factor > 1 else ""
        remarks += [*about_labels, f"{count}{larger}: {one_line(str(target))}"]
    return remarks


def name_of(box: Box, number: int) -> str:
    """Returns what remarks call a box of an answer."""
    label = f" ({one_line(box.label)})" if box.label else ""
    return f"{box.kind} {number}{label}"


def enlarged(image: Image.Image) -> tuple[Image.Image, int]:
    """Returns an image enlarged so that its longer side has LEAST_SIDE pixels, and the factor."""
    factor = -(-LEAST_SIDE // max(image.size))
    return image.resize((image.width * factor, image.height * factor)), factor


def _on(boxes: Sequence[Box], number: int, image: Image.Image, factor: int) -> list[Box]:
    """Returns the boxes on an enlarged image; those that name no image are put on it."""
    shown = ShownImage(image.width // factor, image.height // factor)
    found = [
        box if box.image else box.on(number, shown) for box in boxes if box.image in (None, number)
    ]
    return [
        dataclasses.replace(
            box, pixels=box.pixels and tuple(factor * value for value in box.pixels)
        )
        for box in found
    ]
