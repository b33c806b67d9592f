"""The keys of a row: its turns or its pair of answers, and the names of its images or video.

InternVL's own form is at the top of official.py. Read as well: `messages` with role and content,
and `images` and `videos`, lists of paths or of {"path": ...}, as ms-swift and LLaMA-Factory write
them. What other trainers' keys mean, and is not read here, is an error:
a row never loses its images, its system text or its tools in silence.
"""

import re
from collections.abc import Iterable

from internvl3_jax.data.sources.rows import RowError
from internvl3_jax.data.text.chat_template import OFFICIAL_ROLES, Message
from internvl3_jax.io.strict_json import describe, suggestion
from internvl3_jax.io.terminal import excerpt, one_line

VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".gif")

_ROLES = {**OFFICIAL_ROLES, "user": "user", "assistant": "assistant"}
_MEDIA = ("image", "images", "video", "videos")
_KNOWN = (*_MEDIA, "id", "clip", "conversations", "messages", "question", "chosen", "rejected")
# Keys with a meaning for other trainers. Each would change what is learned.
_FOREIGN = {
    "system": 'make it the first turn, {"from": "system", "value": ...}',
    "tools": "tools are not supported; write them into the system turn",
    "objects": "write references and boxes into the turns, as <ref>...</ref><box>[[...]]</box>",
    "history": "write its turns into conversations",
    "rejected_response": "write pairs as question, chosen and rejected",
    "rejected_messages": "write pairs as question, chosen and rejected",
    "rejected_images": "both answers of a pair are about the same images",
}
_TURN_FOREIGN = ("tool_calls", "tool_call_id", "function_call", "loss", "loss_scale", "weight")
# What looks like the name of an image or video ...
_NOUN = "(?:img|image|picture|pic|photo|figure|screenshot|video|vid|clip|frame|audio|sound|media|multimodal|mm)"
_LOOKS = re.compile(
    rf"{_NOUN}s?(?:_?(?:path|file|filename|list|dir|folder|byte|base64|b64|data|content|input)s?|_?\d+)?",
    re.IGNORECASE,
)
# ... a file that is one ...
_MEDIA_FILE = re.compile(
    r"^[^\n]*\.(?:png|jpe?g|webp|bmp|gif|tiff?|heic|avif|mp4|mkv|mov|avi|webm|m4v)$", re.IGNORECASE
)
# ... and what is mere information in a row that has one.
_NOTES = re.compile(
    rf"(?:{_NOUN}|coco|flickr|orig(?:inal)?)s?_?(?:url|uri|name|source|link)s?", re.IGNORECASE
)


def check_keys(values: dict) -> None:
    """RowError for keys that would be dropped in silence, although they look like images, or mean
    something to other trainers.
    """
    has_media = any(values.get(name) for name in _MEDIA)
    for name, value in values.items():
        if name in _KNOWN or value in (None, "", [], {}, False):
            continue
        if name in _FOREIGN:
            raise RowError(f"the key {name} = {excerpt(value)} is not read; {_FOREIGN[name]}")
        if isinstance(value, bool | int | float):
            continue
        looks = _LOOKS.fullmatch(name) or (
            not has_media and (_NOTES.fullmatch(name) or _names_media(value))
        )
        if looks or _is_near(name):
            near = (
                suggestion(name, ("image", "video", "conversations"))
                or "; images go under 'image' and a video under 'video'"
            )
            raise RowError(f"unknown key {excerpt(name)} = {excerpt(value)}{near}")


def _names_media(value) -> bool:
    """Whether a value is the name of an image or video file, or a list of such names."""
    if isinstance(value, dict):
        value = value.get("path") or value.get("url")
    if isinstance(value, list):
        return bool(value) and _names_media(value[0])
    return isinstance(value, str) and len(value) < 4096 and bool(_MEDIA_FILE.search(value))


def _is_near(name: str) -> bool:
    """Whether two letters are swapped, or one is wrong, missing or too much."""
    lower = name.lower()
    return any(
        sorted(lower) == sorted(known)
        or (abs(len(lower) - len(known)) <= 1 and _differences(lower, known) <= 1)
        for known in (*_MEDIA, "conversations")
    )


def _differences(a: str, b: str) -> int:
    """Letters between the common beginning and the common end, of the longer one."""
    start = next(
        (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    a, b = a[start:][::-1], b[start:][::-1]
    end = next(
        (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    return max(len(a), len(b)) - end


def read_messages(values: dict) -> list[Message]:
    """The turns of a row without a pair of answers. RowError says which of them is wrong."""
    names = [name for name in ("conversations", "messages") if values.get(name)]
    if len(names) > 1:
        raise RowError("has both conversations and messages; expected one of them")
    name = names[0] if names else "conversations"
    turns = values.get(name)
    if not isinstance(turns, list) or not turns:
        known = sorted(
            set(values)
            & {
                "instruction",
                "input",
                "output",
                "query",
                "response",
                "prompt",
                "completion",
                "text",
            }
        )
        hint = (
            f"; it has {', '.join(known)}: write them as turns"
            if known
            else suggestion("conversations", set(values) - {name})
        )
        raise RowError(f"conversations is {excerpt(turns)}; expected a list of turns{hint}")
    return [_read_turn(turn, number) for number, turn in enumerate(turns, 1)]


def _read_turn(turn, number: int) -> Message:
    if isinstance(turn, dict) and {"from", "value"} <= turn.keys():
        role, text = turn["from"], turn["value"]
    elif isinstance(turn, dict) and {"role", "content"} <= turn.keys():
        role, text = turn["role"], turn["content"]
    else:
        raise RowError(f'turn {number} is {excerpt(turn)}; expected {{"from": ..., "value": ...}}')
    if not isinstance(role, str) or role not in _ROLES:
        raise RowError(
            f"turn {number} is from {excerpt(role)}; expected {', '.join(OFFICIAL_ROLES)}"
        )
    for name in _TURN_FOREIGN:
        if turn.get(name) not in (None, True, [], {}) and not (name != "loss" and turn[name] == 1):
            raise RowError(
                f"turn {number}: the key {name} = {excerpt(turn[name])} is not read; remove it, or the row"
            )
    for name in turn:
        if (
            turn[name]
            and name not in ("from", "value", "role", "content")
            and (_LOOKS.fullmatch(name) or _names_media(turn[name]))
        ):
            raise RowError(
                f"turn {number}: {one_line(name)} belongs to the row, not to a turn; images go under 'image'"
            )
    if isinstance(text, list):
        raise RowError(
            f"turn {number}: its content is a list of parts; write one text with <image> in the place of each image, and the paths "
            f"under image"
        )
    check_text(text, f"turn {number}: its value")
    return {"role": _ROLES[role], "content": text}


def check_text(text, what: str) -> None:
    """RowError unless it is a text that UTF-8 can hold."""
    if not isinstance(text, str):
        raise RowError(f"{what} is no text but {describe(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = one_line(text[error.start])
        raise RowError(
            f"{what} holds half a character, {half} at {error.start}; was the text cut?"
        ) from error


def is_pair(values: dict) -> bool:
    """Whether a row has two answers, or one of the two keys."""
    return any(values.get(name) is not None for name in ("chosen", "rejected"))


def read_pair(values: dict) -> tuple[list[Message], str]:
    """(question and chosen answer, rejected answer) of a row."""
    texts = {name: values.get(name) for name in ("question", "chosen", "rejected")}
    for name, text in texts.items():
        if not isinstance(text, str) or (name != "question" and not text.strip()):
            raise RowError(
                f"{name} is {excerpt(text)}; expected the keys question, chosen and rejected, each a text"
            )
        check_text(text, name)
    if values.get("conversations") or values.get("messages"):
        raise RowError("has both turns and a pair of answers; expected one of them")
    if texts["chosen"] == texts["rejected"]:
        raise RowError("chosen and rejected are the same text: there is nothing to prefer")
    question = {"role": "user", "content": texts["question"]}
    return [question, {"role": "assistant", "content": texts["chosen"]}], texts["rejected"]


def read_media(values: dict, archive: dict[str, bytes] | None) -> tuple[list[str], str | None]:
    """(names of the images, name of the video or None) of a row; those of its archive if it names
    none.
    """
    images, videos = _names(values, "image", "images"), _names(values, "video", "videos")
    if (
        not images
        and not videos
        and archive
        and not any(name in values for name in ("image", "images"))
    ):
        images = [name for name in archive if not name.lower().endswith(VIDEOS)]
        videos = [name for name in archive if name.lower().endswith(VIDEOS)]
        if len(videos) > 1 or (videos and images):
            came = one_line(", ".join(list(archive)[:10]))
            raise RowError(
                f"came with {came}; expected pictures or one video, or the key image or video to choose"
            )
    if images and videos:
        raise RowError("has both image and video; expected one of them")
    if len(videos) > 1 or (videos and isinstance(values.get("video"), list)):
        raise RowError(
            f"video is {excerpt(videos)}; expected the path of a file or of a folder of pictures, one for a row"
        )
    return images, videos[0] if videos else None


def _names(values: dict, one: str, several: str) -> list[str]:
    """The paths under a key or under its plural."""
    given = [
        name
        for name in (one, several)
        if values.get(name) is not None and values[name] not in ("", [])
    ]
    if len(given) > 1:
        raise RowError(f"has both {one} and {several}; expected one of them")
    if not given:
        return []
    value = values[given[0]]
    paths = [_path(item) for item in (value if isinstance(value, list) else [value])]
    if any(path is None for path in paths):
        wrong = next(
            item
            for item, path in zip(value if isinstance(value, list) else [value], paths, strict=True)
            if path is None
        )
        remedy = "; save the bytes as a file and give its path" if _has_bytes(wrong) else ""
        raise RowError(
            f"{given[0]} is {excerpt(value)}; expected a path or a list of paths{remedy}"
        )
    return paths


def _path(item) -> str | None:
    """The path of "a.png" or {"path": "a.png", "bytes": null}; None if it is neither."""
    if isinstance(item, dict) and not _has_bytes(item) and set(item) <= {"path", "bytes"}:
        item = item.get("path")
    return item if isinstance(item, str) and item else None


def _has_bytes(item) -> bool:
    return isinstance(item, dict) and any(item.get(name) for name in ("bytes", "base64", "data"))


def is_empty_answer(messages: Iterable[Message]) -> bool:
    """Whether a turn of the assistant has no text: the model would learn to say nothing."""
    return any(
        message["role"] == "assistant" and not message["content"].strip() for message in messages
    )
