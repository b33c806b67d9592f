r"""Evaluates written products, quotients, powers and roots: 1.5 \times 10^3, 2^{10}, \frac{1}{-2},
2\pi, \sqrt{2}/2.

Sums are not evaluated: a dash between two numbers is more often a range, a score or a date.
"""

import math
import re
from fractions import Fraction

MAX_LENGTH = 60
MAX_EXPONENT = 100
MAX_DIGITS = 400  # of a power

_TOKEN = re.compile(r"\s*(?:(\d+\.?\d*|\.\d+)|(sqrt|π|[-+*/^()]))")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")


def plain(text: str) -> str:
    r"""Replaces the LaTeX and Unicode forms of these operations by * ^ π sqrt()."""
    text = re.sub(
        r"\\(?:times|cdot|ast)(?![A-Za-z])|(?<=[\d)}])\s*[×·⋅∙]\s*(?=[\d(\\π])", "*", text
    )
    text = re.sub(r"\\pi(?![A-Za-z])|(?<![A-Za-z])pi(?![A-Za-z])", "π", text)
    text = re.sub(r"\\sqrt\s*\[(\d+)\]\s*\{([^{}]*)\}", r"(\2)^(1/\1)", text)
    text = re.sub(
        r"\\sqrt\s*\{([^{}]*)\}|√\s*\(([^()]*)\)",
        lambda match: f"sqrt({match[1] or match[2]})",
        text,
    )
    text = re.sub(r"(?:\\sqrt|√)\s*(\d+)", r"sqrt(\1)", text)
    text = re.sub(r"\^\s*\{([^{}]*)\}", r"^(\1)", text)
    text = re.sub(
        "(?<=[0-9a-z)π])([⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+)",
        lambda match: f"^({match[1].translate(_SUPERSCRIPTS)})",
        text,
    )
    text = re.sub(r"(?<=[a-z)\dπ])\s*\*?\s*(?=π)|(?<=π)\s+(?=[a-z])", "", text)
    # x^2 and x_1 with or without braces
    return re.sub(r"_\{(\w)\}", r"_\1", re.sub(r"\^\((\w)\)", r"^\1", text))


def value(text: str) -> Fraction | None:
    """Returns the value of a text after `plain`, an irrational one in the precision of a float.

    Returns:
      None if the text is not entirely such an expression.
    """
    if len(text) > MAX_LENGTH:
        return None
    tokens, start = [], 0
    text = text.strip()
    while start < len(text):
        match = _TOKEN.match(text, start)
        if not match:
            return None
        tokens.append(match[1] or match[2])
        start = match.end()
    parser = _Parser(tokens)
    try:
        result = parser.product()
        return result if not parser.tokens else None
    except (ValueError, ZeroDivisionError, OverflowError, IndexError):
        return None


class _Parser:
    """A recursive descent parser; every method takes its tokens from the front.

    Raises:
      IndexError: the tokens end too soon.
      ValueError: they are not such an expression, or a number is too large.
    """

    def __init__(self, tokens: list[str]):
        self.tokens = tokens

    def product(self) -> Fraction:
        result, divided = self.signed(), False
        while self.tokens and self.tokens[0] not in ")+-":
            operator = self.tokens.pop(0) if self.tokens[0] in "*/" else "*"
            if operator == "/":
                if divided:
                    raise ValueError  # 1/2/2020 is a date
                divided, result = True, result / self.signed()
            else:
                result *= self.signed()
        return result

    def signed(self) -> Fraction:
        sign = 1
        if self.tokens[0] in "+-":
            sign = -1 if self.tokens.pop(0) == "-" else 1
        return sign * self.power()

    def power(self) -> Fraction:
        base = self.factor()
        if not self.tokens or self.tokens[0] != "^":
            return base
        self.tokens.pop(0)
        exponent = self.signed()
        if abs(exponent) > MAX_EXPONENT:
            raise ValueError
        if exponent.denominator != 1:
            if base < 0:
                raise ValueError
            return Fraction(float(base) ** float(exponent))
        if max(len(str(base.numerator)), len(str(base.denominator))) * abs(exponent) > MAX_DIGITS:
            raise ValueError
        return base ** int(exponent)

    def factor(self) -> Fraction:
        token = self.tokens.pop(0)
        if token == "π":
            return Fraction(math.pi)
        if token == "sqrt":
            if self.tokens[0] != "(":
                raise ValueError
            inside = self.factor()
            if inside < 0:
                raise ValueError
            roots = math.isqrt(inside.numerator), math.isqrt(inside.denominator)
            exact = Fraction(*roots)
            return exact if exact * exact == inside else Fraction(math.sqrt(inside))
        if token == "(":
            inside = self.product()
            if self.tokens.pop(0) != ")":
                raise ValueError
            return inside
        if token in "+-*/^)":
            raise ValueError
        return Fraction(token.rstrip("."))
