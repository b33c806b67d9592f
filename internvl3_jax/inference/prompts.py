r"""Prompts as they are typed: \n within a shell's quotes is a backslash and an n, and means a line
break.
"""

import os
import re
import sys

from internvl3_jax.data.text.chat_template import IMAGE_TAG
from internvl3_jax.io import safe_files, strict_json

MAX_BYTES = 16 << 20  # of a prompt
VIDEO_TAG = "<video>"
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


def tag_remark(prompt: str, num_images: int) -> str:
    """Returns a remark about <image> and <video> tags that the model gets as text; "" if there are
    none.
    """
    tags = prompt.count(IMAGE_TAG)
    if tags > num_images:
        counted = f"{num_images} image{'s' if num_images > 1 else ''} for {tags} {IMAGE_TAG}"
        subject = f"{counted}: the last" if num_images else f"no image for {IMAGE_TAG}: it"
        return f"{subject} is sent to the model as text"
    if VIDEO_TAG in prompt:
        return f"{VIDEO_TAG} is sent to the model as text; give the frames of a video as images"
    return ""


def _decode(data: bytes, where: str) -> str:
    text = strict_json.decode(data, where).replace("\r\n", "\n")
    return text.removesuffix("\n")
