"""Reads the keys of a row except its turns (row_turns.py): pairs of answers, images, videos.

Keys that change what other trainers learn and that are not supported are an error: a row never
loses its images or its tools without a message.
"""

import re
from collections.abc import Iterable, Sequence

from internvl3_jax.data.sources.rows import RowError
from internvl3_jax.data.text.chat_template import Message
from internvl3_jax.io.strict_json import describe, suggestion
from internvl3_jax.io.terminal import excerpt, one_line

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".gif")

_MEDIA = ("image", "images", "video", "videos")
_TURNS = ("conversations", "messages")
_KNOWN = (*_MEDIA, *_TURNS, "id", "clip", "system", "question", "chosen", "rejected")
# Keys with a meaning for other trainers, each of which changes what is learned.
_FOREIGN = {
    "tools": "tools are not supported; write them into the system turn",
    "objects": "write references and boxes into the turns, as <ref>...</ref><box>[[...]]</box>",
    "history": "write its turns into conversations",
    **dict.fromkeys(("system_prompt", "system_message"), "write it under 'system'"),
    "rejected_response": "write pairs as question, chosen and rejected",
    "rejected_messages": "write pairs as question, chosen and rejected",
    "rejected_images": "both answers of a pair are about the same images",
}
# A key that looks like that of an image or video ...
_NOUN = (
    "(?:img|image|picture|pic|photo|figure|screenshot|video|vid|clip|frame|audio|sound|media|"
    "multimodal|mm)"
)
LOOKS = re.compile(
    rf"{_NOUN}s?(?:_?(?:path|file|filename|list|dir|folder|byte|base64|b64|data|content|input)s?"
    r"|_?\d+)?",
    re.IGNORECASE,
)
# ... a value that is the name of a file of one ...
_MEDIA_FILE = re.compile(
    r"^[^\n]*\.(?:png|jpe?g|webp|bmp|gif|tiff?|heic|avif|mp4|mkv|mov|avi|webm|m4v)$", re.IGNORECASE
)
# ... and a key that is only information in a row that has one.
_NOTES = re.compile(
    rf"(?:{_NOUN}|coco|flickr|orig(?:inal)?)s?_?(?:url|uri|name|source|link)s?", re.IGNORECASE
)


def check_keys(values: dict) -> None:
    """Raises RowError for keys that look like images, or that change what other trainers learn."""
    has_media = any(values.get(name) for name in _MEDIA)
    for name, value in values.items():
        if name in _KNOWN or value in (None, "", [], {}, False):
            continue
        if name in _FOREIGN:
            raise RowError(f"the key {name} = {excerpt(value)} is not read; {_FOREIGN[name]}")
        if isinstance(value, bool | int | float):
            continue
        looks = LOOKS.fullmatch(name) or (
            not has_media and (_NOTES.fullmatch(name) or names_media(value))
        )
        if looks or _is_near(name):
            near = (
                suggestion(name, ("image", "video", *_TURNS))
                or "; images go under 'image' and a video under 'video'"
            )
            raise RowError(f"unknown key {excerpt(name)} = {excerpt(value)}{near}")


def names_media(value) -> bool:
    """Returns whether a value is the name of an image or video file, or a list of such names."""
    if isinstance(value, dict):
        value = value.get("path") or value.get("url")
    if isinstance(value, list):
        return bool(value) and names_media(value[0])
    return isinstance(value, str) and len(value) < 4096 and bool(_MEDIA_FILE.search(value))


def _is_near(name: str) -> bool:
    """Returns whether a name is known but for two swapped letters, or one wrong, missing or added."""
    lower = name.lower()
    return any(
        sorted(lower) == sorted(known)
        or (abs(len(lower) - len(known)) <= 1 and _differences(lower, known) <= 1)
        for known in (*_MEDIA, *_TURNS)
    )


def _differences(a: str, b: str) -> int:
    """Counts the letters of the longer one between the common beginning and the common end."""
    start = next(
        (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    a, b = a[start:][::-1], b[start:][::-1]
    end = next(
        (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    return max(len(a), len(b)) - end


def check_text(text, what: str) -> None:
    """Raises RowError unless `text` is a str that UTF-8 can encode. what: Its name in errors."""
    if not isinstance(text, str):
        raise RowError(f"{what} is not a text but {describe(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = one_line(text[error.start])
        raise RowError(
            f"{what} holds half a character, {half} at {error.start}; was the text cut?"
        ) from error


def is_pair(values: dict) -> bool:
    """Returns whether a row has two answers, or one of the two keys."""
    return any(values.get(name) is not None for name in ("chosen", "rejected"))


def read_pair(values: dict) -> tuple[list[Message], str]:
    """Returns (question and chosen answer as messages, rejected answer) of a row."""
    texts = {name: values.get(name) for name in ("question", "chosen", "rejected")}
    for name, text in texts.items():
        if not isinstance(text, str) or (name != "question" and not text.strip()):
            raise RowError(
                f"{name} is {excerpt(text)}; expected the keys question, chosen and rejected, each "
                f"a text"
            )
        check_text(text, name)
    if values.get("conversations") or values.get("messages"):
        raise RowError("has both turns and a pair of answers; expected one of them")
    if texts["chosen"] == texts["rejected"]:
        raise RowError("chosen and rejected are the same text: there is nothing to prefer")
    question = {"role": "user", "content": texts["question"]}
    answer = {"role": "assistant", "content": texts["chosen"]}
    return [*system_message(values), question, answer], texts["rejected"]


def system_message(values: dict) -> list[Message]:
    """Returns the row's key `system`, which LLaMA-Factory and ms-swift write, as messages."""
    text = values.get("system")
    if text in (None, ""):
        return []
    check_text(text, "system")
    return [{"role": "system", "content": text}]


def read_media(
    values: dict,
    archive: dict[str, bytes] | None,
    image_parts: Sequence[str] = (),
    video_parts: Sequence[str] = (),
) -> tuple[list[str], str | None]:
    """Returns (names of the images, name of the video or None) of a row.

    Those of its archive if it names none. image_parts, video_parts: those of its turns.
    """
    images, videos = _names(values, "image", "images"), _names(values, "video", "videos")
    for names, parts, key in ((images, image_parts, "images"), (videos, video_parts, "videos")):
        if names and parts:
            raise RowError(f"has both {key} and parts with a path; expected one of them")
        names += parts
    if (
        not images
        and not videos
        and archive
        and not any(name in values for name in ("image", "images"))
    ):
        images = [name for name in archive if not name.lower().endswith(VIDEO_SUFFIXES)]
        videos = [name for name in archive if name.lower().endswith(VIDEO_SUFFIXES)]
        if len(videos) > 1 or (videos and images):
            came = one_line(", ".join(list(archive)[:10]))
            raise RowError(
                f"came with {came}; expected images or one video, or the key image or video to "
                f"choose"
            )
    if images and videos:
        raise RowError("has both image and video; expected one of them")
    if len(videos) > 1 or (videos and isinstance(values.get("video"), list)):
        raise RowError(
            f"video is {excerpt(videos)}; expected the path of a file or of a folder of images, "
            f"one for a row"
        )
    return images, videos[0] if videos else None


def _names(values: dict, singular: str, plural: str) -> list[str]:
    """Returns the paths under a key or under its plural."""
    keys = [
        name
        for name in (singular, plural)
        if values.get(name) is not None and values[name] not in ("", [])
    ]
    if len(keys) > 1:
        raise RowError(f"has both {singular} and {plural}; expected one of them")
    if not keys:
        return []
    value = values[keys[0]]
    paths = [file_path(item) for item in (value if isinstance(value, list) else [value])]
    if any(path is None for path in paths):
        wrong = next(
            item
            for item, path in zip(value if isinstance(value, list) else [value], paths, strict=True)
            if path is None
        )
        remedy = "; save the bytes as a file and give its path" if has_bytes(wrong) else ""
        raise RowError(f"{keys[0]} is {excerpt(value)}; expected a path or a list of paths{remedy}")
    return paths


def file_path(item) -> str | None:
    """Returns the path of "a.png" or {"path": "a.png", "bytes": null}; None if it is neither."""
    if isinstance(item, dict) and not has_bytes(item) and set(item) <= {"path", "bytes"}:
        item = item.get("path")
    return item if isinstance(item, str) and item else None


def has_bytes(item) -> bool:
    return isinstance(item, dict) and any(item.get(name) for name in ("bytes", "base64", "data"))


def is_empty_answer(messages: Iterable[Message]) -> bool:
    """Returns whether an assistant's turn has no text, so that the model learns to say nothing."""
    return any(
        message["role"] == "assistant" and not message["content"].strip() for message in messages
    )
