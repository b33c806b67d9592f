r"""Final answers: what a solution answers, and whether two answers are the same.

    extract_answer(r"... so \boxed{\frac{1}{2}}.")     # '\frac{1}{2}'
    same_answer(r"\frac{1}{2}", "50%")                 # True
    same_answer("(B)", "B. twelve")                    # True

Rules alone, no model: what they cannot read counts as different unless it is spelt the same. Two numbers are the same within one part in
a million. A percent sign on one side alone may be a unit or a hundredth, so 50% is the same as 50 and as 0.5.
"""

import re
from fractions import Fraction

TOLERANCE = Fraction(1, 10**6)  # relative
_LONGEST_NUMBER = 60  # characters; longer strings of digits are compared as text

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_STATED = re.compile(r"\banswer\s*\**\s*(?P<how>is\b\s*:?|:|=)\s*(?P<answer>\S.*)", re.IGNORECASE)
_OPTION = re.compile(r"\(?(?P<letter>[A-J])(?:\)|[.:](?!\w)|\Z)(?P<text>.*)", re.DOTALL)
_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?(?:e[-+]?\d{1,3})?|\.\d+"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)(?:(?:(?P<whole>\d+)\s+)?(?:(?P<top>\d+)/(?P<bottom>\d+))|(?P<decimal>{_DECIMAL}))\s?(?P<percent>%?)"
)
_LAST_NUMBER = re.compile(rf"(?<![\w.])[-+]?(?:\d+/\d+|{_DECIMAL})(?:\s?\\?%)?", re.IGNORECASE)
_WRAPPERS = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]*)\}\s*\{([^{}]*)\}|(\d)\s*(\d))")
_NOISE = re.compile(r"\\left|\\right|\\[!,;: ]|\\?\$|\\\(|\\\)|\\\[|\\\]|\*\*|\^\s*\{?\s*\\circ\s*\}?|°")


def extract_answer(text: str) -> str | None:
    r"""The answer that a solution states: the last \boxed{...}, or else what follows the last "answer:" or "answer is".

    None if it states none, also if its only box was cut off before it closed.
    """
    for found in reversed(list(_BOXED.finditer(text))):
        content = _until_closed(text, found.end())
        if content is not None:
            return content.strip()
    stated = list(_STATED.finditer(text))
    if not stated:
        return None
    answer = stated[-1]["answer"]
    if stated[-1]["how"].lower().startswith("is"):  # a sentence; what follows it is no part of the answer
        answer = re.split(r"\.(?:\s|$)", answer)[0]
    return answer.strip().strip("*").strip().removesuffix(".") or None


def final_answer(text: str) -> str | None:
    """`extract_answer`, or else the option that the text is, its last number, or its last line. None for an empty text."""
    stated = extract_answer(text)
    if stated is not None:
        return stated
    option = _OPTION.fullmatch(text.strip())
    if option:
        return option["letter"]
    numbers = _LAST_NUMBER.findall(text)
    lines = text.split("\n") if not numbers else numbers
    return next((line.strip() for line in reversed(lines) if line.strip()), None)


def same_answer(a: str, b: str) -> bool:
    """Whether two final answers (not whole solutions) say the same; symmetric."""
    a, b = _normal(a), _normal(b)
    if a.lower() == b.lower():
        return True
    options = [_OPTION.fullmatch(side) for side in (a, b)]
    if all(options):
        return options[0]["letter"] == options[1]["letter"]
    if any(options):
        # "(B) 12" also answers a question whose answer is written out as 12.
        texts = [option["text"].strip() if option else side for option, side in zip(options, (a, b), strict=True)]
        return all(texts) and same_answer(*texts)
    return _same_number(_number(a), _number(b))


def _until_closed(text: str, start: int) -> str | None:
    """The text from `start`, inside a brace, to the brace that closes it; None if none does."""
    depth = 1
    for found in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return text[start : start + found.start()]
    return None


def _normal(answer: str) -> str:
    """Without the marks that change how an answer looks and not what it says."""
    answer = answer.replace("\u2212", "-").replace(r"\%", "%")
    answer = _NOISE.sub("", answer)
    for _ in range(3):  # nested
        answer = _WRAPPERS.sub(r"\1", answer)
    answer = _FRACTION.sub(lambda found: f"{found[1] or found[3]}/{found[2] or found[4]}", answer)
    answer = re.sub(r"\s+", " ", answer).strip().removesuffix(".").strip()
    return re.sub(r"\s*([-+*/=<>^,])\s*", r"\1", answer)


def _number(text: str) -> tuple[Fraction, bool] | None:
    """(value without its percent sign, whether it has one)"""
    found = _NUMBER.fullmatch(text.lower()) if len(text) <= _LONGEST_NUMBER else None
    if not found:
        return None
    if found["decimal"] is not None:
        value = Fraction(found["decimal"].replace(",", ""))
    elif int(found["bottom"]) == 0:
        return None
    else:
        value = int(found["whole"] or 0) + Fraction(int(found["top"]), int(found["bottom"]))
    return (-value if found["sign"] == "-" else value), bool(found["percent"])


def _same_number(a: tuple[Fraction, bool] | None, b: tuple[Fraction, bool] | None) -> bool:
    if a is None or b is None:
        return False
    (x, x_percent), (y, y_percent) = a, b
    if _close(x, y):
        return True
    return x_percent != y_percent and (_close(x / 100, y) if x_percent else _close(x, y / 100))


def _close(x: Fraction, y: Fraction) -> bool:
    return abs(x - y) <= TOLERANCE * max(abs(x), abs(y))
