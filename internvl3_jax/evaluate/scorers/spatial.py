"""VSI-Bench: numbers and option letters as VLMEvalKit reads them (utils/spatial_bench)."""

import ast
import re

import numpy as np

_ZERO_WIDTH = re.compile("[\u200b\u200c\u200d\ufeff]")
_NUMBER = r"[-+]?(?:\d*\.\d+|\d+)(?:[eE][-+]?\d+)?"
_TAGGED_NUMBER = re.compile(
    rf"<\s*answer\b[^>]*>\s*({_NUMBER})(?:[^\d<][^<]*)?<\s*/\s*answer\s*>", re.IGNORECASE
)
_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()
_WORD = re.compile(rf"\b({'|'.join(_WORDS)})\b", re.IGNORECASE)
_THINK = [re.compile(tag, re.IGNORECASE) for tag in (r"</\s*think\s*>", r"<\s*think\s*>")]
_THRESHOLDS = np.linspace(0.5, 0.95, 10)

# --- letters ---
_TAIL, _LINES = 800, 6  # characters and lines at the end that are searched
_OPEN, _CLOSE = r"[\(\[{（【]?\s*", r"\s*[\)\]}）】]?"
_TAGGED_LETTER = re.compile(
    r"<\s*answer\b[^>]*>\s*([A-J])(?:\s*[\.．:：\)\]】、])?.*?<\s*/\s*answer\s*>",
    re.IGNORECASE | re.DOTALL,
)
_BEFORE_TAG = [
    re.compile(rf"(?<![A-Za-z]){_OPEN}([A-F])\s*{_CLOSE}\s*</\s*{tag}\s*>", re.IGNORECASE)
    for tag in ("answer", "think")
]
_LISTED = re.compile(r"^(?:[*_>\-\s]*)(?:option|选项)\s+[A-J]\s*[:：]", re.IGNORECASE)
_ALONE = re.compile(r"\s*[*_`>（）\[\]【】()]*\s*([A-Fa-f])\s*[*_`（）\[\]【】()]*\s*")
_LABEL = re.compile(r"\s*([A-F])\s*[\.．:：\)\]】、-]\s+", re.IGNORECASE)
_INLINE = re.compile(
    r"(?<![A-Za-z])[*_`（\[{(]*\s*([A-F])\s*[*_`）\]})]*(?=$|[\s.,:;!?\)\]】》」』，。；、：）])"
)
_STATED = re.compile(
    r"(?:final\s*answer|the\s*answer\s*is|answer(?:\s*is)?|correct\s*answer|答案|最终答案|结论|所以|因此"
    rf"|我选(?:择)?|选择|选)\s*[:：>＝=]?\s*{_OPEN}([A-F]){_CLOSE}(?:\b|[.)、。])",
    re.IGNORECASE,
)
_ANYWHERE = re.compile(rf"(?<![A-Za-z]){_OPEN}([A-F])\s*[\)\]}}）】]?(?![A-Za-z])")


def read_number(text: str) -> float | None:
    """Returns the last number of a text, number words up to twenty included; None without one.

    What an <answer> encloses goes before, then what follows </think>. Of a printed list the first
    entry is read.
    """
    if text.strip().startswith("[") and text.strip().endswith("]"):
        try:
            listed = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
        text = str(listed[0]) if isinstance(listed, list) and listed else text
    text = _ZERO_WIDTH.sub("", text.strip())
    text = _WORD.sub(lambda match: str(_WORDS.index(match[1].lower())), text)
    if tagged := _TAGGED_NUMBER.search(text):
        return float(tagged[1])
    numbers = re.findall(_NUMBER, _after_thinking(text)) or re.findall(_NUMBER, text)
    return float(numbers[-1]) if numbers else None


def vsi_number(text: str, reference: float) -> float:
    """Returns the mean relative accuracy: the share of ten thresholds c from 0.5 to 0.95 for which
    the relative error is at most 1 - c; 0.0 if no number can be read.
    """
    number = read_number(text)
    if number is None:
        return 0.0
    error = abs(number - reference) / abs(reference) if reference else abs(number)
    return float(np.mean(error <= 1 - _THRESHOLDS))


def vsi_option(text: str) -> str | None:
    """Returns the option letter A to F of a text; None if none can be read.

    From the most to the least certain: an <answer>, a letter before </answer> or </think>, the last
    lines after the reasoning and of the text, "the answer is X", the only capital letter.
    """
    text = _ZERO_WIDTH.sub("", text.strip())
    if tagged := _TAGGED_LETTER.search(text):
        return tagged[1].upper()
    for pattern in _BEFORE_TAG:
        if found := pattern.search(text[-_TAIL:]):
            return found[1].upper()
    for part in (_after_thinking(text), text[-_TAIL:]):
        if letter := _letter_of_lines(part.splitlines()[-_LINES:]):
            return letter
    if stated := _STATED.search(text):
        return stated[1].upper()
    lines = [line for line in text.splitlines() if not _LISTED.search(line)]
    found = set(_ANYWHERE.findall("\n".join(lines)))
    return found.pop() if len(found) == 1 else None


def _letter_of_lines(lines: list[str]) -> str | None:
    for line in reversed([line.strip() for line in lines if line.strip()]):
        if _LISTED.search(line):
            continue
        if found := _ALONE.fullmatch(line) or _LABEL.match(line):
            return found[1].upper()
        if len(found := set(_INLINE.findall(line))) == 1:
            return found.pop()
    return None


def _after_thinking(text: str) -> str:
    for tag in _THINK:
        if found := list(tag.finditer(text)):
            return text[found[-1].end() :].strip()
    return text
