"""Draws boxes, quadrangles and points with their labels, and the grid of tiles, on an image.

Lines are a color on a white and a black line, so that one of them shows on any background. A label
is black or white, whichever is easier to read, on a plate of its box's color.
"""

import functools
import os
import pathlib
import sys
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from internvl3_jax.config import ProcessorConfig
from internvl3_jax.data.boxes import Box
from internvl3_jax.data.media.tiles import choose_grid

# Okabe and Ito (2008), which color-blind readers can tell apart.
COLORS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
FONT_FOLDERS = {
    "darwin": ("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"),
    "win32": (os.path.join(os.environ.get("WINDIR", "C:\\Windows"), "Fonts"),),
}.get(sys.platform, ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts"))
_ABSENT = "\U0010ffff"  # no font has it


def draw_boxes(image: Image.Image, boxes: Sequence[Box]) -> tuple[Image.Image, list[str]]:
    """Returns a copy of an RGB image with all boxes that have pixels, and remarks on labels.

    Boxes of one label have one color. The remarks name characters that no installed font has; they
    are written as U+ and their number.
    """
    canvas = image.convert("RGB")
    draw = ImageDraw.Draw(canvas)
    size = max(12, round(min(canvas.size) / 32))
    width = max(2, size // 6)
    names = list(dict.fromkeys(box.label for box in boxes))
    plates, remarks = [], []
    drawn = [box for box in boxes if box.pixels is not None]
    for box in drawn:
        _outline(draw, box, COLORS[names.index(box.label) % len(COLORS)], width)
    # Labels come last, so that no line crosses them.
    for box in drawn:
        color = COLORS[names.index(box.label) % len(COLORS)]
        text = box.label or ("" if len(drawn) == 1 else str(boxes.index(box) + 1))
        if not text:
            continue
        text, font, remark = _readable(text, size)
        plates.append(_plate(draw, box, text, font, color, plates, canvas.size))
        remarks += [remark] if remark and remark not in remarks else []
    return canvas, remarks


def draw_tiles(image: Image.Image, tiles: int, processor: ProcessorConfig) -> Image.Image:
    """Returns a copy of an image with the grid of its tiles, each numbered in reading order.

    tiles: how many it was cut into, thumbnail included.
    """
    canvas = image.convert("RGB")
    draw = ImageDraw.Draw(canvas)
    count = tiles - (tiles > 1 and processor.use_thumbnail)
    columns, rows = choose_grid(*canvas.size, count, count, processor.image_size)
    size = max(12, round(min(canvas.size) / 40))
    across = [canvas.width * column / columns for column in range(columns + 1)]
    down = [canvas.height * row / rows for row in range(rows + 1)]
    for x in across[1:-1]:
        _line(draw, [(x, 0), (x, canvas.height)], "#ffffff", 1)
    for y in down[1:-1]:
        _line(draw, [(0, y), (canvas.width, y)], "#ffffff", 1)
    font = ImageFont.load_default(size)
    for number in range(columns * rows):
        corner = across[number % columns] + 3, down[number // columns] + 3
        box = draw.textbbox(corner, str(number + 1), font)
        draw.rectangle([box[0] - 2, box[1] - 2, box[2] + 2, box[3] + 2], "black")
        draw.text(corner, str(number + 1), "white", font)
    return canvas


def text_color(background: str) -> str:
    """Returns black or white, whichever has more contrast (WCAG) to a color such as "#e69f00"."""
    return max(("#000000", "#ffffff"), key=lambda color: contrast(color, background))


def contrast(first: str, second: str) -> float:
    """Returns the contrast ratio of two colors by WCAG, from 1 to 21."""
    dark, bright = sorted((_luminance(first), _luminance(second)))
    return (bright + 0.05) / (dark + 0.05)


def _luminance(color: str) -> float:
    channels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _outline(draw: ImageDraw.ImageDraw, box: Box, color: str, width: int) -> None:
    points = list(zip(box.pixels[::2], box.pixels[1::2], strict=True))
    if box.kind == "box":
        (left, top), (right, bottom) = points
        points = [(left, top), (right, top), (right, bottom), (left, bottom)]
    if box.kind == "point":
        ((x, y),) = points
        arm = 6 * width
        _line(draw, [(x - arm, y), (x + arm, y)], color, width)
        _line(draw, [(x, y - arm), (x, y + arm)], color, width)
        return
    # A line on the border would be half outside.
    low, high = width, [side - 1 - width for side in draw.im.size]
    inside = [(min(max(x, low), high[0]), min(max(y, low), high[1])) for x, y in points]
    _line(draw, [*inside, inside[0]], color, width)


def _line(draw: ImageDraw.ImageDraw, points: list, color: str, width: int) -> None:
    for shade, extra in (("#000000", 4), ("#ffffff", 2), (color, 0)):
        draw.line(points, shade, width + extra, joint="curve")


def _plate(draw, box: Box, text: str, font, color: str, plates: list, size) -> tuple:
    """Draws a label near the upper left corner of a box, clear of other labels; returns its place.

    The place is (left, top, right, bottom), within the image.
    """
    left, top, right, bottom = draw.textbbox((0, 0), text, font)
    width, height = min(right - left + 6, size[0]), bottom - top + 6
    beside = 8 if box.kind == "point" else 0  # not on the point itself
    x = min(max(min(box.pixels[::2]) + beside, 0), size[0] - width)
    above = min(box.pixels[1::2]) - height
    y = min(above if above >= 0 else min(box.pixels[1::2]), max(0, size[1] - height))
    place = (x, max(0, y), x + width, max(0, y) + height)
    while any(_overlap(place, other) for other in plates) and place[3] + height <= size[1]:
        place = (x, place[1] + height, x + width, place[3] + height)
    draw.rectangle(place, color, "black")
    draw.text((place[0] + 3 - left, place[1] + 3 - top), text, text_color(color), font)
    return place


def _overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _readable(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont, str]:
    """Returns a label, a font that has all of its characters, and a remark if there is none."""
    text = " ".join(text.split())
    default = ImageFont.load_default(size)
    if _has_all(default, text):
        return text, default, ""
    path = _font_with(text)
    if path is not None:
        return text, ImageFont.truetype(path, size), ""
    missing = sorted({char for char in text if not _has_all(default, char)})
    written = "".join(char if char not in missing else f"U+{ord(char):04X} " for char in text)
    remark = (
        f"no installed font has {' '.join(missing)}, so that a label has their numbers; install "
        "one, such as Noto Sans CJK"
    )
    return " ".join(written.split()), default, remark


@functools.lru_cache(maxsize=256)
def _font_with(text: str) -> str | None:
    """Returns the file of an installed font that has all characters of a text."""
    for folder in FONT_FOLDERS:
        files = pathlib.Path(os.path.expanduser(folder)).rglob("*")
        fonts = [file for file in files if file.suffix.lower() in _FONT_SUFFIXES]
        # "Last resort" fonts have a sign for each script in place of its characters.
        fonts = [file for file in fonts if "lastresort" not in file.stem.lower()]
        for path in sorted(fonts, key=_font_order):
            try:
                font = ImageFont.truetype(str(path), 16)
            except OSError:  # of a kind that FreeType does not read
                continue
            if _has_all(font, text):
                return str(path)
    return None


_FONT_SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")


def _font_order(path: pathlib.Path) -> tuple:
    """Returns the sort key of a font: upright sans serif of normal weight comes first."""
    name = path.stem.lower()
    styled = any(style in name for style in ("bold", "oblique", "italic", "light", "mono", "cond"))
    return "sans" not in name, styled, str(path)


def _has_all(font: ImageFont.FreeTypeFont, text: str) -> bool:
    """Returns whether a font has a glyph for every character of a text."""
    absent = _bitmap(font, _ABSENT)
    return all(char.isspace() or _bitmap(font, char) != absent for char in text)


def _bitmap(font: ImageFont.FreeTypeFont, char: str) -> tuple:
    mask = font.getmask(char)
    return mask.size, bytes(mask)
