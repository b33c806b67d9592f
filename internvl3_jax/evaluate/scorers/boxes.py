"""Boxes and points: RefCOCO as InternVL's program, ScreenSpot as VLMEvalKit."""

import re
from collections.abc import Sequence

import numpy as np

_FOUR = re.compile(r"\[*\[(.*?),(.*?),(.*?),(.*?)\]\]*")
_WHOLE = re.compile(r"\[\[(\d+), (\d+), (\d+), (\d+)\]\]")
_POINT = re.compile(r"x=([\d.]+), y=([\d.]+)")
_NAMED = re.compile(r"<ref>([^<]*)</ref><box>\[\[(\d+), (\d+), (\d+), (\d+)\]\]</box>$")
_CLICK = re.compile(r"x\s*=\s*(\d*\.?\d+)\s*,\s*y\s*=\s*(\d*\.?\d+)")


def read_box(answer: str, width: float, height: float) -> np.ndarray:
    """Returns the box f32[4] of an answer, left, top, right and bottom in pixels; zeros if it has
    none. Four numbers that add up to 4 or more are thousandths, others fractions.
    """
    found = _FOUR.search(answer)
    try:
        numbers = [float(field) for field in found.groups()] if found else [0.0] * 4
    except ValueError:
        numbers = [0.0] * 4
    box = np.array(numbers, np.float32)
    if box.sum() >= 4:
        box = box / np.float32(1000)
    return box * np.array([width, height, width, height], np.float32)


def refcoco(
    answer: str, width: float, height: float, reference: Sequence[float]
) -> tuple[float, bool]:
    """Returns (intersection over union in float32, whether it is at least 0.5)."""
    given, expected = read_box(answer, width, height), np.array(reference, np.float32)
    sides = np.minimum(given[2:], expected[2:]) - np.maximum(given[:2], expected[:2])
    common = np.prod(np.maximum(sides, np.float32(0)))
    areas = [np.prod(box[2:] - box[:2]) for box in (given, expected)]
    with np.errstate(divide="ignore", invalid="ignore"):
        iou = float(common / (areas[0] + areas[1] - common))
    return iou, iou >= 0.5


def box_centre(answer: str) -> tuple[float, float] | None:
    """Returns the center of [[x1, y1, x2, y2]], written with whole numbers; None without one."""
    found = _WHOLE.search(answer)
    if found is None:
        return None
    left, top, right, bottom = map(int, found.groups())
    return (left + right) / 2, (top + bottom) / 2


def stored_point(answer: str) -> str:
    """Returns what the kit stores of an answer of ScreenSpot: x=0.15, y=0.3 for a box in
    thousandths, else the answer.
    """
    centre = box_centre(answer)
    return answer if centre is None else f"x={centre[0] / 1000}, y={centre[1] / 1000}"


def screenspot(text: str, reference: Sequence[float], size: Sequence[float]) -> float:
    """Returns 100.0 if the point x=A, y=B is in the box, else 0.0.

    Args:
      text: of `stored_point`.
      reference: left, top, width, height in pixels.
      size: width and height of the image. Coordinates above 1 are pixels.
    """
    found = _POINT.search(text)
    try:
        x, y = (float(found[1]), float(found[2])) if found else (0.0, 0.0)
    except ValueError:  # 1.2.3
        return 0.0
    if x > 1 or y > 1:
        x, y = x / size[0], y / size[1]
    left, top, width, height = reference
    edges = [left, top, left + width - 1, top + height - 1]
    left, top, right, bottom = (0 if edge == -1 else edge for edge in edges)
    inside_x = left / size[0] <= x <= right / size[0]
    inside_y = top / size[1] <= y <= bottom / size[1]
    return 100.0 * (inside_x and inside_y)


def click_point(answer: str) -> str:
    """Returns x=A, y=B of an answer such as pyautogui.click(x=0.23, y=0.38), else the answer."""
    found = _CLICK.search(answer)
    return f"x={float(found[1])}, y={float(found[2])}" if found else answer


def text_or_box(answer: str, reference: str) -> bool:
    """Returns whether an answer is the reference's text or, where that ends with a box, has a box
    for the same name with an intersection over union of at least 0.5. A box is
    <ref>NAME</ref><box>[[x1, y1, x2, y2]]</box> with whole numbers.
    """
    given, expected = _NAMED.search(answer), _NAMED.search(reference)
    if expected is None:
        return answer == reference
    if given is None or given[1] != expected[1]:
        return False
    a, b = (tuple(map(int, found.groups()[1:])) for found in (given, expected))
    common = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - common
    return union > 0 and common / union >= 0.5
