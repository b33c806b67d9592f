"""Boxes, quadrangles and points that an answer names, in pixels of the images that it is about.

    <ref>a cat</ref><box>[[x1, y1, x2, y2], ...]</box>      opposite corners
    <ref>a sign</ref><quad>[[x1, y1, ..., x4, y4]]</quad>    four corners in order
    <box>[[x, y]]</box>, <point>[[x, y]]</point>, <point>x y</point>, click(x=.., y=..)

Coordinates are thousandths of the width and height of the whole image (InternVL's
chat_data_format). Four numbers whose sum is below 4 are fractions, as in InternVL's evaluation of
grounding; so are other numbers that are at most 1 and not all whole. Points and actions are what
agents for graphical interfaces write.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

from internvl3_jax.io.terminal import excerpt

THOUSAND = 1000
KINDS = {2: "point", 4: "box", 8: "quad"}
ACTIONS = (
    "click|left_click|right_click|double_click|doubleClick|rightClick|tripleClick|tap|long_press|"
    "moveTo|move_to|dragTo|drag_to|hover|scroll"
)
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
_PART = re.compile(
    r"<ref>(?P<ref>.*?)</ref>"
    r"|<(?P<tag>box|quad|point)>(?P<body>.*?)"
    r"(?:</(?P=tag)>|(?P<open>$|(?=<(?:ref|box|quad|point)>)))"
    rf"|\b(?P<action>{ACTIONS})\(\s*x\s*=\s*(?P<x>{_NUMBER})\s*,\s*y\s*=\s*(?P<y>{_NUMBER})",
    re.DOTALL,
)
_GROUP = re.compile(r"[\[(]([^\[\]()]*)[\])]")
_NUMBERS = re.compile(rf"\s*{_NUMBER}(?:\s*[,\s]\s*{_NUMBER})*\s*")
_LABEL = re.compile(r"([A-Za-z]+)[- ]?(\d+):?\s*$")


@dataclasses.dataclass(frozen=True)
class ShownImage:
    """An image that an answer may be about.

    Attributes:
      width, height: in pixels, before it was tiled.
      label: by which the question calls it, such as "Image-2"; "" if it does not.
    """

    width: int
    height: int
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Box:
    """A region or point that an answer names.

    Attributes:
      kind: "box", "quad" or "point".
      label: text of the <ref> before it, or the action; None without one.
      values: the numbers as the model wrote them; empty if it is malformed.
      image: number of the image among those of the question, from 1; None if there are several and
        the answer names none of them.
      pixels: x and y of the corners in that image, in turn, as floats within it; a box has its
        upper left and its lower right corner. None without an image, or if it is malformed or is
        outside.
      problem: what is wrong with it; "" if nothing is.
    """

    kind: str
    label: str | None
    values: tuple[float, ...]
    image: int | None = None
    pixels: tuple[float, ...] | None = None
    problem: str = ""

    def on(self, number: int, shown: ShownImage) -> "Box":
        """Returns the box on an image of a number from 1."""
        if not self.values:
            return dataclasses.replace(self, image=number)
        return _located(dataclasses.replace(self, problem=""), number, shown)


def parse_boxes(text: str, images: Sequence[ShownImage] = ()) -> list[Box]:
    """Returns all that an answer points at, in its order. What is malformed has a `problem`.

    A box is in the only image or, of several, in the one that the answer named last before it.
    """
    boxes, label, end = [], None, None  # end: of the last box with this label
    for match in _PART.finditer(text):
        if match["ref"] is not None:
            label, end = match["ref"].strip(), None
            continue
        if end is not None and re.search(r"\w", text[end : match.start()]):
            label = None  # further boxes of a <ref> follow directly
        end = match.end()
        number = 1 if len(images) == 1 else _named_image(text[: match.start()], images)
        if match["action"]:
            label = None
            found = [Box("point", match["action"], (float(match["x"]), float(match["y"])))]
        else:
            found = _read(match["tag"], match["body"], label, match["open"] is not None)
        boxes += [box.on(number, images[number - 1]) if number else box for box in found]
    return boxes


def labels_of(text: str, count: int) -> list[str]:
    """Returns what a question calls each of its first `count` images: "Image-2" of
    "Image-2: <image>", "" where nothing stands before the tag.
    """
    parts = text.split("<image>")[:count]
    found = [_LABEL.search(part) for part in parts]
    return [f"{match[1]}-{match[2]}" if match else "" for match in found]


def _read(tag: str, body: str, label: str | None, is_open: bool) -> list[Box]:
    """Returns the boxes between <tag> and </tag>."""
    if is_open:
        problem = f"<{tag}> has no end: {excerpt(body.strip())}"
        return [Box(tag, label, (), problem=problem)]
    groups = _GROUP.findall(body) or [body]
    rest = _GROUP.sub("", body) if _GROUP.search(body) else ""
    balanced = all(body.count(left) == body.count(right) for left, right in ("[]", "()"))
    is_clean = balanced and not re.sub(r"[\s,\[\]()]", "", rest)
    if not is_clean or not all(map(_NUMBERS.fullmatch, groups)):
        problem = f"<{tag}> holds {excerpt(body.strip())}; expected numbers"
        return [Box(tag, label, (), problem=problem)]
    numbers = [tuple(map(float, re.findall(_NUMBER, group))) for group in groups]
    # The corners of a quadrangle, or of a box, may be pairs.
    together = {"quad": 4, "box": 2}.get(tag, 0)
    if together and len(numbers) % together == 0 and all(len(pair) == 2 for pair in numbers):
        numbers = [
            sum(numbers[start : start + together], ()) for start in range(0, len(numbers), together)
        ]
    return [_checked(tag, label, values) for values in numbers]


def _checked(tag: str, label: str | None, values: tuple[float, ...]) -> Box:
    known = {"box": (4, 2, 8), "quad": (8,), "point": (2,)}[tag]
    if len(values) not in known or not all(map(math.isfinite, values)):
        problem = f"<{tag}> has {len(values)} numbers; expected {known[0]}"
        if len(values) in known:
            problem = f"<{tag}> has a number that is too large"
        return Box(tag, label, (), problem=problem)
    return Box(KINDS[len(values)], label, values)


def _named_image(before: str, images: Sequence[ShownImage]) -> int | None:
    """Returns the number of the image whose label occurs last in a text; None if none does."""
    labels = [image.label for image in images]
    last = (-1, None)
    for number, label in enumerate(labels, 1):
        if not label or labels.count(label) > 1:
            continue
        word, digits = label.split("-")
        pattern = rf"\b{word}[- ]?{digits}(?!\d)"
        for match in re.finditer(pattern, before, re.IGNORECASE):
            last = max(last, (match.start(), number))
    return last[1]


def _located(box: Box, number: int, shown: ShownImage) -> Box:
    """Returns a well-formed box with its pixels in an image."""
    whole = all(value == int(value) for value in box.values)
    is_fraction = sum(box.values) < 4 if box.kind == "box" else max(box.values) <= 1 and not whole
    scale = 1 if is_fraction else THOUSAND
    sides = (shown.width, shown.height)
    points = [value / scale * sides[n % 2] for n, value in enumerate(box.values)]
    problems = []
    if box.kind == "box":
        ordered = [min(points[0], points[2]), min(points[1], points[3])]
        ordered += [max(points[0], points[2]), max(points[1], points[3])]
        if ordered != points:
            problems.append("its corners were exchanged")
        points = ordered
    xs, ys = points[::2], points[1::2]
    if max(xs) < 0 or max(ys) < 0 or min(xs) > sides[0] or min(ys) > sides[1]:
        return dataclasses.replace(box, image=number, problem="is outside of the image")
    clipped = [min(max(value, 0.0), float(sides[n % 2])) for n, value in enumerate(points)]
    if clipped != points:
        problems.append("reaches beyond the image and is clipped")
    pixels = tuple(round(value, 2) for value in clipped)
    return dataclasses.replace(box, image=number, pixels=pixels, problem="; ".join(problems))
