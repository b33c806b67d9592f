r"""Prompts as they are typed: \n within a shell's quotes is a backslash and an n, and means a line
break.
"""

import os
import re
import sys

from internvl3_jax.data.text.chat_template import IMAGE_TAG
from internvl3_jax.data.text.media_tags import DOCUMENT_TAG, VIDEO_TAG
from internvl3_jax.io import safe_files, strict_json

MAX_BYTES = 16 << 20  # of a prompt
# LaTeX commands that begin with n keep their backslash, so that formulas can be typed.
_LATEX = (
    "abla|atural|e|earrow|eg|eq|ew|ewline|exists|geq|i|leq|mid|olimits|oindent|onumber|ot|otin|"
    "parallel|subseteq|u|warrow"
)
_ESCAPE = re.compile(rf"\\(?:\\n|n(?!(?:{_LATEX})(?![A-Za-z])))")


def unescape(text: str) -> str:
    r"""Replaces each \n by a line break, and \\n by a backslash and an n. LaTeX such as \nabla,
    \neq and \nu stays.
    """
    return _ESCAPE.sub(lambda match: "\n" if match[0] == r"\n" else r"\n", text)


def read_prompt(argument: str) -> str:
    r"""Returns the text that --prompt means.

    "-" is stdin and "@FILE" the text of a file, both without one line break at the end; anything
    else is `unescape`d. \@ begins a prompt with @.

    Raises:
      FileError: the file does not exist or is no UTF-8 text.
    """
    if argument == "-":
        return _decode(sys.stdin.buffer.read(MAX_BYTES), "--prompt -")
    if argument.startswith("@"):
        path = os.path.expanduser(argument[1:])
        data = safe_files.read_bytes(path, max_bytes=MAX_BYTES)
        return _decode(data, f"--prompt {argument}")
    return unescape(argument.removeprefix("\\") if argument.startswith("\\@") else argument)


def tag_remark(prompt: str, images: int, videos: int = 0, documents: int = 0) -> str:
    """Returns a remark about tags that the model gets as text, since there are fewer images, videos
    or documents; "" if there are none.
    """
    for kind, tag, count in (
        ("image", IMAGE_TAG, images),
        ("video", VIDEO_TAG, videos),
        ("document", DOCUMENT_TAG, documents),
    ):
        tags = prompt.count(tag)
        if tags > count and (count or tag != DOCUMENT_TAG):
            counted = f"{count} {kind}{'s' if count > 1 else ''} for {tags} {tag}"
            subject = f"{counted}: the last" if count else f"no {kind} for {tag}: it"
            return f"{subject} is sent to the model as text"
    return ""


def _decode(data: bytes, where: str) -> str:
    text = strict_json.decode(data, where).replace("\r\n", "\n")
    return text.removesuffix("\n")
