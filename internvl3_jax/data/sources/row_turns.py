"""The turns of a row as messages, from each of the forms in which people store conversations.

    InternVL, LLaVA, ShareGPT   {"conversations": [{"from": "human", "value": text}, ...]}
    OpenAI, ms-swift            {"messages": [{"role": "user", "content": text or parts}, ...]}

A part is {"type": "text", "text": ...}, {"type": "image_url", "image_url": {"url": path}},
{"type": "image", "image": path}, or the same with video. The parts of a turn become the lines of
its text, and an image the line <image>, which is how InternVL was trained. A part {"type": "image"}
without a path stands for the next of the row's `images`.
"""

import dataclasses

from internvl3_jax.data.sources.row_fields import (
    LOOKS,
    check_text,
    file_path,
    names_media,
    system_message,
)
from internvl3_jax.data.sources.rows import RowError
from internvl3_jax.data.text.chat_template import IMAGE_TAG, OFFICIAL_ROLES, Message
from internvl3_jax.data.text.media_tags import VIDEO_TAG
from internvl3_jax.io.strict_json import suggestion
from internvl3_jax.io.terminal import excerpt, one_line

TAGS = {"image": IMAGE_TAG, "video": VIDEO_TAG}

_ROLES = {**OFFICIAL_ROLES, "user": "user", "assistant": "assistant"}
_FORMS = (("from", "value"), ("role", "content"))
# Keys of a turn with a meaning for other trainers.
_FOREIGN = (
    *("tool_calls", "tool_call_id", "function_call", "reasoning_content", "reasoning", "thinking"),
    *("loss", "loss_scale", "weight", "train", "trainable"),
)
# Keys that rows without turns have in their place.
_NO_TURNS = (
    *("instruction", "input", "output", "query", "response", "prompt", "completion", "text"),
    *("question", "answer", "dialog", "dialogue", "chat", "turns"),
)
_PART_TYPES = ("text", "image", "image_url", "video", "video_url")
_PART_KEYS = {
    "text": ("text",),
    "image": ("image", "image_url", "path", "url"),
    "video": ("video", "video_url", "path", "url"),
}


@dataclasses.dataclass
class Turns:
    """The turns of a row.

    Attributes:
      messages: With a tag for each image or video that is a part.
      images, videos: Paths of the parts.
      unnamed: Number of image parts without a path.
    """

    messages: list[Message]
    images: list[str] = dataclasses.field(default_factory=list)
    videos: list[str] = dataclasses.field(default_factory=list)
    unnamed: int = 0


def read_turns(values: dict) -> Turns:
    """Reads the turns of a row without a pair of answers. RowError says which of them is wrong."""
    names = [name for name in ("conversations", "messages") if values.get(name)]
    if len(names) > 1:
        raise RowError("has both conversations and messages; expected one of them")
    # An empty or null value of "messages" is named as such.
    name = next((name for name in (*names, "messages") if name in values), "conversations")
    items = values.get(name)
    if not isinstance(items, list) or not items:
        others = sorted(set(values).intersection(_NO_TURNS))
        hint = (
            f"; it has {', '.join(others)}: write them as turns"
            if others
            else suggestion("conversations", set(values) - {name})
        )
        raise RowError(f"{name} is {excerpt(items)}; expected a list of turns{hint}")
    turns = Turns(system_message(values))
    has_system_key = bool(turns.messages)
    for number, item in enumerate(items, 1):
        _read_turn(item, number, turns)
    if has_system_key and turns.messages[1]["role"] == "system":
        raise RowError("has both the key system and a system turn; expected one of them")
    _check_tags(turns)
    return turns


def _read_turn(turn, number: int, turns: Turns) -> None:
    """Appends a turn to `turns`."""
    form = next((f for f in _FORMS if isinstance(turn, dict) and turn.keys() >= {*f}), None)
    if form is None:
        raise RowError(
            f'turn {number} is {excerpt(turn)}; expected {{"from": ..., "value": ...}} or '
            f'{{"role": ..., "content": ...}}'
        )
    role, content = (turn[key] for key in form)
    if not isinstance(role, str) or role not in _ROLES:
        raise RowError(f"turn {number} is from {excerpt(role)}; expected {', '.join(_ROLES)}")
    for name in _FOREIGN:
        if turn.get(name) not in (None, True, "", [], {}) and not (
            name != "loss" and turn[name] == 1
        ):
            raise RowError(
                f"turn {number}: the key {name} = {excerpt(turn[name])} is not read; remove it, or "
                f"the row"
            )
    for name, value in turn.items():
        if value and name not in sum(_FORMS, ()) and (LOOKS.fullmatch(name) or names_media(value)):
            raise RowError(
                f"turn {number}: {one_line(name)} belongs to the row, not to a turn; images go "
                f"under 'image'"
            )
    if isinstance(content, list):
        content = _join_parts(content, number, _ROLES[role], turns)
    check_text(content, f"turn {number}: its value")
    turns.messages.append({"role": _ROLES[role], "content": content})


def _join_parts(parts: list, number: int, role: str, turns: Turns) -> str:
    """Returns the text of a turn's parts and appends their paths to `turns`."""
    if not parts:
        raise RowError(f"turn {number}: its value is an empty list; give a text, or one part")
    lines = []
    for index, part in enumerate(parts, 1):
        where = f"turn {number}, part {index}"
        kind, value = _read_part(part, where)
        if kind == "text":
            lines.append(value)
            continue
        if role != "user":
            raise RowError(f"{where}: is {excerpt(part)}; only human turns have images and videos")
        lines.append(TAGS[kind])
        if value is None:
            turns.unnamed += 1
        else:
            (turns.images if kind == "image" else turns.videos).append(value)
    return "\n".join(lines)


def _read_part(part, where: str) -> tuple[str, str | None]:
    """Returns (text, image or video; the text or path) of a part; no path for a bare image."""
    if isinstance(part, str):
        return "text", part
    if not isinstance(part, dict):
        raise RowError(f"{where}: is {excerpt(part)}; expected an object with the key type")
    values = {key: value for key, value in part.items() if value is not None}
    named = [name for name in _PART_TYPES if name in values]
    part_type = values.pop("type", named[0] if len(named) == 1 else None)
    if part_type not in _PART_TYPES:
        near = suggestion(part_type, _PART_TYPES) if isinstance(part_type, str) else ""
        raise RowError(
            f"{where}: type is {excerpt(part_type)}; expected {', '.join(_PART_TYPES)}{near}"
        )
    kind = part_type.removesuffix("_url")
    values.pop("detail", None)  # OpenAI's resolution of an image; tiles are set by the processor
    unknown = sorted(values.keys() - {*_PART_KEYS[kind]})
    if unknown or len(values) > 1:
        raise RowError(
            f"{where}: is {excerpt(part)}; expected one of the keys {', '.join(_PART_KEYS[kind])}"
            f"{suggestion(unknown[0], _PART_KEYS[kind]) if unknown else ''}"
        )
    if not values and part_type == "image":
        return kind, None
    value = next(iter(values.values()), None)
    if kind == "text":
        check_text(value, f"{where}: its text")
        return kind, value
    if isinstance(value, dict) and value.keys() <= {"url", "detail"}:
        value = value.get("url")
    path = file_path(value)
    if path is None:
        raise RowError(f"{where}: is {excerpt(part)}; expected a path")
    return kind, path


def _check_tags(turns: Turns) -> None:
    """Raises RowError if tags in the text would take the places of images that are parts."""
    contents = [message["content"] for message in turns.messages if message["role"] == "user"]
    for paths, tag in ((turns.images, IMAGE_TAG), (turns.videos, VIDEO_TAG)):
        tags = sum(content.count(tag) for content in contents)
        if paths and tags != len(paths):
            raise RowError(
                f"has {len(paths)} parts with a path, but {tags} {tag} in its turns with them; "
                f"remove {tag} from the texts, or name all files under '{tag[1:-1]}s'"
            )
