"""Ways to compare a stated answer with the right one.

    rules         answer_matching.same_answer: the default, for numbers, options, units and text
    math_verify   these rules, and where they say no, the package math-verify, which also simplifies
                  expressions, equations, sets and intervals with sympy

math-verify reads any text as a formula: "cat" is a product of three letters and the same as "act",
2020-01-05 is 2014, and "1, 2" is the set "2, 1". So it is asked about formulas alone.
"""

import re
from collections.abc import Callable

from internvl3_jax.reward.answer_matching import same_answer

MATCHERS = ("rules", "math_verify")
Matcher = Callable[[str, str], bool]
_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{2,}")
_SIGN_OF_A_FORMULA = re.compile(r"[\\^_{}=]|(?<![A-Za-z])[a-z](?![A-Za-z])")
_LIST = re.compile(r"[^\[({\\]*,")  # a comma that no bracket comes before


def get_matcher(name: str) -> Matcher:
    """Returns a function of (stated answer, right answer).

    Raises:
      ValueError: the name is unknown.
      ImportError: math-verify is not installed.
    """
    if name not in MATCHERS:
        raise ValueError(f"matcher is {name!r}; it must be one of {', '.join(MATCHERS)}")
    if name == "rules":
        return same_answer
    try:
        import math_verify
    except ImportError as error:
        raise ImportError(
            "matcher math_verify needs the package math-verify; in a clone of this repository: "
            "pip install -e '.[verify]'"
        ) from error

    def matches(stated: str, answer: str) -> bool:
        if same_answer(stated, answer):
            return True
        if not (_may_be_formula(stated) and _may_be_formula(answer)):
            return False
        if not any(map(_SIGN_OF_A_FORMULA.search, (stated, answer))):
            return False
        # Both in one form that math-verify reads: LaTeX between dollar signs.
        gold, target = (math_verify.parse(_as_latex(text)) for text in (answer, stated))
        return bool(gold and target) and math_verify.verify(gold, target)

    return matches


def _may_be_formula(answer: str) -> bool:
    """Returns whether an answer has neither words nor a list without brackets."""
    return not _WORD.search(_COMMAND.sub(" ", answer)) and not _LIST.match(answer)


def _as_latex(answer: str) -> str:
    return answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
