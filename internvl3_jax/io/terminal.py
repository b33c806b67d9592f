"""Makes text from files, models and users safe for terminals and error messages."""

import itertools
import re

LONGEST = 100  # characters that a message quotes of a value

# C0 except tab and line feed, DEL, C1; line separators; bidirectional marks; lone surrogates.
UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""Escapes what could control a terminal, as \x1b; keeps line feeds and tabs."""
    return UNSAFE.sub(lambda match: _escaped(match[0]), text)


def one_line(text: str) -> str:
    r"""Escapes line feeds and tabs as well, for names in tables and messages."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def excerpt(value, longest: int = LONGEST) -> str:
    """Returns the repr of a value, safe to print, of at most `longest` characters."""
    # Cut first: the repr of an image in base64 is slow.
    if isinstance(value, str | bytes | list | tuple):
        value = value[: longest + 1]
    elif isinstance(value, dict):
        value = dict(itertools.islice(value.items(), longest))
    text = one_line(repr(value))
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def short_name(name: str, longest: int = 200) -> str:
    """Returns a path or address in one line, a long one without its middle."""
    if len(name) > longest:
        name = f"{name[: longest // 3]}...{name[-longest // 3 :]} ({len(name):,} characters)"
    return one_line(name)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
