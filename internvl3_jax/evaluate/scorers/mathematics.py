"""Mathematics and reasoning: what counts as equal once an answer has been read off a text.

In the card's runs a language model reads the answer where these rules do not. Here the boxed or
stated answer is taken (`read_answer`), and what has none is counted as unreadable.
"""

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence

from internvl3_jax.evaluate.scorers import letters, numeric
from internvl3_jax.evaluate.scorers.short import distance
from internvl3_jax.reward.answer_matching import extract_answer

_FINAL = re.compile(r"(Final answer:|Answer:)\s*(.*)", re.IGNORECASE)
_EQUAL = 1e-6
_DYNAMATH_TOLERANCE = 0.001
_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")


def final_answer(text: str) -> str:
    """Returns what follows the first "Final answer:" or "Answer:" on its line, or the whole text
    (own code's MathVista with reasoning).
    """
    found = _FINAL.search(text)
    return found[2].strip() if found else text


def read_answer(text: str) -> str | None:
    """Returns the boxed or stated answer of a solution; a text of one short line is its own answer.
    None if there is none.
    """
    stated = extract_answer(text)
    if stated is not None:
        return _TEXT_COMMAND.sub(r"\1", stated).strip().strip("$").strip()
    text = text.strip()
    return text if text and "\n" not in text and len(text) <= 60 else None


def mathvista_vlmevalkit(text: str, row: Mapping[str, str]) -> bool:
    """Returns whether an extracted answer of MathVista is right (kit).

    Args:
      row: question_type, answer_type, answer, answer_option, and choices as a printed list.
    """
    if row["question_type"] == "multi_choice":
        choices = letters.options_of([str(choice) for choice in ast.literal_eval(row["choices"])])
        return letters.option_letter(text, choices) == row["answer_option"]
    kind = {"integer": int, "float": float}.get(row["answer_type"])
    if kind is None:
        return False  # the kit compares such an answer with "None"
    try:
        return kind(text) == kind(row["answer"])
    except ValueError:
        return False


def mathvista_normalize(
    text: str,
    choices: Sequence[str] | None,
    question_type: str,
    answer_type: str,
    precision: float | None,
) -> str | None:
    """Returns an extracted answer of MathVista in the form of its reference (own code): the choice
    that a letter names or that is nearest by edit distance, or a rounded number.
    """
    if question_type == "multi_choice":
        text = text.strip()
        named = re.findall(r"\(([a-zA-Z])\)", text)
        text = named[0].upper() if named else text
        options = letters.options_of(choices)
        return options[text] if text in options else min(choices, key=lambda c: distance(text, c))
    try:
        if answer_type == "integer":
            return str(int(float(text)))
        if answer_type == "float":
            return str(round(float(text), int(precision)))
    except (ValueError, OverflowError, TypeError):
        return None
    return text


def mathvision_equal(text: str, reference: str) -> bool:
    """Returns whether two answers of MathVision are the same text or the same number (kit)."""
    text, reference = text.lower().strip(), reference.lower().strip()
    if text == reference:
        return True
    for value in (numeric.python_value, numeric.latex_value):
        given, expected = value(text), value(reference)
        if given is not None and expected is not None and abs(given - expected) < _EQUAL:
            return True
    return False


def mathverse_prefetch(text: str, reference: str) -> bool:
    """Returns whether two answers of MathVerse are equal but for white space at the ends (kit)."""
    return text.strip() == reference.strip()


def dynamath_row(text: str, kind: str, reference: str) -> tuple[bool, bool]:
    """Scores an answer of DynaMath without a judge (kit).

    Args:
      kind: "float", "multiple choice" or another, for text.

    Returns:
      (whether it is right, whether it could be read)
    """
    start, end = text.find("{"), text.rfind("}")
    text = text[start : end + 1] if 0 <= start < end else text
    text = text.replace("\\", "")
    read = None
    try:
        read = _dynamath_read(json.loads(text, strict=False)["short answer"], kind)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    read = _dynamath_read(text, kind) if read is None else read
    if read is None:
        # The kit then looks for the letter in the first three characters.
        return kind == "multiple choice" and reference in text[:3].upper(), False
    if kind == "float":
        return abs(read - float(reference)) <= _DYNAMATH_TOLERANCE, True
    if kind == "multiple choice":
        return read == reference, True
    return read.lower() in reference.lower(), True


def _dynamath_read(text: str, kind: str) -> float | str | None:
    """Returns the answer of the type `kind` that a text is; None if it cannot be read."""
    if kind == "float":
        try:
            number, pi, _ = text.split(" ")[0].partition("π")
            return float(number) * (math.pi if pi else 1)
        except ValueError:
            return None
    if kind == "multiple choice":
        if len(text) == 1:
            return text.upper()
        named = [letter for letter in "ABCDE" if letter in text.upper()]
        return named[0] if len(named) == 1 else None
    if not isinstance(text, str):
        raise TypeError("no text")
    return text
