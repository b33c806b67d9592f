"""Draws docs/images/hero.png: an image, its tiles, and the shipped model's own answer with the box
that it names.

python tools/draw_hero.py
"""

import json
import pathlib

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from internvl3_jax import Chat, load
from internvl3_jax.data.media.images import open_image
from internvl3_jax.data.media.tiles import cut_tiles

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "tiny_digits"
QUESTION = 10  # of questions.jsonl
INK, PAPER, ACCENT = "#1f2933", "#ffffff", "#d64545"


def main() -> None:
    row = json.loads((MODEL / "questions.jsonl").read_text().splitlines()[QUESTION - 1])
    image = open_image(MODEL / row["image"][0])
    checkpoint = load(MODEL, dtype="float32")
    chat = Chat(checkpoint, max_new_tokens=96)
    chat(row["prompt"], images=[image])
    answer = chat.last
    tiles = cut_tiles(image, checkpoint.processor)
    figure = Figure(figsize=(12, 3.0), facecolor=PAPER)
    widths = [3, 1, 3, 1, 4]
    left, middle, right = (
        figure.add_gridspec(1, 5, width_ratios=widths, wspace=0.05)[0, n] for n in (0, 2, 4)
    )

    axes = figure.add_subplot(left)
    show(axes, image, f"image, {image.width} x {image.height}")
    left_x, top, right_x, bottom = answer.boxes[0].pixels
    size = right_x - left_x, bottom - top
    axes.add_patch(Rectangle((left_x, top), *size, fill=False, edgecolor=ACCENT, linewidth=3))

    columns = min(len(tiles), 3)
    grid = middle.subgridspec(-(-len(tiles) // columns), columns, wspace=0.12, hspace=0.25)
    for number, tile in enumerate(tiles):
        name = "thumbnail" if number == len(tiles) - 1 and len(tiles) > 1 else f"tile {number + 1}"
        show(figure.add_subplot(grid[number // columns, number % columns]), tile, name, 8)

    axes = figure.add_subplot(right)
    axes.axis("off")
    question = row["prompt"].removeprefix("<image>\n")
    axes.text(
        0, 0.72, question, fontsize=13, color=INK, family="monospace", transform=axes.transAxes
    )
    axes.text(
        0,
        0.42,
        answer.text.replace("<box>", "\n<box>"),
        fontsize=13,
        color=ACCENT,
        family="monospace",
        transform=axes.transAxes,
    )
    note = f"{answer.prompt_tokens} prompt tokens, {len(answer.token_ids)} answer tokens"
    axes.text(0, 0.24, note, fontsize=9, color=INK, transform=axes.transAxes)
    for between in (1, 3):
        place = figure.add_gridspec(1, 5, width_ratios=widths, wspace=0.05)[
            0, between
        ].get_position(figure)
        figure.text(place.x0 + 0.025, 0.47, "→", fontsize=28, color=INK)
    (ROOT / "docs" / "images").mkdir(exist_ok=True)
    figure.savefig(ROOT / "docs" / "images" / "hero.png", dpi=100, facecolor=PAPER)


def show(axes, image, title: str, size: int = 10) -> None:
    axes.imshow(image)
    axes.set_title(title, fontsize=size, color=INK)
    axes.axis("off")


if __name__ == "__main__":
    main()
