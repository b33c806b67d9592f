r"""Reads the messages of a request: texts and the places of their images, videos and PDFs.

A user message of parts becomes one text, as `Chat` asks it:

- its texts, joined by line breaks;
- `<image>`, `<video>` and `<document>` in them mark the places, if one of them occurs;
- otherwise images come first (`<image>\n`, or `Image-1: <image>\n` and so on), as the model was
  trained, also if a client puts them after the text;
- an image with text before and after it stays where it is, on a line of its own.
"""

import dataclasses
from collections.abc import Sequence

from internvl3_jax.data.text.chat_template import ChatError, Message, insert_missing_tags
from internvl3_jax.data.text.media_tags import TAGS
from internvl3_jax.io.terminal import excerpt
from internvl3_jax.serve.body import Fields
from internvl3_jax.serve.errors import ApiError
from internvl3_jax.serve.limits import Limits
from internvl3_jax.serve.parts import DocumentPart, ImagePart, Media, VideoPart, read_parts

# Keys of messages without effect: names, and what an earlier answer had.
_IGNORED = ("name", "annotations", "reasoning_content", "reasoning", "refusal", "id", "status")
_NEUTRAL = {"tool_calls": ([],), "function_call": (), "audio": (), "tool_call_id": ()}
_TAG_OF = {
    ImagePart: TAGS["image"],
    VideoPart: TAGS["video"],
    DocumentPart: TAGS["document"],
}
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclasses.dataclass(frozen=True)
class Turn:
    """A message as the chat template takes it, and its images in the order of their tags.

    Attributes:
      message: with videos or documents, without the tags of what the text does not place.
      media: images, videos and documents.
    """

    message: Message
    media: tuple[Media, ...] = ()

    @property
    def images(self) -> list[ImagePart]:
        return [part for part in self.media if isinstance(part, ImagePart)]

    @property
    def has_images_alone(self) -> bool:
        return len(self.images) == len(self.media)


def read_messages(values: list, limits: Limits) -> list[Turn]:
    """Reads `messages`.

    Raises:
      ApiError: it names the message and the field that is wrong.
    """
    if not values:
        raise ApiError("messages is empty; give at least one user message", param="messages")
    if len(values) > limits.messages:
        raise ApiError(
            f"messages has {len(values):,} messages; this server takes {limits.messages:,} "
            "(--max_messages). Leave out the oldest",
            param="messages",
        )
    turns = [
        _read_message(Fields(value, f"messages[{index}]")) for index, value in enumerate(values)
    ]
    media = sum(len(turn.media) for turn in turns)
    if media > limits.images:
        raise ApiError(
            f"messages has {media:,} images, videos and files; this server takes "
            f"{limits.images:,} (--max_images)",
            param="messages",
        )
    return turns


def _read_message(fields: Fields) -> Turn:
    role = fields.get("role", str)
    if role not in _ROLES:
        tools = role in ("tool", "function")
        known = "tools are not supported" if tools else f"expected one of {', '.join(_ROLES)}"
        raise ApiError(
            f"{fields.name('role')} is {excerpt(role)}; {known}", param=fields.name("role")
        )
    content = fields.get("content", (str, list))
    fields.finish(_IGNORED, _NEUTRAL)
    name = fields.name("content")
    parts = [content] if isinstance(content, str) else read_parts(content, name)
    media = tuple(part for part in parts if not isinstance(part, str))
    if role != "user":
        if media:
            raise ApiError(
                f"{media[0].name} is in a {role} message; only the user's have images",
                param=media[0].name,
            )
        return Turn({"role": _ROLES[role], "content": "\n".join(parts)})
    message = {"role": "user", "content": _joined(parts)}
    if any(not isinstance(part, ImagePart) for part in media):
        return Turn(message, media)
    try:
        return Turn(insert_missing_tags([message], len(media))[0], media)
    except ChatError as error:
        raise ApiError(f"{name}: {error}", param=name) from error


def _joined(parts: Sequence[str | Media]) -> str:
    """Joins texts by line breaks, with a tag in place of each image that stands between texts."""
    texts = [part for part in parts if isinstance(part, str)]
    if any(tag in text for text in texts for tag in TAGS.values()):
        return "\n".join(texts)
    within = any(
        any(isinstance(part, str) for part in parts[:place])
        and any(isinstance(part, str) for part in parts[place:])
        for place, part in enumerate(parts)
        if not isinstance(part, str)
    )
    if within:
        texts = [part if isinstance(part, str) else _TAG_OF[type(part)] for part in parts]
    return "\n".join(texts)
