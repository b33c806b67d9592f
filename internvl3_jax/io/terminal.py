"""Text that comes from files, models and other people, made fit for a terminal and for error
messages.
"""

import itertools
import re

LONGEST = 100  # characters that a message quotes of a value

# C0 but for tabs and line breaks, DEL, C1; separators of lines; marks that reorder what is shown;
# half surrogates.
UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""The text with everything that could drive a terminal written as \x1b, \u202e and so on; line
    breaks and tabs stay.
    """
    return UNSAFE.sub(lambda match: _escaped(match[0]), text)


def one_line(text: str) -> str:
    r"""`printable`, with line breaks and tabs written as \n and \t, too: for names in tables and
    messages.
    """
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def excerpt(value, longest: int = LONGEST) -> str:
    """repr of a value, safe to print and cut to at most `longest` characters."""
    # repr of a picture in base64 would take as long as the picture.
    if isinstance(value, str | bytes | list | tuple):
        value = value[: longest + 1]
    elif isinstance(value, dict):
        value = dict(itertools.islice(value.items(), longest))
    text = one_line(repr(value))
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def short_name(name: str, longest: int = 200) -> str:
    """`one_line` of a path or address; of a longer one the beginning and the end, which tell most."""
    if len(name) > longest:
        name = f"{name[: longest // 3]}...{name[-longest // 3 :]} ({len(name):,} characters)"
    return one_line(name)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
