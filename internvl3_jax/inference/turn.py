"""The parts of one turn of a conversation: its messages, and its images cut into tiles.

Images alone are cut by the checkpoint's rule. A turn with a video or a document, or with a budget
for the cache, is planned before that (data/plan.py).
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import UInt8
from PIL import Image

from internvl3_jax.config import UNITS, LanguageConfig
from internvl3_jax.data.batch import Prompt, cut_images
from internvl3_jax.data.boxes import ShownImage, labels_of
from internvl3_jax.data.media.documents import DocumentError
from internvl3_jax.data.media.given import LOCAL, Document, Limits, Video
from internvl3_jax.data.media.images import ImageError
from internvl3_jax.data.media.inputs import Opened, OpenedDocument, OpenedImage, OpenedVideo
from internvl3_jax.data.media.tiles import cut_tiles
from internvl3_jax.data.media.video_file import VideoError
from internvl3_jax.data.plan import Plan, PlanError, Room, plan_prompt
from internvl3_jax.data.text.chat_template import ChatError, encode_chat, insert_missing_tags
from internvl3_jax.data.text.media_tags import frame_lines, place_media
from internvl3_jax.inference.given_images import as_list, open_images
from internvl3_jax.inference.options import Options, resolve_system, units
from internvl3_jax.inference.programs import TOKENS_PER_CALL
from internvl3_jax.inference.prompt_batch import LENGTH_BUCKETS, bucket
from internvl3_jax.io.safe_files import FileError
from internvl3_jax.positions import build_positions, next_position, rope_scaling

# images, videos and documents of a question, as of `Chat`
Inputs = tuple


@dataclasses.dataclass
class Turn:
    """A question, ready to become a prompt.

    Attributes:
      messages: of the whole conversation; the last one is the question.
      tiles: of each new image, frame and page, in the order of their places.
      deltas: V2PE units of each.
      images: each as it was opened, RGB.
      plan: what was chosen so that it fits; None for images alone.
    """

    messages: list[dict]
    tiles: list[UInt8[np.ndarray, "n S S 3"]]
    deltas: list[int]
    images: list[Image.Image]
    plan: Plan | None = None

    @property
    def shown(self) -> list[ShownImage]:
        """Returns the sizes of the images before they were tiled, and their labels."""
        labels = labels_of(self.messages[-1]["content"], len(self.images))
        return [
            ShownImage(*image.size, label) for image, label in zip(self.images, labels, strict=True)
        ]


class TurnReader:
    """Reads questions with their images, videos and documents.

    Args:
      checkpoint: with the tokenizer, the processor, and the positions that the model knows.
      cache_dtype: of keys and values.
      limits: what is refused of videos and documents.
    """

    def __init__(self, checkpoint, cache_dtype: DTypeLike, limits: Limits = LOCAL):
        self.tokenizer, self.processor = checkpoint.tokenizer, checkpoint.processor
        self.language = checkpoint.config.language
        self.slot_bytes = slot_bytes(self.language, cache_dtype)
        self.limits = limits

    def read(
        self,
        question: str,
        inputs: Inputs,
        options: Options,
        earlier: tuple[list, list, list] = ((), (), ()),
        where: str = "",
    ) -> Turn:
        """Reads a question.

        Args:
          earlier: messages, tiles and deltas of the turns before it.
          where: what errors call the question.

        Raises:
          ImageError, VideoError, DocumentError, FileError: an input cannot be read.
          ChatError: the tags do not fit, or there are neither one delta nor as many as inputs.
          PlanError: the prompt does not fit.
        """
        messages = list(earlier[0]) or system_messages(options)
        with _named(where):
            opened = self._open(inputs, options)
        deltas = _given_deltas(options, len(opened), where)
        images = [item.image for item in opened if isinstance(item, OpenedImage)]
        if len(images) == len(opened) and not options.cache_gib:
            messages += insert_missing_tags([user_message(question)], len(images), where)
            limits = {"tiles": options.tiles, "max_total_tiles": options.max_total_tiles}
            tiles = cut_images(images, self.processor, options.max_tiles, **limits)
            deltas = deltas or [self.processor.delta] * len(images)
            return Turn(messages, tiles, deltas, images)
        with _named(where):
            return self._planned(question, opened, deltas, options, messages, earlier[1:], where)

    def scaling(self, options: Options, deltas: Sequence[int]) -> str:
        """Returns the rope scaling. deltas: V2PE units of the images of the conversation."""
        current = [self.processor.delta] if options.delta is None else units(options.delta)
        return rope_scaling(self.language, [*current, *deltas])

    def batch_scaling(self, options: Options, prompts: Sequence[Prompt]) -> str:
        """Returns the rope scaling of prompts that run together.

        Raises:
          ValueError: they need different ones. Up to the positions that the model was trained for
            there is no difference between them.
        """
        planned = [units(prompt.plan.delta) if prompt.plan else [] for prompt in prompts]
        scalings = [self.scaling(options, deltas) for deltas in planned]
        if len(set(scalings)) < 2:
            return scalings[0]
        for prompt, scaling in zip(prompts, scalings, strict=True):
            last = next_position(prompt.positions) // UNITS + options.max_new_tokens
            if scaling != "none" and last > self.language.max_position:
                raise ValueError(
                    "a planned delta and a prompt beyond the trained positions cannot run in one "
                    "batch; ask them one by one"
                )
        return "none"

    def _open(self, inputs: Inputs, options: Options) -> list[Opened]:
        images, videos, documents = inputs
        limits = dataclasses.replace(
            self.limits,
            max_pixels=options.max_image_pixels,
            allow_truncated=options.allow_truncated,
        )
        return [
            *map(OpenedImage, open_images(images, self.processor, options)),
            *(OpenedVideo(_as(Video, video), limits) for video in _listed(Video, videos)),
            *(OpenedDocument(_as(Document, item), limits) for item in _listed(Document, documents)),
        ]

    def _planned(
        self,
        question: str,
        opened: Sequence[Opened],
        deltas: Sequence[int],
        options: Options,
        messages: list[dict],
        earlier: tuple[Sequence, Sequence],
        where: str,
    ) -> Turn:
        processor = dataclasses.replace(
            self.processor,
            tiles=options.tiles or self.processor.tiles,
            max_total_tiles=self.processor.max_total_tiles
            if options.max_total_tiles is None
            else options.max_total_tiles,
        )

        def placed(frames: int) -> tuple[list[dict], list[int]]:
            text, places = self._place(question, opened, frames, where)
            count = sum(len(item.tiles(processor, 1, frames)) for item in opened)
            return messages + insert_missing_tags([user_message(text)], count, where), places

        def measure(frames: int) -> tuple[int, int]:
            count = sum(len(item.tiles(processor, 1, frames)) for item in opened)
            counts, deltas = [*map(len, earlier[0]), *[1] * count], [*earlier[1], *[UNITS] * count]
            return self._measure(placed(frames)[0], counts, deltas, where)

        room = Room(
            self.language, options.max_new_tokens, self._max_tokens(options), earlier[1], measure
        )
        choice = plan_prompt(opened, processor, room, options.max_tiles, deltas)
        chat, places = placed(choice.frames)
        turn = Turn(chat, [], [], [])
        for index in places:
            item = opened[index]
            images = item.images(processor, choice.max_tiles, choice.frames)
            limit = item.video.tiles if isinstance(item, OpenedVideo) else choice.max_tiles
            turn.images += images
            turn.tiles += [cut_tiles(image, processor, limit) for image in images]
            turn.deltas += [choice.deltas[index]] * len(images)
        # Frames of several tiles were counted with the most that they may have.
        counts, deltas = [*map(len, earlier[0]), *map(len, turn.tiles)], [*earlier[1], *turn.deltas]
        tokens, position = self._measure(chat, counts, deltas, where)
        position += options.max_new_tokens
        turn.plan = dataclasses.replace(choice.plan, tokens=tokens, position=position)
        return turn

    def _measure(
        self, chat: list[dict], counts: Sequence[int], deltas: Sequence[int], where: str
    ) -> tuple[int, int]:
        """Returns the tokens of a conversation, and the position after it. counts: of tiles."""
        encoded = encode_chat(
            chat, counts, self.tokenizer, self.processor, add_generation_prompt=True, where=where
        )
        positions = build_positions(len(encoded.tokens), encoded.runs, deltas)
        return len(encoded.tokens), next_position(positions) // UNITS

    def _place(
        self, question: str, opened: Sequence[Opened], frames: int, where: str
    ) -> tuple[str, list[int]]:
        """Returns the question with a tag for each image, frame and page, and the indices of
        `opened` in the order of their places.
        """
        of_kind = {
            kind: [index for index, item in enumerate(opened) if isinstance(item, cls)]
            for kind, cls in (
                ("image", OpenedImage),
                ("video", OpenedVideo),
                ("document", OpenedDocument),
            )
        }
        videos = [opened[index] for index in of_kind["video"]]
        lines = [
            frame_lines(item.shown(frames), item.video.label or self.processor.frame_label)
            for item in videos
        ]
        pages = [len(opened[index].pdf.pages) for index in of_kind["document"]]
        text, places = place_media(question, len(of_kind["image"]), lines, pages, where)
        return text, [of_kind[kind][number] for kind, number in places]

    def _max_tokens(self, options: Options) -> int | None:
        """Returns the longest prompt whose cache, with the answer, is within its budget."""
        if not options.cache_gib:
            return None
        slots = int(options.cache_gib * (1 << 30) // self.slot_bytes)
        more = options.max_new_tokens + TOKENS_PER_CALL
        known = [length for length in LENGTH_BUCKETS if length + more <= LENGTH_BUCKETS[-1]]
        return max((length for length in known if bucket(length + more) <= slots), default=0)


def slot_bytes(language: LanguageConfig, dtype) -> int:
    """Returns the bytes of one token in the cache of all layers; int8 has a scale per vector."""
    vector = language.head_dim * np.dtype(dtype).itemsize
    vector += 4 * (np.dtype(dtype) == np.int8)
    return 2 * language.num_layers * language.num_kv_heads * vector


def _given_deltas(options: Options, count: int, where: str) -> list[int] | None:
    """Returns the units of each input; None if the caller gave none."""
    if options.delta is None:
        return None
    deltas = units(options.delta)
    if len(deltas) == 1:
        deltas = deltas * count
    if len(deltas) != count:
        raise ChatError(
            f"{where + ': ' if where else ''}{len(deltas)} deltas for {count} images; give one, or "
            "one per image (a video or document counts as one)"
        )
    return deltas


def _listed(kind: type, inputs) -> list:
    return [inputs] if isinstance(inputs, kind) else as_list(inputs, f"{kind.__name__.lower()}s")


def _as(kind: type, item):
    return item if isinstance(item, kind) else kind(item)


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """Puts the name of the question in front of errors about its inputs."""
    try:
        yield
    except (ImageError, VideoError, DocumentError, PlanError, FileError) as error:
        if not where:
            raise
        raise type(error)(f"{where}: {error}") from error


def user_message(text: str) -> dict:
    """Returns a question as a message."""
    return {"role": "user", "content": text}


def system_messages(options: Options) -> list[dict]:
    """Returns the system message of the options; none for that of the checkpoint."""
    system = resolve_system(options.system, options.thinking)
    return [] if system is None else [{"role": "system", "content": system}]
