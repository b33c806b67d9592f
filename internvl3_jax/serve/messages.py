r"""Reads the messages of a request: texts and the places of their images.

A user message of parts becomes one text, as `Chat` asks it:

- its texts, joined by line breaks;
- `<image>` in them marks the places of its images, if it occurs;
- otherwise images stand in front (`<image>\n`, or `Image-1: <image>\n` and so on), as the model was
  trained, also if a client puts them behind the text;
- an image with text before and behind it stays where it is, on a line of its own.
"""

import dataclasses
from collections.abc import Sequence

from internvl3_jax.data.text.chat_template import (
    IMAGE_TAG,
    ChatError,
    Message,
    insert_missing_tags,
)
from internvl3_jax.inference.options import MAX_TILES
from internvl3_jax.io.terminal import excerpt
from internvl3_jax.serve.body import Fields
from internvl3_jax.serve.errors import ApiError
from internvl3_jax.serve.limits import Limits

# Of messages, without effect: names, and what an earlier answer had.
_IGNORED = ("name", "annotations", "reasoning_content", "reasoning", "refusal", "id", "status")
_NEUTRAL = {"tool_calls": ([],), "function_call": (), "audio": (), "tool_call_id": ()}
_DETAILS = ("auto", "low", "high")
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclasses.dataclass(frozen=True)
class ImagePart:
    """An image of a message.

    Attributes:
      url: data URL, address or path.
      name: its field, for errors.
      max_tiles: its own limit of tiles; None: that of the request.
    """

    url: str
    name: str
    max_tiles: int | None = None


@dataclasses.dataclass(frozen=True)
class Turn:
    """A message as the chat template takes it, and its images in the order of their tags."""

    message: Message
    images: tuple[ImagePart, ...] = ()


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
    images = sum(len(turn.images) for turn in turns)
    if images > limits.images:
        raise ApiError(
            f"messages has {images:,} images; this server takes {limits.images:,} (--max_images)",
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
    parts = [content] if isinstance(content, str) else _read_parts(content, name)
    images = tuple(part for part in parts if isinstance(part, ImagePart))
    if role != "user":
        if images:
            raise ApiError(
                f"{images[0].name} is an image in a {role} message; only the user's have images",
                param=images[0].name,
            )
        return Turn({"role": _ROLES[role], "content": "\n".join(parts)})
    return Turn(_user_message(parts, len(images), name), images)


def _user_message(parts: Sequence[str | ImagePart], n_images: int, name: str) -> Message:
    texts = [part for part in parts if isinstance(part, str)]
    tagged = any(IMAGE_TAG in text for text in texts)
    places = [index for index, part in enumerate(parts) if isinstance(part, ImagePart)]
    within = any(
        any(isinstance(part, str) for part in parts[:place])
        and any(isinstance(part, str) for part in parts[place:])
        for place in places
    )
    if within and not tagged:
        texts = [part if isinstance(part, str) else IMAGE_TAG for part in parts]
    message = {"role": "user", "content": "\n".join(texts)}
    try:
        return insert_missing_tags([message], n_images)[0]
    except ChatError as error:
        raise ApiError(f"{name}: {error}", param=name) from error


def _read_parts(values: list, name: str) -> list[str | ImagePart]:
    if not values:
        raise ApiError(f"{name} is an empty list; give at least one part", param=name)
    return [_read_part(Fields(value, f"{name}[{index}]")) for index, value in enumerate(values)]


def _read_part(fields: Fields) -> str | ImagePart:
    kind = fields.get("type", str)
    if kind in ("text", "input_text"):
        text = fields.get("text", str)
        fields.finish()
        return text
    if kind == "image_url":
        return _read_image(fields)
    if kind in _LATER:
        raise ApiError(
            f"{fields.path} is of type {kind}, which this server does not take yet; {_LATER[kind]}",
            param=fields.path,
            code="unsupported_part",
        )
    raise ApiError(
        f"{fields.name('type')} is {excerpt(kind)}; expected text or image_url",
        param=fields.name("type"),
        code="unsupported_part",
    )


# Parts that have no decoder yet, and what to send in their place.
_LATER = {
    "video_url": "send its frames as images",
    "file": "send its pages as images",
    "input_file": "send its pages as images",
    "input_image": "send it as image_url, as in chat completions",
    "input_audio": "the model has no audio",
}


def _read_image(fields: Fields) -> ImagePart:
    name = fields.name("image_url")
    value = fields.get("image_url", (dict, str))
    fields.finish(("uuid",))
    if isinstance(value, str):
        value = {"url": value}
    image = Fields(value, name)
    url = image.get("url", str, low=1)
    detail = image.get("detail", str, "auto", choices=_DETAILS)
    max_tiles = image.get("max_tiles", int, None, low=1, high=MAX_TILES)
    # LMDeploy's name.
    patch = image.get("max_dynamic_patch", int, None, low=1, high=MAX_TILES)
    image.finish()
    if max_tiles is not None and patch is not None:
        raise ApiError(
            f"{name} has max_tiles and max_dynamic_patch, which mean the same; give one",
            param=image.name("max_dynamic_patch"),
        )
    max_tiles = patch if max_tiles is None else max_tiles
    if detail == "low":
        if max_tiles not in (None, 1):
            raise ApiError(
                f"{name} has detail low, which is one tile, and max_tiles {max_tiles}; leave one "
                "out",
                param=image.name("detail"),
            )
        max_tiles = 1
    return ImagePart(url, image.name("url"), max_tiles)
