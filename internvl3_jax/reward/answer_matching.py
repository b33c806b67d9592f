r"""Reads the final answer of a solution, and compares two final answers.

    extract_answer(r"... so \boxed{\frac{1}{2}}.")     # '\frac{1}{2}'
    same_answer(r"\frac{1}{2}", "50%")                 # True
    same_answer("(B)", "B. twelve")                    # True

The comparison has rules only, no model: texts that no rule reads are the same if they are spelled
the same. Two numbers are the same within one part in a million, also as products, quotients, powers
and roots (expressions.py). A percent sign on one side only may be a unit or a hundredth, so 50% is
the same as 50 and as 0.5.
"""

import re
from fractions import Fraction

from internvl3_jax.data.text.reasoning import split_reasoning
from internvl3_jax.reward import expressions

TOLERANCE = Fraction(1, 10**6)  # relative
_LONGEST_NUMBER = 60  # characters; longer strings of digits are compared as text

# Without braces the box extends to the end of the formula or word.
_BOXED = re.compile(
    r"\\(?:boxed|fbox|framebox)\s*(?:\{|(?P<bare>(?![\s{])(?:\{[^{}]*\}|(?!\\\)|\\\]|[\s$}]).)+))"
)
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_MARKED = re.compile(
    r"^#{4}\s*(\S.*)$|^#{1,4}\s*(?:final\s+)?answer\s*:?\s*\n+\s*(\S.*)$",
    re.IGNORECASE | re.MULTILINE,
)
_GROUPS = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d])")
_ASSIGNED = re.compile(r"\\?[A-Za-z][A-Za-z0-9_]{0,7}=(?=[^=])")
_DEGREES = re.compile(r"(?<=\d)\s*(?:degrees?|deg)\b\.?", re.IGNORECASE)
_SCALE = re.compile(r"(?<=\d)\s*(?:C(?:elsius)?|F(?:ahrenheit)?)\Z", re.IGNORECASE)
_STATED = re.compile(
    r"(?:\banswer|答案)\s*\**\s*(?P<how>is\b\s*:?|:|=|：|是)\s*(?=\S)", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"(?<!\bDr)(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bSt)(?<!\bProf)\.(?:\s|$)")
_OPTION = re.compile(
    r"(?:\(?(?P<letter>[A-J])(?:\)|[.:](?!\w)|\Z)|\(?(?P<small>[a-j])\)|(?P<alone>[a-j])\Z)"
    r"(?P<text>.*)",
    re.DOTALL,
)
_SEVERAL_OPTIONS = re.compile(r"\(?[A-J]\)?(?:(?:\s*(?:,|and|&|or|/)\s*|\s+|(?<=\)))\(?[A-J]\)?)+")
_CALLED_OPTION = re.compile(r"(?i:(?:the\s+)?(?:correct\s+)?(?:option|choice)\s+)(?=\(?[A-J]\b)")
_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?(?:e[-+]?\d{1,3})?|\.\d+"
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)"
    r"(?:(?:(?P<whole>\d+)\s+)?(?:(?P<top>\d+)/(?P<bottom>\d+))"
    rf"|(?P<decimal>{_DECIMAL}))\s?(?P<percent>%?)"
)
_LAST_NUMBER = re.compile(rf"(?<![\w.])[-+]?(?:\d+/\d+|{_DECIMAL})(?:\s?\\?%)?", re.IGNORECASE)
# Spellings and what replaces them, in this order.
_SYMBOLS = [
    (re.compile(written), meant)
    for written, meant in (
        ("[\u2212\u2013]", "-"),
        (r"\\%|(?<=\d)\s*percent\b", "%"),
        (r"\{,\}", ","),
        (r"(?<=\d)\\[,;: ](?=\d{3})", " "),
        (r"(?<=\d)\\[,;: ]\s*(?=\\?[A-Za-z])", " "),  # a unit
        (r"(?<=\d)['_\u2019](?=\d{3}(?!\d))", ""),
        (r"(?<=[\w)])\*\*(?=[\w(-])", "^"),
        (r"(?<=\d)\s*[xX]\s*(?=10\s*(?:\^|\*\*))", "*"),
        (r"\\([{}])", r"\1"),
        (r"\\infty(?![A-Za-z])", "\u221e"),
        (r"\\leq?(?![A-Za-z])|<=", "\u2264"),
        (r"\\geq?(?![A-Za-z])|>=", "\u2265"),
        (r"\\neq?(?![A-Za-z])|!=", "\u2260"),
        (r"\\pm(?![A-Za-z])\s*|\+/-\s*", "\u00b1"),
        (r"\\angle\s*|\u2220\s*", ""),
        (r"(?<=\d)(?=[\u00bc-\u00be\u2153\u2154])", " "),
        *(
            (sign, value)
            for sign, value in zip(
                "\u00bc\u00bd\u00be\u2153\u2154", ("1/4", "1/2", "3/4", "1/3", "2/3"), strict=True
            )
        ),
    )
]
_WRAPPERS = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_NOISE = re.compile(
    r"\\left|\\right|\\[!,;: ]|\\?\$|\\\(|\\\)|\\\[|\\\]|\*\*|\^\s*\{?\s*\\circ\s*\}?|°"
)


def extract_answer(text: str) -> str | None:
    r"""Returns the answer that a solution states.

    That is the last \boxed{...} (or \boxed 5), or else <answer>...</answer>, or what follows the
    last "answer:" or "answer is", or a line of its own after #### or a heading "Answer".

    Returns:
      None if it states none, also if its only box was cut off before it closed.
    """
    for box in reversed(list(_BOXED.finditer(text))):
        content = box["bare"].rstrip(".,;:") if box["bare"] else _until_closed(text, box.end())
        if content is not None:
            return content.strip()
    if tagged := _TAGGED.findall(text):
        return tagged[-1].strip() or None
    stated = list(_STATED.finditer(text))
    if not stated:
        marked = _MARKED.findall(text)
        return "".join(marked[-1]).strip().removesuffix(".") or None if marked else None
    # A displayed formula begins on a line of its own: take the first line with content.
    lines = text[stated[-1].end() :].split("\n")
    answer = next((line for line in lines if _normal(line.replace("*", ""))), "")
    # "answer is" begins a sentence; the next sentence is no part of the answer.
    if stated[-1]["how"].lower().startswith("is"):
        answer = _SENTENCE_END.split(answer)[0]
    return answer.strip().strip("*").strip().removesuffix(".") or None


def final_answer(text: str) -> str | None:
    """Returns `extract_answer`, or else the option that the text is, its last number, or its last
    line; None for an empty text.

    Reasoning in <think> and </think> is not read; a text that ends within it has no answer.
    """
    text = split_reasoning(text).answer
    stated = extract_answer(text)
    if stated is not None:
        return stated
    option = _OPTION.fullmatch(text.strip())
    if option:
        return _letter(option)
    numbers = _LAST_NUMBER.findall(text)
    lines = text.split("\n") if not numbers else numbers
    return next((line.strip() for line in reversed(lines) if line.strip()), None)


def same_answer(a: str, b: str) -> bool:
    """Returns whether two final answers (not solutions) are the same; symmetric."""
    a, b = _normal(a), _normal(b)
    if _same(a, b):
        return True
    assigned = [_ASSIGNED.match(side) for side in (a, b)]
    # x = 5 answers what 5 answers; y = 5 does not answer x = 5
    if any(assigned) and not all(assigned):
        a, b = (
            side[match.end() :] if match else side
            for match, side in zip(assigned, (a, b), strict=True)
        )
        if _same(a, b):
            return True
    if any(_SEVERAL_OPTIONS.fullmatch(side) for side in (a, b)):
        letters = [
            set(re.findall(r"\b[A-J]\b", side))
            for side in (a, b)
            if _SEVERAL_OPTIONS.fullmatch(side)
        ]
        return len(letters) == 2 and letters[0] == letters[1]
    options = [_OPTION.fullmatch(side) for side in (a, b)]
    texts = [
        option["text"].strip() if option else side
        for option, side in zip(options, (a, b), strict=True)
    ]
    if all(options):
        # One may describe the option further, but not differently.
        small, large = sorted((text.lower() for text in texts), key=len)
        return _letter(options[0]) == _letter(options[1]) and (small in large or _same(*texts))
    # "(B) 12" also answers a question whose answer is written out as 12.
    return any(options) and all(texts) and _same(*texts)


def _letter(option: re.Match) -> str:
    return (option["letter"] or option["small"] or option["alone"]).upper()


def _same(a: str, b: str) -> bool:
    """Returns whether normalized answers are the same text or the same number."""
    return a.lower().replace(", ", ",") == b.lower().replace(", ", ",") or _same_number(
        _number(a), _number(b)
    )


def _until_closed(text: str, start: int) -> str | None:
    """Returns the text from `start`, inside a brace, to its closing brace; None if there is none."""
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start : start + brace.start()]
    return None


def _normal(answer: str) -> str:
    """Returns an answer without marks that change its look and not its meaning."""
    for written, meant in _SYMBOLS:
        answer = written.sub(meant, answer)
    answer = _NOISE.sub("", answer)
    for _ in range(3):  # nested
        answer = _WRAPPERS.sub(r"\1", answer)
    answer = expressions.plain(_FRACTION.sub(_fraction, expressions.plain(answer)))
    answer = _DEGREES.sub("", answer)
    answer = _SCALE.sub(lambda match: f" {match[0].strip()[0].upper()}", answer)
    answer = re.sub(r"\s+", " ", answer).strip().removesuffix(".").strip()
    # A space after a comma stays: "3, 100" is not the number 3,100.
    return _CALLED_OPTION.sub(
        "", re.sub(r"\s*([-+*/=<>^\u2264\u2265\u2260])\s*|\s+(?=,)", r"\1", answer)
    )


def _fraction(match: re.Match) -> str:
    r"""Returns \frac{top}{bottom} as top/bottom, with a space before it in a mixed number."""
    terms = (match[1] or match[2], match[3] or match[4])
    top, bottom = (
        term if re.fullmatch(r"\s*[-+]?[\w.]+\s*", term) else f"({term})" for term in terms
    )
    is_mixed = match.start() and match.string[match.start() - 1].isdigit()
    return f"{' ' if is_mixed else ''}{top}/{bottom}"


def _number(text: str) -> tuple[Fraction, bool] | None:
    """Returns (value without its percent sign, whether it has one); None if it is not a number."""
    text = _GROUPS.sub(lambda group: group[0].replace(" ", ""), text)
    match = _NUMBER.fullmatch(text.lower()) if len(text) <= _LONGEST_NUMBER else None
    if not match:
        value = expressions.value(text.removesuffix("%"))
        return None if value is None else (value, text.endswith("%"))
    if match["decimal"] is not None:
        value = Fraction(match["decimal"].replace(",", ""))
    elif int(match["bottom"]) == 0:
        return None
    else:
        value = int(match["whole"] or 0) + Fraction(int(match["top"]), int(match["bottom"]))
    return (-value if match["sign"] == "-" else value), bool(match["percent"])


def _same_number(a: tuple[Fraction, bool] | None, b: tuple[Fraction, bool] | None) -> bool:
    if a is None or b is None:
        return False
    (x, x_percent), (y, y_percent) = a, b
    if _close(x, y):
        return True
    return x_percent != y_percent and (_close(x / 100, y) if x_percent else _close(x, y / 100))


def _close(x: Fraction, y: Fraction) -> bool:
    return abs(x - y) <= TOLERANCE * max(abs(x), abs(y))
