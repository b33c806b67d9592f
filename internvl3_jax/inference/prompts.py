r"""Prompts as they are typed: \n in a shell's quotes is a backslash and an n, and means a line
break.
"""

import os
import re
import sys

from internvl3_jax.io import safe_files, strict_json

MAX_BYTES = 16 << 20  # of a prompt
# LaTeX's commands that begin with n keep their backslash, so that mathematics can be asked about as
# it is written.
_LATEX = "abla|atural|e|earrow|eg|eq|ew|ewline|exists|geq|i|leq|mid|olimits|oindent|onumber|ot|otin|parallel|subseteq|u|warrow"
_ESCAPE = re.compile(rf"\\(?:\\n|n(?!(?:{_LATEX})(?![A-Za-z])))")


def typed(text: str) -> str:
    r"""A typed text with a line break for each \n; \\n is a backslash and an n. LaTeX such as
    \nabla, \neq, \nu stays.
    """
    return _ESCAPE.sub(lambda match: "\n" if match[0] == r"\n" else r"\n", text)


def given(text: str) -> str:
    r"""What --prompt means: "-" is stdin, "@FILE" a file's text, both as they are but for one line
    break at the end; anything else is `typed`. \@ begins a prompt with @.

    Raises:
      FileError: there is no such file, or it is no UTF-8 text.
    """
    if text == "-":
        return _text(sys.stdin.buffer.read(MAX_BYTES), "--prompt -")
    if text.startswith("@"):
        return _text(
            safe_files.read_bytes(os.path.expanduser(text[1:]), max_bytes=MAX_BYTES),
            f"--prompt {text}",
        )
    return typed(text.removeprefix("\\") if text.startswith("\\@") else text)


def _text(data: bytes, where: str) -> str:
    text = strict_json.decode(data, where).replace("\r\n", "\n")
    return text.removesuffix("\n")
