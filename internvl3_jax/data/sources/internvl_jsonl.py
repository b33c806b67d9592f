"""Rows of InternVL's training data to conversations.

    {"id": ..., "image": "a.jpg" | ["a.jpg", "b.jpg"], "video": "c.mp4", "clip": [start, end],
     "conversations": [{"from": "system", "value": text}, {"from": "human", "value": text}, {"from": "gpt", "value": text}, ...]}

Pairs for preference optimisation have, in place of conversations, two answers to one question
(MMPR):

    {"image": ..., "question": text, "chosen": text, "rejected": text}

No image and no video: text only. One image: if no human turn has <image>, it goes in front of
the first one, as <image> and a line break. Several images: one <image> each. A video: <video> in
the first human turn, or its start, becomes a line for each frame.
Everything else in the text, such as <ref> and <box>, stays as it is. Other keys of a row are
ignored, unless they look like images or mean something to other trainers (row_fields.py, which also
reads some spellings of theirs).

Images are looked up under the source's root (row_paths.py), or among the files that came with the
row in its tar archive. In an archive a row may also leave its images out: then they are the other
files of the sample, in order.
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
from internvl3_jax.data.sources.row_turns import VIDEO_TAG, Turns, read_turns
from internvl3_jax.data.sources.rows import RowError, Rows
from internvl3_jax.data.text.chat_template import IMAGE_TAG, Message, insert_missing_tags


@dataclasses.dataclass
class Conversation:
    """Messages with one <image> for each RGB image, and what becomes of the images."""

    messages: list[Message]
    images: list[Image.Image]
    max_tiles: int  # of each image
    augment: bool = False
    id: str | None = None
    is_video: bool = False  # then the images are its frames, one tile each without thumbnail
    rejected: str | None = None  # of a pair: the answer that the last message is preferred to

    def other_side(self) -> list[Message]:
        """The messages with the rejected answer."""
        return [*self.messages[:-1], {**self.messages[-1], "content": self.rejected}]


class OfficialSource:
    """One entry of a meta JSON: random access to its conversations. Threads may share it, and it
    can be sent to other processes.
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
            and any(path.endswith(".jsonl") for path in spec.annotation)
        ):
            raise MetaError(spec.root_error)

    @property
    def has_images(self) -> bool:
        """Whether any row has an image or a video."""
        return self.rows.has_images

    @property
    def identity(self) -> str:
        """A short text that differs if the samples do, as far as rows and settings of the entry
        say; images are not looked at.
        """
        spec = self.spec
        return (
            f"{self.rows.identity}, root {spec.written_root!r}, augment {spec.augment}, repeat {spec.repeat}, "
            f"max_dynamic_patch {spec.max_tiles}"
        )

    def __len__(self) -> int:
        return len(self.rows)

    def locate(self, row: int) -> str:
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
          choose: from a row's clip, or None, to the rule for the frames of its video.
          limits: max_pixels and allow_truncated of `open_image` and `read_frames`.

        Raises:
          ValueError: a subclass that says what is wrong with the row, an image or a video.
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
        where = _Place(self.spec.root, files, processor.apply_exif, limits or {})
        number = values.get("id")
        common = {
            "augment": self.spec.augment,
            "id": None if number is None else str(number),
            "rejected": rejected,
        }
        if video is not None:
            frames = where.video(video, choose(values.get("clip")))
            messages = insert_frames(messages, len(frames), processor.frame_label)
            return Conversation(messages, frames, 1, is_video=True, **common)
        if len(paths) == 1:
            messages = insert_missing_tags(messages, 1)
        images = [where.image(name) for name in paths]
        limit = image_limit(processor, len(images), self.spec.max_tiles)
        return Conversation(messages, images, limit, **common)


@dataclasses.dataclass
class _Place:
    """Where the images of a row are: among its own files or under a root."""

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
    r"""Puts a line `label<image>` for each frame of a video in the place of <video>, or before the
    first user message.

    label: with {} for the frame's number from 1. A line break after <video> stays the only one.
    """
    first = next(
        (number for number, message in enumerate(messages) if message["role"] == "user"), None
    )
    tags = sum(
        message["content"].count(VIDEO_TAG) for message in messages if message["role"] == "user"
    )
    if first is None:
        return messages  # encode_chat says what is missing
    text = messages[first]["content"]
    if tags > 1 or (tags and VIDEO_TAG not in text):
        raise RowError(f"{tags} {VIDEO_TAG} tags; expected one, in the first human turn")
    before, _, after = text.partition(VIDEO_TAG) if tags else ("", "", text)
    lines = "".join(
        f"{label.replace('{}', str(number))}{IMAGE_TAG}\n" for number in range(1, count + 1)
    )
    content = before + lines + after.removeprefix("\n")
    return [*messages[:first], {**messages[first], "content": content}, *messages[first + 1 :]]
