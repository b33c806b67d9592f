"""Evaluates written numbers and arithmetic, for answers of MathVision: 1/2, 2^3, 1,000,
\\frac{1}{2}+\\sqrt{3}.

The kit evaluates Python first and then LaTeX through a converter; this module has one small grammar
for each and no other names than pi.
"""

import ast
import math
import operator
import re

MAX_LENGTH = 200
MAX_EXPONENT = 1000
_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.BitXor: operator.xor,
}
_UNARY = {ast.USub: operator.neg, ast.UAdd: operator.pos}
_TOKEN = re.compile(
    r"\s*(?:(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.?\d*|\.\d+)"
    r"|\\?(frac|dfrac|tfrac|sqrt|pi|cdot|times|div|left|right)(?![A-Za-z])|([-+*/^(){}\[\]]))"
)
_ERRORS = (ValueError, ArithmeticError, IndexError, TypeError, SyntaxError, RecursionError)


def python_value(text: str) -> float | None:
    """Returns the value of a number or of arithmetic in Python's notation; None for other texts."""
    if len(text) > MAX_LENGTH:
        return None
    try:
        return _python(ast.parse(text.strip(), mode="eval").body)
    except (*_ERRORS, MemoryError):
        return None


def _python(node):
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_python(node.operand))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return _power(_python(node.left), _python(node.right))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)](_python(node.left), _python(node.right))
    raise ValueError("not arithmetic")


def latex_value(text: str) -> float | None:
    """Returns the value of a number or of arithmetic in LaTeX; None for other texts."""
    if len(text) > MAX_LENGTH:
        return None
    text, tokens, place = text.strip().strip("$").rstrip(), [], 0
    while place < len(text):
        found = _TOKEN.match(text, place)
        if not found:
            return None
        token = found[1] or found[2] or found[3]
        if token not in ("left", "right"):
            tokens.append(token.replace(",", ""))
        place = found.end()
    try:
        parser = _Latex(tokens)
        value = parser.sum()
        return float(value) if not parser.tokens else None
    except _ERRORS:
        return None


class _Latex:
    """A recursive descent parser that takes tokens from the front. IndexError: none is left."""

    def __init__(self, tokens: list[str]):
        self.tokens = tokens

    def _next(self) -> str:
        return self.tokens[0] if self.tokens else ""

    def _take(self, wanted: str) -> None:
        if self.tokens.pop(0) != wanted:
            raise ValueError(f"no {wanted}")

    def sum(self) -> float:
        value = self.product()
        while self._next() in ("+", "-"):
            value = value + self.product() if self.tokens.pop(0) == "+" else value - self.product()
        return value

    def product(self) -> float:
        value = self.signed()
        while (token := self._next()) and token not in (")", "}", "]", "+", "-", "^"):
            if token in ("*", "/", "cdot", "times", "div"):
                self.tokens.pop(0)
            factor = self.signed()
            value = value / factor if token in ("/", "div") else value * factor
        return value

    def signed(self) -> float:
        sign = 1
        while self._next() in ("+", "-"):
            sign = -sign if self.tokens.pop(0) == "-" else sign
        return sign * self.power()

    def power(self) -> float:
        base = self.factor()
        if self._next() != "^":
            return base
        self.tokens.pop(0)
        sign = -1 if self._next() == "-" and self.tokens.pop(0) else 1
        return _power(base, sign * self.power())

    def _group(self, start: str, end: str) -> float:
        self._take(start)
        value = self.sum()
        self._take(end)
        return value

    def factor(self) -> float:
        token = self._next()
        if token in ("(", "{"):
            return self._group(token, ")" if token == "(" else "}")
        self.tokens.pop(0)
        if token == "pi":
            return math.pi
        if token in ("frac", "dfrac", "tfrac"):
            top = self._group("{", "}")
            return top / self._group("{", "}")
        if token == "sqrt":
            root = self._group("[", "]") if self._next() == "[" else 2
            return self._group("{", "}") ** (1 / root)
        return float(token)


def _power(base, exponent):
    if abs(exponent) > MAX_EXPONENT:
        raise ValueError("a power too large")
    value = base**exponent
    if isinstance(value, complex):
        raise ValueError("no real number")
    return value
