"""Computes the cost of images without a model: tiles, tokens, positions and key/value cache.

    python -m internvl3_jax.data.tokens IMAGE_OR_SIZE... [--max_tiles 12] [--delta 1/4]
        [--video FILE] [--num_frames 16] [--pdf FILE] [--pages 2-5]
        [--size 1b,8b] [--text_tokens 64] [--json]

Each argument is an image file or a size such as 1920x1080. All of them, the videos and the PDFs
together make one prompt. Each image may have --max_tiles tiles, as at inference; with --tiles
shared all images together, as in training. With a video or a PDF, what is not given is chosen as at
inference (data/plan.py), and the label of a frame or page counts as text.
"""

import dataclasses
import json
import os
import re
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from internvl3_jax import cli
from internvl3_jax.config import TILE_RULES, UNITS, LanguageConfig, ModelConfig, ProcessorConfig
from internvl3_jax.data.media.given import Document, Video
from internvl3_jax.data.media.images import MAX_PIXELS, ImageError, open_image
from internvl3_jax.data.media.inputs import Opened, OpenedDocument, OpenedVideo
from internvl3_jax.data.media.tiles import grid_tiles, image_grid, image_limit
from internvl3_jax.data.media_tokens import plan_media
from internvl3_jax.io import command_line
from internvl3_jax.io.terminal import one_line
from internvl3_jax.positions import parse_delta
from internvl3_jax.sizes import SIZES

RULE_IN_WORDS = {"per image": "for each image", "shared": "shared by all images"}
RELEASED_SIZES = tuple(name for name in SIZES if name != "tiny")


@dataclasses.dataclass(frozen=True)
class ImageCost:
    """The cost of one image in a prompt.

    Attributes:
      tiles: With the thumbnail.
      tokens: Visual tokens, <img> and </img>.
      positions: By how much the image moves the text after it.
    """

    width: int
    height: int
    columns: int
    rows: int
    tiles: int
    visual_tokens: int
    tokens: int
    positions: int


def image_cost(
    width: int,
    height: int,
    processor: ProcessorConfig,
    max_tiles: int | None = None,
    delta: int | None = None,
) -> ImageCost:
    """Computes the cost of an image of width x height pixels.

    Args:
      processor: Tile rule and tokens per tile.
      max_tiles: Limit without the thumbnail; None takes processor.max_tiles.
      delta: Step of a visual token in units of 1/256 (see `positions.parse_delta`); None takes
        processor.delta.

    Raises:
      ValueError: The image has no pixels, or the limit is below one tile.
    """
    columns, rows = image_grid(width, height, processor, max_tiles)
    tiles = grid_tiles(columns, rows, processor)
    visual_tokens = tiles * processor.tokens_per_tile
    units = visual_tokens * (processor.delta if delta is None else delta)
    positions = -(-units // UNITS) + 2  # the end of the run is rounded up to a whole position
    return ImageCost(
        width, height, columns, rows, tiles, visual_tokens, visual_tokens + 2, positions
    )


def frame_cost(count: int, tiles: int, processor: ProcessorConfig, delta: int) -> ImageCost:
    """Computes the cost of `count` frames of `tiles` tiles each; width, height and grid are 0."""
    visual = tiles * processor.tokens_per_tile
    positions = -(-visual * delta // UNITS) + 2
    values = (tiles, visual, visual + 2, positions)
    return ImageCost(0, 0, 0, 0, *(count * value for value in values))


def cache_bytes_per_token(language: LanguageConfig, bytes_per_value: int = 2) -> int:
    """Returns the bytes of one token's keys and values in all layers, by default in bfloat16."""
    return 2 * language.num_layers * language.num_kv_heads * language.head_dim * bytes_per_value


def prompt_report(
    named_sizes: Sequence[tuple[str, int, int]],
    model_sizes: Sequence[str],
    max_tiles: int,
    delta: int,
    text_tokens: int,
    tiles: str = "per image",
    max_total_tiles: int = 0,
    media: Sequence[Opened] = (),
    is_open: Sequence[str] = (),
) -> dict:
    """Computes the cost of one prompt with all images (name, width, height), as --json prints it.

    Args:
      tiles, max_total_tiles: As in `ProcessorConfig`.
      media: Videos and documents.
      is_open: Which of "max_tiles" and "delta" are chosen as at inference, if there are any.

    Raises:
      ValueError: A model size is unknown, or the sizes cut images differently (tiny and others).
      PlanError: The videos and documents do not fit.
    """
    models = [_model(size) for size in model_sizes]
    processor = _common_processor(models, model_sizes)
    processor = dataclasses.replace(
        processor, max_tiles=max_tiles, tiles=tiles, max_total_tiles=max_total_tiles
    )
    limit = image_limit(processor, len(named_sizes))
    plan, rows = None, []
    if media:
        sizes = [size for _, *size in named_sizes]
        given = {"max_tiles": max_tiles, "delta": delta}
        given |= dict.fromkeys(is_open)
        language = models[0].language
        planned = plan_media(sizes, media, processor, language, **given, text_tokens=text_tokens)
        plan, limit, delta = planned.choice.plan, planned.choice.max_tiles, planned.choice.deltas[0]
        text_tokens += planned.label_tokens
        named_sizes = [*named_sizes, *planned.pages]
        rows = [
            (f"{name}, {count} frames", frame_cost(count, each, processor, delta))
            for name, count, each in planned.frames
        ]
    rows = [
        (name, image_cost(*size, processor, limit, delta)) for name, *size in named_sizes
    ] + rows
    costs = [cost for _, cost in rows]
    prompt_tokens = text_tokens + sum(cost.tokens for cost in costs)
    positions = text_tokens + sum(cost.positions for cost in costs)
    return {
        "delta": str(Fraction(delta, UNITS)),
        "tile_rule": tiles,
        "max_tiles": max_tiles,
        "max_total_tiles": max_total_tiles,
        "max_tiles_per_image": limit,
        "images": [{"name": name} | dataclasses.asdict(cost) for name, cost in rows],
        "plan": plan and dataclasses.asdict(plan) | {"line": plan.line()},
        "text_tokens": text_tokens,
        "prompt_tokens": prompt_tokens,
        "positions": positions,
        "kv_cache": {
            size: _cache(model.language, prompt_tokens)
            for size, model in zip(model_sizes, models, strict=True)
        },
    }


def _cache(language: LanguageConfig, tokens: int) -> dict:
    return {
        "bytes_per_token": cache_bytes_per_token(language),
        "bytes": tokens * cache_bytes_per_token(language),
        "max_position": language.max_position,
    }


def _model(size: str) -> ModelConfig:
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; choose from {', '.join(SIZES)} or all")
    return SIZES[size]


def _common_processor(models: Sequence[ModelConfig], model_sizes: Sequence[str]) -> ProcessorConfig:
    shapes = {(model.vision.image_size, model.tokens_per_tile) for model in models}
    if len(shapes) > 1:
        raise ValueError(
            f"sizes {', '.join(model_sizes)} cut images into different tiles; ask for them one at "
            f"a time"
        )
    image_size, tokens_per_tile = shapes.pop()
    return ProcessorConfig(image_size=image_size, tokens_per_tile=tokens_per_tile)


def print_report(report: dict) -> None:
    """Prints the report as two tables, without lines and colors if not on a terminal."""
    terminal = sys.stdout.isatty()
    console = Console(highlight=False, markup=False, emoji=False, width=None if terminal else 160)
    style = box.SIMPLE if terminal else None
    images = Table("image", box=style, pad_edge=False)
    for heading in ("pixels", "grid", "tiles", "visual tokens", "tokens", "positions"):
        images.add_column(heading, justify="right")
    for cost in report["images"]:
        sides = ("width", "height"), ("columns", "rows")
        pixels, grid = (f"{cost[a]} x {cost[b]}" if cost[a] else "" for a, b in sides)
        counts = (cost["tiles"], cost["visual_tokens"], cost["tokens"], cost["positions"])
        images.add_row(one_line(cost["name"]), pixels, grid, *(f"{count:,}" for count in counts))
    text = f"{report['text_tokens']:,}"
    images.add_row("text", "", "", "", "", text, text)
    tiles, visual = (
        sum(cost[key] for cost in report["images"]) for key in ("tiles", "visual_tokens")
    )
    totals = (tiles, visual, report["prompt_tokens"], report["positions"])
    images.add_row("prompt", "", "", *(f"{total:,}" for total in totals))
    console.print(images)
    console.print(
        f"grid: columns x rows, at most {report['max_tiles_per_image']} tiles; tiles: with the "
        f"thumbnail"
    )
    total = f", at most {report['max_total_tiles']} in all" if report["max_total_tiles"] else ""
    console.print(
        f"tile rule: {report['max_tiles']} tiles {RULE_IN_WORDS[report['tile_rule']]}{total}, "
        f"thumbnails apart"
    )
    console.print(f"positions: at delta {report['delta']}")
    plan = f"plan: {report['plan']['line']}\n" if report["plan"] else ""
    console.print(plan, soft_wrap=True)

    caches = Table("model", box=style, pad_edge=False)
    for heading in ("KV cache (bf16)", "per token", "of its context"):
        caches.add_column(heading, justify="right")
    for size, cache in report["kv_cache"].items():
        share = f"{report['positions'] / cache['max_position']:.1%}"
        caches.add_row(
            size,
            f"{cache['bytes'] / 2**20:,.1f} MiB",
            f"{cache['bytes_per_token'] / 2**10:,.0f} KiB",
            share,
        )
    console.print(caches)


def _image_size(argument: str, limits: dict) -> tuple[str, int, int]:
    """Returns (name, width, height) of an image file, or of a size such as 1920x1080.

    limits: Arguments of `open_image`.
    """
    size = re.fullmatch(r"(\d{1,9})x(\d{1,9})", argument)
    if size and not Path(argument).exists():
        return argument, int(size[1]), int(size[2])
    image = open_image(os.path.expanduser(argument), **limits)
    return argument, image.width, image.height


SECTIONS = {  # flags by the headings of --help
    "Images": ["max_tiles", "tiles", "max_total_tiles", "max_image_pixels", "allow_truncated"],
    "Videos and documents": ["video", "num_frames", "pdf", "pages"],
    "Prompt and models": ["delta", "text_tokens", "size"],
    "Output": ["json"],
}


def _define_flags() -> flags.FlagValues:
    # Own flag values, so that importing the module does not define flags of other programs.
    values = flags.FlagValues()
    flags.DEFINE_integer(
        "max_tiles",
        12,
        "Tiles, thumbnails apart; of what, --tiles says.",
        1,
        10_000,
        flag_values=values,
    )
    rule = "What --max_tiles limits: each image (inference) or all images together (training)."
    flags.DEFINE_enum("tiles", "per image", [*TILE_RULES, "per_image"], rule, flag_values=values)
    flags.DEFINE_integer(
        "max_total_tiles",
        0,
        "Tiles of all images together, thumbnails apart; 0: no limit.",
        0,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "max_image_pixels",
        MAX_PIXELS,
        "Larger images are refused; 0: no limit.",
        0,
        flag_values=values,
    )
    flags.DEFINE_bool(
        "allow_truncated", False, "Read images whose end is missing.", flag_values=values
    )
    flags.DEFINE_string(
        "delta", "1", "Position step of a visual token, such as 1/4.", flag_values=values
    )
    flags.DEFINE_multi_string("video", [], "Video; may be repeated.", flag_values=values)
    flags.DEFINE_integer(
        "num_frames", None, "Frames of each video; default: up to 32.", 1, flag_values=values
    )
    flags.DEFINE_multi_string("pdf", [], "PDF; may be repeated.", flag_values=values)
    flags.DEFINE_string("pages", None, "Pages of each PDF, such as 2-5,8.", flag_values=values)
    flags.DEFINE_string(
        "size",
        "all",
        f"Model sizes, such as 1b,8b, from {', '.join(SIZES)}; or all.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "text_tokens", 64, "Tokens of the text around the images.", 0, flag_values=values
    )
    flags.DEFINE_bool("json", False, "Print one JSON object instead of tables.", flag_values=values)
    flags.DEFINE_bool("help", False, "Print this help.", short_name="h", flag_values=values)
    return values


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status."""
    values = _define_flags()
    try:
        arguments = values(argv)[1:]
        if values.help or not (arguments or values.video or values.pdf):
            print(
                cli.as_typed(command_line.help_text(__doc__, SECTIONS, values=values)),
                file=sys.stdout if values.help else sys.stderr,
            )
            return 0 if values.help else 2
        model_sizes = RELEASED_SIZES if values.size == "all" else values.size.split(",")
        delta = parse_delta(values.delta)
        limits = {"max_pixels": values.max_image_pixels, "allow_truncated": values.allow_truncated}
        named_sizes = [_image_size(name, limits) for name in arguments]
        media = [
            *(OpenedVideo(Video(path, values.num_frames)) for path in values.video),
            *(OpenedDocument(Document(path, values.pages)) for path in values.pdf),
        ]
        is_open = [name for name in ("max_tiles", "delta") if values[name].using_default_value]
        rule = values.tiles.replace("_", " ")
        limits = values.max_tiles, delta, values.text_tokens, rule, values.max_total_tiles
        report = prompt_report(named_sizes, model_sizes, *limits, media, is_open)
    except (flags.Error, ImageError, ValueError) as error:
        print(f"tokens: {error}", file=sys.stderr)
        return 2
    if values.json:
        print(json.dumps(report))
    else:
        print_report(report)
    return 0


if __name__ == "__main__":
    sys.exit(command_line.call(lambda: main(sys.argv)))
