"""Composes images of named things from drawings, and asks questions about them.

An image has 1 to 3 things in the cells of a grid, in the reading order of their names. Sizes and
shapes vary, so that dynamic resolution cuts them into one or several tiles. Drawings for training
are rotated, mirrored, stretched and recolored.
"""

import dataclasses
import pathlib
import sys

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the clone

from examples.tiny_digits.recipe import data as digits

PROMPTS = {
    "describe": "Describe the picture.",
    "ground": "Describe the picture and say where everything is.",
    "each": "Describe each picture.",
    "what": "What is in the picture?",
    "count": "How many things are there?",
    "where": "Where is the <ref>{}</ref>?",
    "read": digits.PROMPTS["read"],
    "count digits": digits.PROMPTS["count"],
    "continue": "Continue the text.",
}
# number of things -> rows and columns of cells
GRIDS = {1: ((1, 1),), 2: ((1, 2), (2, 1)), 3: ((1, 3), (3, 1), (2, 2))}


@dataclasses.dataclass
class Scene:
    """An image, with the name and box (left, top, right, bottom; pixels) of each thing in it, in
    reading order.
    """

    image: Image.Image
    names: list[str]
    boxes: list[tuple[float, float, float, float]]

    @property
    def text(self) -> str:
        return ", ".join(self.names)


def make_things(
    rng: np.random.Generator, drawings: dict[str, Image.Image], count: int, vary: bool
) -> Scene:
    """Composes an image of `count` (1 to 3) different things. vary: Changes the drawings, for
    training.
    """
    rows, columns = GRIDS[count][int(rng.integers(len(GRIDS[count])))]
    cells = sorted(rng.choice(rows * columns, count, replace=False))
    names = [str(name) for name in rng.choice(sorted(drawings), count, replace=False)]
    size = rng.uniform(28, 44)
    width, height = size * rng.uniform(0.95, 1.1, 2)
    paper = tuple(int(value) for value in rng.integers(200, 256, 3))
    image = Image.new("RGB", (round(columns * width), round(rows * height)), paper)
    boxes = []
    for cell, name in zip(cells, names, strict=True):
        side = min(width, height) * rng.uniform(0.8, 0.98)
        left = cell % columns * width + rng.uniform(0, width - side)
        top = cell // columns * height + rng.uniform(0, height - side)
        boxes.append((left, top, left + side, top + side))
        stamp = vary_drawing(drawings[name], rng) if vary else drawings[name]
        stamp = stamp.resize((round(side), round(side)), Image.Resampling.BOX)
        image.paste(stamp, (round(left), round(top)), stamp)
    return Scene(image, names, boxes)


def vary_drawing(drawing: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Mirrors, posterizes, recolors, rotates and stretches an RGBA drawing at random, as if by
    another hand.
    """
    color, alpha = drawing.convert("RGB"), drawing.getchannel("A")
    # Mirror, and fewer colors
    if rng.random() < 0.5:
        color, alpha = ImageOps.mirror(color), ImageOps.mirror(alpha)
    if rng.random() < 0.5:
        color = ImageOps.posterize(color, int(rng.integers(2, 4)))
    # Other colors
    shift = int(rng.integers(-14, 15))  # of 256 steps around the wheel
    hue, saturation, value = color.convert("HSV").split()
    color = Image.merge(
        "HSV", (hue.point(lambda step: (step + shift) % 256), saturation, value)
    ).convert("RGB")
    for change in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
        color = change(color).enhance(rng.uniform(0.6, 1.4))
    # Rotation and stretch about the center
    angle, stretch = rng.uniform(-0.35, 0.35), rng.uniform(0.85, 1.15, 2)
    a, b, c, d = (
        stretch[0] * np.cos(angle),
        np.sin(angle),
        -np.sin(angle),
        stretch[1] * np.cos(angle),
    )
    x, y = drawing.width / 2, drawing.height / 2
    matrix = (a, b, x - a * x - b * y, c, d, y - c * x - d * y)
    moved = [
        layer.transform(layer.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        for layer in (color, alpha)
    ]
    return Image.merge("RGBA", (*moved[0].split(), moved[1]))


def make_number(rng: np.random.Generator, split: str, most: int, fewest: int = 1) -> Scene:
    """Composes a handwritten number of `fewest` to `most` digits from "train" or "test" scans.
    The number is the only name, and has no box.
    """
    while len((scene := digits.line(rng, split, most)).digits) < fewest:
        pass
    return Scene(scene.image, [scene.number], [])


def make_turn(task: str, scene: Scene, wanted: int = 0) -> tuple[str, str]:
    """Returns (question, answer) about an image. wanted: The thing that "where" asks for."""
    if task == "where":
        # The answer names things up to the wanted one and then gives its box, as in the digits
        # model's data.
        name, box = scene.names[wanted], digits.format_box(scene.boxes[wanted], scene.image.size)
        seen = ", ".join(scene.names[: wanted + 1])
        return PROMPTS[task].format(name), f"{seen}: <ref>{name}</ref><box>[{box}]</box>"
    if task == "ground":
        boxes = [digits.format_box(box, scene.image.size) for box in scene.boxes]
        answers = [
            f"<ref>{name}</ref><box>[{box}]</box>"
            for name, box in zip(scene.names, boxes, strict=True)
        ]
        return PROMPTS[task], "".join(answers)
    if task == "count":
        return PROMPTS[task], str(len(scene.names))
    if task == "count digits":
        return PROMPTS[task], str(len(scene.text))
    return PROMPTS[task], scene.text
