"""Multiple choice by the rules of single benchmarks."""

import json
import re
from collections.abc import Mapping, Sequence

_DIGITS = re.compile(r"\d+")
NUMBER_WORDS = {
    word: str(value)
    for words in (
        "zero one two three four five six seven eight nine ten",
        "zeroth first second third fourth fifth sixth seventh eighth ninth tenth",
    )
    for value, word in enumerate(words.split())
    if word != "zeroth"
}
MIRB_GROUPS = {
    "Knowledge": ("food", "sightseeing"),
    "Reasoning": ("codeu", "plot_code", "analogy", "3d_scene"),
    "Perception": ("image_jigsaw", "count", "attribute"),
    "Multi-Hop": ("visual_chain", "arxiv"),
}


def exact_match(answer: str, reference: str) -> float:
    """Returns 1.0 if the texts are equal but for case and white space at the ends (own AI2D)."""
    return float(answer.strip().lower() == reference.strip().lower())


def option_first(answer: str, options: Mapping[str, str]) -> str:
    """Returns the option that the own code reads (MMBench, MMIU), or else the answer as it is.

    Raises:
      IndexError: the answer is empty, as in the own code.
    """
    text = answer.strip()
    if len(text) == 1:
        return text
    if text[0] in options:
        return text[0]
    return next((letter for letter, option in options.items() if option in text), text)


def mvbench(answer: str, reference: str, kit: bool = False) -> bool:
    """Returns whether the first words of answer and reference, "(b)", contain one another.

    Args:
      kit: VLMEvalKit's form, which strips the answer and leaves "Answer: " in it.
    """
    text = answer.strip() if kit else answer.replace("Answer: ", "")
    word, expected = text.lower().split(" ")[0], reference.lower().split(" ")[0]
    return word.replace(".", "") in expected or expected in word


def mantis(kind: str, answer: str, reference: str, options: Sequence[str]) -> int:
    """Returns 1 for a right answer of Mantis-Eval (own code), else 0.

    Args:
      kind: "multi-choice" or "short-answer".
      options: texts of a multiple-choice row, as "(A) x".
    """
    if kind != "multi-choice":
        return int(answer.lower() == reference.lower())
    if len(answer) == 3 and answer[0] == "(" and answer[-1] == ")":
        answer = answer[1:-1]
    return int(answer in (reference, options[ord(reference) - ord("A")]))


def mirb(task: str, answer: str, reference: str) -> float:
    """Returns 1.0 for a right answer of MIRB (own code), else 0.0."""
    text = answer.strip()
    end = text.find("\n")
    end = text.find(".") if end <= 0 else end
    text = text[:end] if end > 0 else text
    yes_or_no = reference.lower() in ("yes", "no")
    if task in ("analogy", "attribute") or (task == "sightseeing" and yes_or_no):
        return float(yes_or_no and ("yes" in text.lower()) == (reference.lower() == "yes"))
    if task == "sightseeing":
        return float(reference.lower() in text.lower())
    if task in ("count", "visual_chain", "3d_scene"):
        digits = _DIGITS.search(text)
        text = digits[0] if digits else NUMBER_WORDS.get(text.lower(), "")
    return float(text.lower() == reference.lower())


def crpe_row(reference: str, answer: str) -> bool:
    """Returns whether a row of CRPE is right (kit).

    Args:
      reference: "X. text". Its text is compared without its first letter, as in the kit.

    Raises:
      IndexError: the answer is empty, as in the kit.
    """
    if len(answer) == 1 or answer[0] in "ABCD":
        return answer[0] == reference[0]
    return reference[4:].lower() in answer.lower()


def cgbench(answer: str, reference: str) -> int:
    """Returns 1 for a right and 0 for a wrong answer, -1 for one that names no letter (kit)."""
    start = answer.find("```json")
    end = answer.find("```", start + len("```json"))
    content = answer[start + len("```json") : end].strip() if start >= 0 and end >= 0 else ""
    if content:
        try:
            quoted = re.sub(r"(?<=:\s)([A-Za-z_]\w*)", r'"\1"', content)
            return int(json.loads(quoted)["result"] == reference)
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
    letters = re.findall(r"\b[A-H]\b", answer)
    return int(reference in letters) if letters else -1


def wemath_letter(answer: str) -> str | None:
    """Returns the letter that follows the last "Answer"; None if none does (kit, without judge)."""
    text = answer.split("Answer")[-1].strip()
    text = re.sub(r"[><:.]", "", text).strip()
    return text[0] if text and text[0] in "ABCDEFGH" else None


def logicvista(letters: str, reference: str) -> int:
    """Returns 1 if the letters that were read are those of the reference, "A, B" (kit)."""
    return int(sorted(letters) == sorted(reference.split(", ")))
