r"""Places the frames of videos and the pages of documents in the text of a question.

    <video>      one line `Frame-1: <image>\n` per frame, as in InternVL's training and quick start
    <document>   one line `Image-1: <image>\n` per page, as its evaluation on MPDocVQA shows pages

A line break after a tag is the one that the last line has already. The label of frames is the
checkpoint's. Pages continue the numbers of the question's images; a single page without other
images has no label, as a single image.
"""

import re
from collections.abc import Sequence

from internvl3_jax.data.text.chat_template import IMAGE_TAG, ChatError

VIDEO_TAG, DOCUMENT_TAG = "<video>", "<document>"
TAGS = {"image": IMAGE_TAG, "video": VIDEO_TAG, "document": DOCUMENT_TAG}
_PLACE = re.compile(f"({'|'.join(TAGS.values())})")
_KIND = {tag: kind for kind, tag in TAGS.items()}


def frame_lines(count: int, label: str) -> str:
    """Returns a line `label<image>` per frame. label: with {} for the frame's number, from 1."""
    return "".join(f"{label.replace('{}', str(n))}{IMAGE_TAG}\n" for n in range(1, count + 1))


def page_lines(count: int, first: int = 1, label: str = "Image-{}: ") -> str:
    """Returns a line `label<image>` per page, numbered from `first`."""
    return "".join(
        f"{label.replace('{}', str(n))}{IMAGE_TAG}\n" for n in range(first, first + count)
    )


def place_media(
    text: str, images: int, videos: Sequence[str], documents: Sequence[int], where: str = ""
) -> tuple[str, list[tuple[str, int]]]:
    """Replaces <video> and <document> by a line per frame and page.

    Kinds without a tag in the text are shown before it: images, then videos, then documents.

    Args:
      text: the question.
      images: number of its images.
      videos: lines of each video, of `frame_lines`.
      documents: number of pages of each document.
      where: what errors call the question.

    Returns:
      the text, and (kind, index) of each image, video and document in the order of their places.

    Raises:
      ChatError: there are fewer tags of a kind than inputs, or an <image> that is text stands
        before one that is not.
    """
    at = f"{where}: " if where else ""
    expected = {"image": images, "video": len(videos), "document": len(documents)}
    alone = images + sum(documents) == 1
    # 1) The kinds that the text does not place come first.
    start = _tags_before(text, expected, alone, at)
    # 2) Lines in place of the tags.
    pages = [images + 1]
    for count in documents:
        pages.append(pages[-1] + count)
    places, parts, is_text, after_lines = [], [], False, False
    used = dict.fromkeys(TAGS, 0)
    for part in _PLACE.split(start + text):
        kind = _KIND.get(part)
        if kind is None or used[kind] == expected[kind]:
            is_text |= kind == "image"
            parts.append(part.removeprefix("\n") if after_lines else part)
            after_lines = False
            continue
        if is_text:
            raise ChatError(
                f"{at}{images} images, but one {IMAGE_TAG} more before the place of a {kind}; "
                "leave it out"
            )
        places.append((kind, used[kind]))
        parts.append(_lines(kind, used[kind], videos, documents, pages, alone))
        after_lines = kind != "image"
        used[kind] += 1
    return "".join(parts), places


def _tags_before(text: str, expected: dict[str, int], alone: bool, at: str) -> str:
    """Returns the tags of the kinds that have none in a text."""
    start = ""
    for kind, count in expected.items():
        tags = text.count(TAGS[kind])
        if 0 < tags < count:
            raise ChatError(
                f"{at}{count} {kind}s, but {tags} {TAGS[kind]} tags; write one for each, or none"
            )
        if tags:
            continue
        if kind == "image" and not alone:
            start += page_lines(count)
        else:
            start += f"{TAGS[kind]}\n" * count
    return start


def _lines(kind, index, videos, documents, pages, alone) -> str:
    if kind == "image":
        return IMAGE_TAG
    if kind == "video":
        return videos[index]
    return f"{IMAGE_TAG}\n" if alone else page_lines(documents[index], pages[index])
