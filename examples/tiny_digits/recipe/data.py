"""Composes images of real handwritten digits, with questions: the data of configs/tiny_digits.py.

The handwriting is scikit-learn's `load_digits` (1,797 scans of 8x8 pixels, UCI Optical Recognition
of Handwritten Digits), split by scan into training and test. The images vary in size and shape, so
that they are cut into one or several tiles. Each comes with a conversation in the form of the large
models' data.
"""

import dataclasses
import functools
import re

import numpy as np
from PIL import Image

from internvl3_jax.config import DataConfig, ProcessorConfig
from internvl3_jax.data.media.tiles import image_limit
from internvl3_jax.data.sources.row_source import Conversation

TASKS = ("read", "count", "locate", "compare")
PROMPTS = {
    "read": "Read the number.",
    "count": "How many digits are there?",
    "locate": "Where is the <ref>{}</ref>?",
    "compare": "Image-1: <image>\nImage-2: <image>\nWhich number is larger?",
}
_TEST_SHARE = 5  # one scan in five
_SPLIT_SEED = 0


@dataclasses.dataclass
class Scene:
    """An image, with the value and the box (left, top, right, bottom; pixels) of each digit."""

    image: Image.Image
    digits: list[int]
    boxes: list[tuple[float, float, float, float]]
    is_line: bool  # reads as a number, from left to right

    @property
    def number(self) -> str:
        return "".join(map(str, self.digits))


@dataclasses.dataclass
class Question:
    task: str
    messages: list[dict]  # user turns with their answers
    images: list[Image.Image]

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]


@functools.cache
def handwriting(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns (ink u8[n,8,8], labels int[n]) of "train" or "test"."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits data needs scikit-learn: pip install -e '.[demo]'") from error
    data = load_digits()
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(data.target))
    is_test = np.arange(len(order)) % _TEST_SHARE == 0
    chosen = order[is_test if split == "test" else ~is_test]
    return np.minimum(data.images[chosen] * 16, 255).astype(np.uint8), data.target[chosen]


# A curriculum: single digits, then numbers, then all tasks. With all tasks from the start, a tower
# with random weights takes several times longer to learn its first digit.
_SINGLE_UNTIL = 5_000  # items
_READ_UNTIL = 10_000
_MOST = 5
_SHEETS = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (2, 3))  # rows and columns of cells


class DigitsSource:
    """Random-access source of questions: item i depends on (seed, i) alone."""

    def __init__(self, length: int, seed: int, split: str = "train"):
        self.length, self.seed, self.split = length, seed, split

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Question:
        rng = np.random.default_rng((self.seed, index))
        if index < _READ_UNTIL:
            return ask("read", rng, self.split, 1 if index < _SINGLE_UNTIL else _MOST)
        task = rng.choice(
            ["read", "compare", "compare in words", "conversation"], p=[0.3, 0.17, 0.08, 0.45]
        )
        if task == "compare in words":
            return compare_in_words(rng)
        return (
            conversation(rng, self.split) if task == "conversation" else ask(task, rng, self.split)
        )


class DigitsConversations:
    """The questions as a source of training data, `internvl3_jax.data.sources.catalog.Source`."""

    name, has_images, repeat, weight = "digits", True, 1.0, None
    ordered = True  # the curriculum

    def __init__(self, length: int, seed: int):
        self.questions = DigitsSource(length, seed)

    @property
    def identity(self) -> str:
        return f"{len(self)} digits questions, seed {self.questions.seed}"

    def __len__(self) -> int:
        return len(self.questions)

    def locate(self, row: int) -> str:
        return f"{self.name} row {row}"

    def conversation(
        self, row: int, choose, processor: ProcessorConfig, limits=None
    ) -> Conversation:
        question = self.questions[row]
        return Conversation(
            question.messages, question.images, image_limit(processor, len(question.images))
        )


def sources(config: DataConfig) -> list[DigitsConversations]:
    """Returns the sources of the mixture: the function that configs/tiny_digits.py names."""
    return [DigitsConversations(config.samples, config.seed)]


def held_out(per_task: int, seed: int = 1) -> list[Question]:
    """Returns `per_task` questions of each task on test handwriting, one turn each."""
    return [
        ask(task, np.random.default_rng((seed, t, i)), "test")
        for t, task in enumerate(TASKS)
        for i in range(per_task)
    ]


def ask(task: str, rng: np.random.Generator, split: str, most: int = _MOST) -> Question:
    """Returns a question of a task about a new image, or about two images for "compare"."""
    if task == "compare":
        scenes = [_number(rng, split, 2) for _ in range(2)]
        turn = [
            _user(PROMPTS["compare"]),
            _assistant(_comparison(*(scene.number for scene in scenes))),
        ]
        return Question(task, turn, [scene.image for scene in scenes])
    return _about(_scene(task, rng, split, most), [task], rng)


def compare_in_words(rng: np.random.Generator) -> Question:
    """Returns a comparison of two numbers as text, without images."""
    numbers = [str(rng.integers(10 ** int(rng.integers(1, 3)))) for _ in range(2)]
    question = PROMPTS["compare"].replace("<image>", "{}").format(*numbers)
    return Question("compare in words", [_user(question), _assistant(_comparison(*numbers))], [])


def conversation(rng: np.random.Generator, split: str) -> Question:
    """Returns two questions about one image."""
    scene = _scene("locate", rng, split, _MOST)
    tasks = ["locate", str(rng.choice(["locate", "count"])) if len(_single(scene)) > 1 else "count"]
    rng.shuffle(tasks)
    return _about(scene, tasks, rng)


def _scene(task: str, rng: np.random.Generator, split: str, most: int) -> Scene:
    """Composes an image that suits the task."""
    while True:
        scene = (
            line(rng, split, most)
            if task == "read" or rng.random() < 0.5
            else sheet(rng, split, most)
        )
        if task != "locate" or _single(scene):
            return scene


def _about(scene: Scene, tasks: list[str], rng: np.random.Generator) -> Question:
    wanted = iter(rng.permutation(_single(scene)))  # each digit is asked for once
    messages = []
    for task in tasks:
        messages += _turn(task, scene, int(next(wanted)) if task == "locate" else None)
    messages[0]["content"] = "<image>\n" + messages[0]["content"]
    return Question(" and ".join(tasks), messages, [scene.image])


def line(rng: np.random.Generator, split: str, most: int) -> Scene:
    """Composes a number, written from left to right."""
    return _cells(rng, split, [(0, column) for column in range(int(rng.integers(1, most + 1)))])


def sheet(rng: np.random.Generator, split: str, most: int) -> Scene:
    """Composes digits on a sheet of up to two by three cells, some of them empty."""
    rows, columns = _SHEETS[int(rng.integers(len(_SHEETS)))]
    cells = [(row, column) for row in range(rows) for column in range(columns)]
    count = int(rng.integers(1, min(most, len(cells)) + 1))
    chosen = sorted(rng.choice(len(cells), count, replace=False))
    return _cells(rng, split, [cells[index] for index in chosen], (rows, columns))


def _number(rng: np.random.Generator, split: str, most: int) -> Scene:
    """Composes a number without leading zeros."""
    while True:
        scene = line(rng, split, most)
        if scene.number == str(int(scene.number)):
            return scene


def _single(scene: Scene) -> list[int]:
    """Returns the digits that occur once."""
    return [digit for digit in scene.digits if scene.digits.count(digit) == 1]


def _cells(
    rng: np.random.Generator,
    split: str,
    filled: list[tuple[int, int]],
    shape: tuple[int, int] | None = None,
) -> Scene:
    """Composes digits in the given (row, column) cells, each at a random place in its cell. Sizes,
    margins and proportions are random.
    """
    rows, columns = shape or (1, len(filled))
    size = rng.uniform(20, 36)
    width, height = size * rng.uniform(1.02, 1.1) * rng.uniform(0.98, 1.02, 2)
    left, right, top, bottom = rng.uniform(0, 0.05, 4) * size
    boxes = []
    for row, column in filled:
        side = min(size * rng.uniform(0.95, 1.02), width, height)
        x = left + column * width + rng.uniform(0, width - side)
        y = top + row * height + rng.uniform(0, height - side)
        boxes.append((x, y, x + side, y + side))
    size = (round(left + columns * width + right), round(top + rows * height + bottom))
    return Scene(*_draw(rng, split, boxes, size), boxes, is_line=shape is None)


def _draw(rng, split: str, boxes: list, size: tuple[int, int]) -> tuple[Image.Image, list[int]]:
    """Draws random scans into the boxes; returns the image and the digits."""
    ink, labels = handwriting(split)
    paper, pen = rng.integers(190, 256, 3), rng.integers(0, 80, 3)
    image = Image.new("RGB", size, tuple(int(c) for c in paper))
    chosen = [int(rng.integers(len(labels))) for _ in boxes]
    for index, box in zip(chosen, boxes, strict=True):
        _stamp(image, Image.fromarray(ink[index]), box, pen, rng if split == "train" else None)
    return image, [int(labels[index]) for index in chosen]


def _stamp(image: Image.Image, ink: Image.Image, box, pen, rng) -> None:
    """Draws one scan into its box. rng: Rotates, slants and stretches it a little; None for test
    scans.
    """
    width, height = round(box[2] - box[0]), round(box[3] - box[1])
    mask = ink.resize((4 * width, 4 * height), Image.Resampling.BICUBIC)
    if rng is not None:
        turn, slant = rng.uniform(-0.2, 0.2), rng.uniform(-0.2, 0.2)
        stretch = rng.uniform(0.9, 1.15, 2)
        a, b, c, d = (
            stretch[0] * np.cos(turn),
            np.sin(turn) + slant,
            -np.sin(turn),
            stretch[1] * np.cos(turn),
        )
        cx, cy = 2 * width, 2 * height
        matrix = (a, b, cx - a * cx - b * cy, c, d, cy - c * cx - d * cy)
        mask = mask.transform(mask.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    mask = mask.resize((width, height), Image.Resampling.BOX)
    image.paste(tuple(int(c) for c in pen), (round(box[0]), round(box[1])), mask)


def _turn(task: str, scene: Scene, wanted: int | None) -> list[dict]:
    if task == "read":
        return [_user(PROMPTS["read"]), _assistant(scene.number)]
    if task == "count":
        return [_user(PROMPTS["count"]), _assistant(str(len(scene.digits)))]
    index = scene.digits.index(wanted)
    box = format_box(scene.boxes[index], scene.image.size)
    # The answer reads up to the digit and then gives its box: without these steps a model this
    # small never learns to search.
    read = "".join(map(str, scene.digits[: index + 1]))
    return [
        _user(PROMPTS["locate"].format(wanted)),
        _assistant(f"{read}: <ref>{wanted}</ref><box>[{box}]</box>"),
    ]


def format_box(box, size: tuple[int, int]) -> str:
    """Formats a box as InternVL does: integers 0..1000 relative to the image, rounded to tens."""
    scaled = [
        round(100 * side / length) * 10 for side, length in zip(box, (*size, *size), strict=True)
    ]
    return str([min(1000, max(0, value)) for value in scaled])


def _comparison(first: str, second: str) -> str:
    """Returns the answer, which writes both numbers before it compares them."""
    difference = int(first) - int(second)
    verdict = "Image-1" if difference > 0 else "Image-2" if difference < 0 else "Neither"
    return f"{first}, {second}: {verdict}"


def _user(text: str) -> dict:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def is_right(task: str, expected: str, answered: str) -> bool:
    """Compares texts exactly, boxes by digit, number and IoU (>= 0.5 each, as in RefCOCO)."""
    if task != "locate":
        return expected == answered
    (digit, boxes), (answered_digit, answered_boxes) = _parse(expected), _parse(answered)
    return (
        digit == answered_digit
        and len(boxes) == len(answered_boxes)
        and all(iou(a, b) >= 0.5 for a, b in zip(boxes, answered_boxes, strict=True))
    )


def _parse(text: str) -> tuple[str, list[tuple[int, ...]]]:
    """Returns (digit, boxes) of an answer to "locate"; ("", []) if it has another form."""
    match = re.fullmatch(r"\d+: <ref>(.*)</ref><box>(.*)</box>", text)
    if not match:
        return "", []
    return match[1], [
        tuple(map(int, box)) for box in re.findall(r"\[(\d+), (\d+), (\d+), (\d+)\]", match[2])
    ]


def iou(a, b) -> float:
    """Returns intersection over union of two boxes (left, top, right, bottom)."""
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / area if area > 0 else 0.0
