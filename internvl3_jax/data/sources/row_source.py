"""Reads the rows of a source as conversations with their images.

A row of InternVL's training data, and a pair for preference optimization (MMPR):

    {"id": 7, "image": "a.jpg", "conversations": [{"from": "human", "value": text}, ...]}
    {"image": "a.jpg", "question": text, "chosen": text, "rejected": text}

row_turns.py reads the turns in this and other forms, row_fields.py the other keys, and docs/data.md
describes them all.

One image: if no human turn has <image>, the tag and a line break are put in front of the first one.
Several images: one <image> for each. A video: <video> in the first human turn, or its beginning,
becomes a line for each frame. The rest of the text, such as <ref> and <box>, is unchanged.

Images are read from the source's root (row_paths.py), or from the files of the row's sample in a
tar archive. There a row may leave its images out: they are then the other files of the sample.
"""

import dataclasses
from collections.abc import Callable, Mapping

from PIL import Image

from internvl3_jax.config import ProcessorConfig
from internvl3_jax.data.media.images import open_image
from internvl3_jax.data.media.tiles import image_limit
from internvl3_jax.data.media.video import Choose, read_frames
from internvl3_jax.data.sources.files import is_remote, join, read_bytes
from internvl3_jax.data.sources.meta import MetaError, SourceSpec
from internvl3_jax.data.sources.row_fields import (
    check_keys,
    is_pair,
    read_media,
    read_pair,
)
from internvl3_jax.data.sources.row_paths import locate
from internvl3_jax.data.sources.row_turns import Turns, read_turns
from internvl3_jax.data.sources.rows import RowError, Rows
from internvl3_jax.data.text.chat_template import Message, insert_missing_tags
from internvl3_jax.data.text.media_tags import VIDEO_TAG, frame_lines


@dataclasses.dataclass
class Conversation:
    """One row with its images decoded.

    Attributes:
      messages: With one <image> for each image.
      images: RGB.
      max_tiles: Limit for each image.
      augment: Whether the tiles are recompressed as JPEG.
      id: The row's own.
      is_video: The images are frames: one tile each, no thumbnail.
      rejected: For a pair, the answer that the last message is preferred to.
    """

    messages: list[Message]
    images: list[Image.Image]
    max_tiles: int
    augment: bool = False
    id: str | None = None
    is_video: bool = False
    rejected: str | None = None

    def other_side(self) -> list[Message]:
        """Returns the messages with the rejected answer."""
        return [*self.messages[:-1], {**self.messages[-1], "content": self.rejected}]


class RowSource:
    """Random access to the conversations of a source.

    Threads may share it, and it can be sent to other processes.
    """

    ordered = False

    def __init__(self, spec: SourceSpec):
        self.spec = spec
        self.rows = Rows(spec.annotation)
        self.name, self.repeat, self.weight = spec.name, spec.repeat, spec.weight
        if not len(self.rows):
            raise MetaError(f"source {spec.name!r}: {', '.join(spec.annotation)} has no rows")
        if (
            spec.root_error
            and self.has_images
            and any(path.endswith((".jsonl", ".json")) for path in spec.annotation)
        ):
            raise MetaError(spec.root_error)

    @property
    def has_images(self) -> bool:
        """Returns whether any row has an image or a video."""
        return self.rows.has_images

    @property
    def identity(self) -> str:
        """Returns a short text that changes with rows or settings; images are not read for it."""
        spec = self.spec
        return (
            f"{self.rows.identity}, root {spec.written_root!r}, augment {spec.augment}, "
            f"repeat {spec.repeat}, max_dynamic_patch {spec.max_tiles}"
        )

    def __len__(self) -> int:
        return len(self.rows)

    def locate(self, row: int) -> str:
        """Names a row in messages."""
        return f"{self.name} row {row} ({self.rows.locate(row)})"

    def conversation(
        self,
        row: int,
        choose: Callable[[list | None], Choose],
        processor: ProcessorConfig,
        limits: Mapping | None = None,
    ) -> Conversation:
        """Reads a row and its images.

        Args:
          choose: Takes the row's clip, or None, and returns the rule that picks frames.
          limits: max_pixels and allow_truncated of `open_image` and `read_frames`.

        Raises:
          ValueError: The row, an image or the video cannot be used; a subclass says which.
        """
        values, archive = self.rows[row]
        files = archive or {}
        check_keys(values)
        if is_pair(values):
            turns, (messages, rejected) = Turns([]), read_pair(values)
        else:
            turns, rejected = read_turns(values), None
            messages = turns.messages
        paths, video = read_media(values, archive, turns.images, turns.videos)
        if turns.unnamed > len(paths):
            raise RowError(
                f"has {turns.unnamed} image parts without a path and names {len(paths)} images; "
                f"give each part a path, or list them under 'images'"
            )
        paths = [locate(name, self.spec, archive) for name in paths]
        video = None if video is None else locate(video, self.spec, archive)
        reader = _MediaReader(self.spec.root, files, processor.apply_exif, limits or {})
        row_id = values.get("id")
        common = {
            "augment": self.spec.augment,
            "id": None if row_id is None else str(row_id),
            "rejected": rejected,
        }
        if video is not None:
            frames = reader.video(video, choose(values.get("clip")))
            messages = insert_frames(messages, len(frames), processor.frame_label)
            return Conversation(messages, frames, 1, is_video=True, **common)
        if len(paths) == 1:
            messages = insert_missing_tags(messages, 1)
        images = [reader.image(name) for name in paths]
        limit = image_limit(processor, len(images), self.spec.max_tiles)
        return Conversation(messages, images, limit, **common)


@dataclasses.dataclass
class _MediaReader:
    """Reads images and videos from the row's own files or from a root."""

    root: str
    files: dict[str, bytes]
    apply_exif: bool
    limits: Mapping

    def image(self, name: str) -> Image.Image:
        if name in self.files:
            return open_image(
                self.files[name], apply_exif=self.apply_exif, name=name, **self.limits
            )
        path = join(self.root, name)
        return open_image(
            read_bytes(path) if is_remote(path) else path,
            apply_exif=self.apply_exif,
            name=path,
            **self.limits,
        )

    def video(self, name: str, choose: Choose) -> list[Image.Image]:
        if name in self.files:
            return read_frames(self.files[name], choose, name=name, **self.limits)
        return read_frames(join(self.root, name), choose, **self.limits)


def insert_frames(messages: list[Message], count: int, label: str) -> list[Message]:
    r"""Replaces <video>, or else starts the first user message, by a line `label<image>` per frame.

    label: With {} for the number of the frame, from 1. If a line break follows <video>, no second
        one is added.
    """
    first = next(
        (number for number, message in enumerate(messages) if message["role"] == "user"), None
    )
    tags = sum(
        message["content"].count(VIDEO_TAG) for message in messages if message["role"] == "user"
    )
    if first is None:
        return messages  # encode_chat raises the error
    text = messages[first]["content"]
    if tags > 1 or (tags and VIDEO_TAG not in text):
        raise RowError(f"{tags} {VIDEO_TAG} tags; expected one, in the first human turn")
    before, _, after = text.partition(VIDEO_TAG) if tags else ("", "", text)
    content = before + frame_lines(count, label) + after.removeprefix("\n")
    return [*messages[:first], {**messages[first], "content": content}, *messages[first + 1 :]]
