"""Open questions by the official rule of MMMU (Yue et al. 2023), as in InternVL's code."""

import re

_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)
_BEFORE_ANSWER = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = (":", ",", ".", "!", "?", ";", "'")


def mmmu_open(answer: str, reference: str) -> bool:
    """Returns whether a part of the answer is the reference's number or contains its text."""
    parts = _key_parts(answer)
    parts += [
        number for part in parts for pattern in _NUMBERS for number in re.findall(pattern, part)
    ]
    read = [value for part in parts for value in _normalized(part)]
    expected = _normalized(reference)
    return any(
        value in expected
        if isinstance(value, float)
        else any(isinstance(wanted, str) and wanted in value for wanted in expected)
        for value in read
    )


def _key_parts(answer: str) -> list[str]:
    """Returns the ends of the sentences that seem to state the answer, or else the whole text."""
    text = answer.strip().strip(".").lower()
    parts = []
    sentences = re.split(r"\.\s(?=[A-Z])|\n", text)
    for number, sentence in enumerate(sentences, 1):
        marks = _BEFORE_ANSWER + (("=",) if number == len(sentences) else ())
        ends = [sentence.split(mark)[-1].strip() for mark in marks if mark in sentence]
        # A later end replaces an earlier one that is empty or longer.
        shortest = ""
        for end in ends:
            shortest = end if not shortest or len(end) < len(shortest) else shortest
        if shortest and shortest not in _TRIVIAL:
            parts.append(shortest)
    return parts or [text]


def _normalized(text: str) -> list[float | str]:
    """Returns a number rounded to two digits, or the text in lower case; one letter stands between
    blanks, so that it is not found within words.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
