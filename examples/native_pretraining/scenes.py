"""Pictures of named things, composed from drawings; what is on them, and questions with their
answers.

A picture has 1 to 3 things in the cells of a grid, in the reading order of their names. Sizes and
shapes vary, so that dynamic resolution makes one or several tiles of them. Drawings for training
are turned, mirrored, stretched and recoloured.
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
    """A picture and the name and box (left, top, right, bottom; pixels) of each thing on it, in
    reading order.
    """

    image: Image.Image
    names: list[str]
    boxes: list[tuple[float, float, float, float]]

    @property
    def text(self) -> str:
        return ", ".join(self.names)


def things(
    rng: np.random.Generator, drawings: dict[str, Image.Image], count: int, vary: bool
) -> Scene:
    """A fresh picture of `count` (1 to 3) different things; vary: the drawings themselves, for
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
        own = min(width, height) * rng.uniform(0.8, 0.98)
        left = cell % columns * width + rng.uniform(0, width - own)
        top = cell // columns * height + rng.uniform(0, height - own)
        boxes.append((left, top, left + own, top + own))
        stamp = varied(drawings[name], rng) if vary else drawings[name]
        stamp = stamp.resize((round(own), round(own)), Image.Resampling.BOX)
        image.paste(stamp, (round(left), round(top)), stamp)
    return Scene(image, names, boxes)


def varied(drawing: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A drawing RGBA as another hand might have made it: mirrored, turned, stretched, in other and
    in fewer colours.
    """
    color, alpha = drawing.convert("RGB"), drawing.getchannel("A")
    if rng.random() < 0.5:
        color, alpha = ImageOps.mirror(color), ImageOps.mirror(alpha)
    if rng.random() < 0.5:
        color = ImageOps.posterize(color, int(rng.integers(2, 4)))
    shift = int(rng.integers(-14, 15))  # of 256 steps around the wheel
    hue, saturation, value = color.convert("HSV").split()
    color = Image.merge(
        "HSV", (hue.point(lambda step: (step + shift) % 256), saturation, value)
    ).convert("RGB")
    for change in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
        color = change(color).enhance(rng.uniform(0.6, 1.4))
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
        part.transform(part.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        for part in (color, alpha)
    ]
    return Image.merge("RGBA", (*moved[0].split(), moved[1]))


def number(rng: np.random.Generator, split: str, most: int, fewest: int = 1) -> Scene:
    """A handwritten number of `fewest` to `most` digits by the "train" or "test" scans; its only
    name is the number.
    """
    while len((scene := digits.line(rng, split, most)).digits) < fewest:
        pass
    return Scene(scene.image, [scene.number], [])


def turn(task: str, scene: Scene, wanted: int = 0) -> tuple[str, str]:
    """(question, answer) about one picture. wanted: which of its things "where" asks for."""
    if task == "where":
        # It reads until it meets the thing, and then says where that is, as the digits model does.
        name, box = scene.names[wanted], digits.format_box(scene.boxes[wanted], scene.image.size)
        return PROMPTS[task].format(
            name
        ), f"{', '.join(scene.names[: wanted + 1])}: <ref>{name}</ref><box>[{box}]</box>"
    if task == "ground":
        boxes = [digits.format_box(box, scene.image.size) for box in scene.boxes]
        parts = [
            f"<ref>{name}</ref><box>[{box}]</box>"
            for name, box in zip(scene.names, boxes, strict=True)
        ]
        return PROMPTS[task], "".join(parts)
    if task == "count":
        return PROMPTS[task], str(len(scene.names))
    if task == "count digits":
        return PROMPTS[task], str(len(scene.text))
    return PROMPTS[task], scene.text
