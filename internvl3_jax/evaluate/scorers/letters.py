"""Option letters, as VLMEvalKit reads them off an answer (vlmeval/utils/matching_util.py)."""

import re
from collections.abc import Mapping, Sequence

UNREADABLE_MARK = "Failed to obtain answer via API"
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
REFUSED = "Z"
_PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_PHRASE = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)
# Beginnings that are deleted before a letter is looked for. In the kit's video sets two commas are
# missing, which joins four of them into two strings that no answer has.
_STARTS = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
    "Best answer:",
    "Best option:",
)
_VIDEO_STARTS = (
    *_STARTS[:4],
    _STARTS[4] + _STARTS[5],
    _STARTS[6] + _STARTS[7],
    "Answer:",
    "Option:",
)
_LONG = 10  # words; a longer text must have a capital among the letters
# Set -> (beginnings, letters).
_REGEX_SETS = {
    "mme_realworld": (_STARTS, "ABCDE"),
    "video_mme": (_VIDEO_STARTS, "ABCD"),
    "longvideobench": (_VIDEO_STARTS, "ABCDE"),
}


def option_letter(answer: str, options: Mapping[str, str], newest: bool = False) -> str | None:
    """Returns the option that an answer names by letter or by text.

    Args:
      options: letter -> text.
      newest: the rule of August 2026 in place of that of April 2025, which made the card's numbers.

    Returns:
      None if it cannot be read; REFUSED for a refusal.
    """
    if UNREADABLE_MARK in answer:
        letter = None
    elif any(refusal in answer for refusal in REFUSALS):
        return REFUSED
    else:
        letter = _stated_letter(answer, options, newest)
    return letter or _option_by_text(answer, options, newest)


def _stated_letter(answer: str, options: Mapping[str, str], newest: bool) -> str | None:
    words = answer.translate(_PUNCTUATION).split()
    found = [letter for letter in options if letter in words]
    if len(found) == 1 and (not newest or words.index(found[0]) > len(words) - 5):
        return found[0]
    if not found and REFUSED in words:
        return REFUSED
    phrase = _PHRASE.search(answer) if newest else None
    return phrase[1].upper() if phrase and phrase[1].upper() in options else None


def _option_by_text(answer: str, options: Mapping[str, str], newest: bool) -> str | None:
    text = answer.lower()
    if newest and len(text) > 2 * sum(map(len, options.values())):
        return None
    found = [letter for letter, option in options.items() if option.lower() in text]
    return found[0] if len(found) == 1 else None


def mmmu_open_vlmevalkit(answer: str, reference: str) -> bool:
    """Returns whether an open question of MMMU counts as right.

    The kit makes an option A of the reference and an option B "Other Answers", so that the answer
    must contain the reference; a bare A is right, too.
    """
    return option_letter(answer, {"A": reference, "B": "Other Answers"}) == "A"


def option_regex(answer: str, kind: str) -> str:
    """Returns the first capital letter of an answer that can be an option; "" if there is none.

    Args:
      kind: "mme_realworld", "video_mme" or "longvideobench".
    """
    starts, letters = _REGEX_SETS[kind]
    text = answer.strip()
    for start in starts:
        text = text.replace(start, "")
    found = re.search(f"[{letters}]", text)
    if found:
        return found[0]
    if len(text.split()) <= _LONG and kind == "mme_realworld":
        # The rest of the text is looked up in "(A)", "(B)", ...; an empty one is in all of them.
        return next((letter for letter in letters if text.lower() in f"({letter})".lower()), "")
    return ""


def mlvu(answer: str, options: Mapping[str, str], reference: str) -> bool:
    """Returns whether the character before the first closing bracket, or else the option that the
    whole answer names, is the reference's letter.
    """
    start = answer
    if ")" in answer:
        place = answer.index(")")
        start = answer[place - 1 : place]
    return start == reference or option_letter(answer, options) == reference


def options_of(texts: Sequence[str]) -> dict[str, str]:
    """Returns letter -> text."""
    return {chr(ord("A") + number): text for number, text in enumerate(texts)}
