"""Reads a judge's text: WildVision as VLMEvalKit, MMHal as InternVL's program."""

import re

VERDICTS = ("A>>B", "A>B", "A=B", "B>A", "B>>A")
_VERDICT = re.compile(r"\[\[([AB<>=]+)\]\]")


def wildvision_verdict(text: str) -> tuple[str | None, bool]:
    """Returns (verdict, whether the judge has to be asked again)."""
    found = set(_VERDICT.findall(text))
    return (found.pop(), False) if len(found) == 1 else (None, True)


def mmhal_reply(text: str) -> int:
    """Returns the mark, 0 to 6; 0 for a text with none or several."""
    found = [mark for mark in range(7) if f"rating: {mark}" in text.lower()]
    return found[0] if len(found) == 1 else 0
