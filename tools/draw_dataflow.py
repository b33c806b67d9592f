"""Draws docs/images/dataflow.svg: from an image and a question to logits, with the shapes and the
source file of every step.

python tools/draw_dataflow.py

The result is the same text every time, so a test compares it with the committed file.
"""

import pathlib
from html import escape

from internvl3_jax.config import UNITS
from internvl3_jax.positions import build_positions, parse_delta

PATH = pathlib.Path(__file__).resolve().parent.parent / "docs" / "images" / "dataflow.svg"
WIDTH, HEIGHT = 1200, 560
INK, GRAY, LINE = "#1f2933", "#616e7c", "#9aa5b1"
VISION, TEXT, BOTH = ("#fde8d7", "#c05621"), ("#dbeafe", "#1d4ed8"), ("#e3f4e8", "#2f855a")
SANS = "Helvetica, Arial, sans-serif"
MONO = "Menlo, Consolas, 'DejaVu Sans Mono', monospace"

# (title, shape, source file), in the order of the flow
VISION_STEPS = (
    ("image", "any size, RGB", "data/media/images.py"),
    ("tiles", "u8[N, 448, 448, 3]", "data/media/tiles.py"),
    ("InternViT", "bf16[N, 1024, C]", "model/vision.py"),
    ("pixel unshuffle", "bf16[N, 256, 4C]", "model/projector.py"),
    ("MLP projector", "bf16[N, 256, D]", "model/projector.py"),
)
TEXT_STEPS = (
    ("messages", "system, user, assistant", "data/text/chat_template.py"),
    ("token ids", "i32[T]", "data/text/tokenizer.py"),
    ("merge", "bf16[T, D]", "model/internvl.py"),
    ("decoder", "bf16[T, D]", "model/language.py"),
    ("logits", "f32[T, V]", "model/language.py"),
)
# A short prompt; "" is a visual token. The positions under it are those that the model gets.
PROMPT = ["user", "<img>", *[""] * 8, "</img>", "What", "is", "it", "?"]
DELTA = "1/4"
BOX_WIDTH, BOX_HEIGHT, GAP = 196, 86, 35
LEFT = (WIDTH - 5 * BOX_WIDTH - 4 * GAP) // 2


def main() -> None:
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(draw(), encoding="utf-8")


def draw() -> str:
    """Returns the SVG document."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        ' aria-labelledby="title">',
        '<title id="title">Data flow of InternVL3: image, tiles, InternViT, pixel unshuffle and'
        " projector give visual tokens; messages give token ids; both are merged, get V2PE"
        " positions and enter the decoder, which gives logits.</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7"'
        ' markerHeight="7" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{GRAY}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="#ffffff"/>',
    ]
    for index, step in enumerate(VISION_STEPS):
        parts += box(column(index), 24, *step, VISION)
    for index, step in enumerate(TEXT_STEPS):
        parts += box(column(index), 196, *step, TEXT if index < 2 else BOTH)
    for index in range(4):
        parts.append(arrow((column(index) + BOX_WIDTH, 67), (column(index + 1) - 3, 67)))
        parts.append(arrow((column(index) + BOX_WIDTH, 239), (column(index + 1) - 3, 239)))
    parts += unshuffle(column(3) + BOX_WIDTH // 2, 128)
    parts += feature_path()
    parts += positions(LEFT, 356)
    return "\n".join([*parts, "</svg>", ""])


def column(index: int) -> int:
    return LEFT + index * (BOX_WIDTH + GAP)


def box(x: int, y: int, title: str, shape: str, path: str, colors: tuple[str, str]) -> list[str]:
    fill, edge = colors
    middle = x + BOX_WIDTH // 2
    return [
        f'<rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="8" fill="{fill}"'
        f' stroke="{edge}" stroke-width="1.5"/>',
        text(middle, y + 28, title, 18, weight="bold"),
        text(middle, y + 51, shape, 13, family=MONO),
        text(middle, y + 72, path, 11.5, color=GRAY, family=MONO),
    ]


def text(
    x: float,
    y: float,
    content: str,
    size: float,
    *,
    color: str = INK,
    family: str = SANS,
    weight: str = "normal",
    anchor: str = "middle",
) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-family="{family}" font-size="{size:g}"'
        f' font-weight="{weight}" fill="{color}" text-anchor="{anchor}">{escape(content)}</text>'
    )


def arrow(*points: tuple[float, float]) -> str:
    line = " ".join(f"{x:g},{y:g}" for x, y in points)
    return (
        f'<polyline points="{line}" fill="none" stroke="{GRAY}" stroke-width="1.8"'
        ' marker-end="url(#tip)"/>'
    )


def unshuffle(center: int, y: int) -> list[str]:
    """Draws four neighboring patches that become one token."""
    side, left = 13, center - 62
    squares = [
        f'<rect x="{left + 15 * column}" y="{y + 15 * row}" width="{side}" height="{side}"'
        f' fill="{VISION[0]}" stroke="{VISION[1]}"/>'
        for row in range(2)
        for column in range(2)
    ]
    token = (
        f'<rect x="{center + 12}" y="{y + 8}" width="52" height="{side}" fill="{VISION[0]}"'
        f' stroke="{VISION[1]}"/>'
    )
    return [*squares, arrow((center - 28, y + 14), (center + 6, y + 14)), token]


def feature_path() -> list[str]:
    """Draws the arrow from the projector down to the merge, whose image tokens the features
    replace.
    """
    x, merge = column(4) + BOX_WIDTH // 2, column(2) + BOX_WIDTH // 2
    line = arrow((x, 110), (x, 176), (merge, 176), (merge, 193))
    return [line, text(merge - 12, 170, "visual features", 12, color=GRAY, anchor="end")]


def positions(x: int, y: int) -> list[str]:
    """Draws the tokens of a short prompt, their positions, and these on a ruler."""
    cell, count = 64, len(PROMPT)
    images = [(PROMPT.index(""), PROMPT.count(""))]
    values = build_positions(count, images, [parse_delta(DELTA)]) / UNITS
    left = x + (5 * BOX_WIDTH + 4 * GAP - cell * count) // 2
    drawn = [
        text(x, y, "V2PE positions", 18, weight="bold", anchor="start"),
        text(x + 172, y, "positions.py", 11.5, color=GRAY, family=MONO, anchor="start"),
        text(
            x + 272,
            y,
            f"text advances by 1, visual tokens by delta (here {DELTA});"
            " exact integers in units of 1/256",
            13,
            color=GRAY,
            anchor="start",
        ),
        arrow((column(3) + BOX_WIDTH // 2, y - 22), (column(3) + BOX_WIDTH // 2, 285)),
    ]
    for index, (word, value) in enumerate(zip(PROMPT, values, strict=True)):
        fill, edge = VISION if not word else TEXT
        middle = left + cell * index + cell / 2
        drawn += [
            f'<rect x="{left + cell * index + 2}" y="{y + 22}" width="{cell - 4}" height="30"'
            f' rx="4" fill="{fill}" stroke="{edge}"/>',
            text(middle, y + 42, word or "visual", 13 if word else 11.5),
            text(middle, y + 72, f"{value:g}", 13, family=MONO),
        ]
        # A ruler: where the position is between 0 and that of the last token.
        ruler = left + cell / 2 + value / values[-1] * cell * (count - 1)
        drawn.append(
            f'<line x1="{middle:g}" y1="{y + 82}" x2="{ruler:g}" y2="{y + 140}"'
            f' stroke="{edge}" stroke-width="1.2"/>'
        )
    end = left + cell * count - cell / 2
    drawn.append(
        f'<line x1="{left + cell / 2:g}" y1="{y + 140}" x2="{end:g}" y2="{y + 140}"'
        f' stroke="{LINE}" stroke-width="2"/>'
    )
    for whole in range(int(values[-1]) + 1):
        tick = left + cell / 2 + whole / values[-1] * cell * (count - 1)
        drawn.append(text(tick, y + 160, str(whole), 12, family=MONO))
    drawn.append(
        text(
            column(3) + BOX_WIDTH // 2 + 12,
            y - 40,
            "rotary embedding",
            12,
            color=GRAY,
            anchor="start",
        )
    )
    return drawn


if __name__ == "__main__":
    main()
