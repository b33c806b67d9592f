"""Plans videos and documents for the program that counts tokens: without a model or a tokenizer."""

import dataclasses
from collections.abc import Sequence

from internvl3_jax.config import LanguageConfig, ProcessorConfig
from internvl3_jax.data.media.inputs import OpenedDocument, OpenedImage, OpenedVideo
from internvl3_jax.data.plan import Choice, Room, plan_prompt


@dataclasses.dataclass(frozen=True)
class Planned:
    """Frames and pages that are shown of videos and documents.

    Attributes:
      choice: frames, tiles and deltas.
      frames: (name, number of frames, tiles of each) of each video.
      pages: (name, width, height) in pixels of each page.
      label_tokens: of "Frame-1: ", "Image-1: " and the line breaks, in Qwen's tokenizer.
    """

    choice: Choice
    frames: list[tuple[str, int, int]]
    pages: list[tuple[str, int, int]]
    label_tokens: int


def plan_media(
    image_sizes: Sequence[tuple[int, int]],
    media: Sequence[OpenedVideo | OpenedDocument],
    processor: ProcessorConfig,
    language: LanguageConfig,
    *,
    max_tiles: int | None = None,
    delta: int | None = None,
    text_tokens: int = 0,
) -> Planned:
    """Plans a prompt with videos and documents, without room for an answer.

    Args:
      image_sizes: of the images with them.
      media: videos and documents.
      max_tiles, delta: None leaves them open.
      text_tokens: of the question.

    Raises:
      PlanError: it does not fit.
    """
    images = [OpenedImage(size=tuple(size)) for size in image_sizes]
    videos = [item for item in media if isinstance(item, OpenedVideo)]
    documents = [item for item in media if isinstance(item, OpenedDocument)]
    inputs = [*images, *videos, *documents]
    tiled = len(images) + sum(len(item.pdf.pages) for item in documents)

    def label_tokens(frames: int) -> int:
        counts = [item.shown(frames) for item in videos] + ([tiled] if tiled > 1 else [])
        return sum(_label_tokens(number) for count in counts for number in range(1, count + 1))

    def measure(frames: int) -> tuple[int, int]:
        count = tiled + sum(item.shown(frames) for item in videos)
        total = text_tokens + label_tokens(frames) + count * (processor.tokens_per_tile + 2)
        return total, total

    room = Room(language, 0, None, (), measure)
    deltas = None if delta is None else [delta] * len(inputs)
    choice = plan_prompt(inputs, processor, room, max_tiles, deltas)
    return Planned(
        choice,
        [(item.name, item.shown(choice.frames), item.tiles(processor, 1, 1)[0]) for item in videos],
        [
            (f"{item.pdf.name}, page {page}", *size)
            for item in documents
            for page, size in zip(
                item.pdf.pages, item.page_pixels(processor, choice.max_tiles), strict=True
            )
        ],
        label_tokens(choice.frames),
    )


def _label_tokens(number: int) -> int:
    # One token each for the word, the dash, each digit, the colon, the space and the line break.
    return 5 + len(str(number))
