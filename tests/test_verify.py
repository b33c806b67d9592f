"""answer_matching.py, matchers.py: the answer that a solution states, and when two answers are the same."""

import sys

import pytest

from internvl3_jax.reward.answer_matching import extract_answer, final_answer, same_answer
from internvl3_jax.reward.matchers import get_matcher


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"First \boxed{3}, then \boxed{4}.", "4"),
        (r"\boxed{\frac{1}{\sqrt{2}}} is it", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"a brace alone \boxed{\}}", r"\}"),
        (r"\boxed{ 5 } and a box cut off \boxed{6", "5"),
        (r"Answer: 7 but \boxed{8}", "8"),
        (r"only \boxed{6", None),
        (r"so it is $\boxed 5$", "5"),
        (r"so $\boxed 12.5$.", "12.5"),
        (r"\(\boxed\frac{1}{2}\) it is", r"\frac{1}{2}"),
        (r"\boxed", None),
        ("Answer: 12 cm", "12 cm"),
        ("Answer: 3\nNo, wait.\n**Answer:** B. the dog", "B. the dog"),
        ("ANSWER = 0.5", "0.5"),
        ("So the final answer is 3.14. It is a circle.", "3.14"),
        ("The answer is **42**.", "42"),
        ("Final answer is: \n(C)", "(C)"),
        ("Answer:", None),
        ("The answer is:\n\n$$\n42\n$$", "42"),
        ("The answer is:\n\\[\n\\]", None),
        ("Final answer: The answer is B.", "B"),
        ("The answer is 41. Wait, no: the answer is 42.", "42"),
        ("Answer: 7\nAnswer:", "7"),
        ("The answer is Dr. Smith. He is the doctor.", "Dr. Smith"),
        ("answers are many", None),
        ("I do not know", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"2 + 3 = 5, so \boxed{6}", "6"),
        ("(B) twelve of 13", "B"),
        ("D", "D"),
        ("2 + 3 = 5\n\n5 + 1,000 = 1,005", "1,005"),
        ("it falls by -2.5 %", "-2.5 %"),
        ("the red\ncat\n", "cat"),
        ("from 2x4 to H2O", "2"),
        (" \n", None),
    ],
)
def test_final_answer_falls_back(text, answer):
    assert final_answer(text) == answer


SAME = [
    ("5", "5"),
    ("5", " 5. "),
    ("Red", "red"),
    ("1,234.50", "1234.5"),
    ("0.5", r"\frac{1}{2}"),
    ("0.5", r"$\dfrac12$"),
    ("-1/4", "\u22120.25"),
    ("1 1/2", "1.5"),
    ("50%", "0.5"),
    ("50%", "50"),
    (r"50\%", "50 %"),
    ("1/3", "0.3333333"),
    ("1e3", "1000"),
    ("(B)", "B"),
    ("B.", "B) text"),
    ("B", r"\text{B}"),
    (r"\textbf{(B) } 12", "B"),
    ("B: the dog", "(B)"),
    ("(B) 12", "12.0"),
    ("30°", r"30^\circ"),
    ("x + 1", "x+1"),
    ("$12", "12"),
    ("9" * 80, "9" * 80),
    (r"2\frac{1}{2}", "2.5"),
    (r"\frac{-1}{2}", "-0.5"),
    (r"\frac{x+1}{2}", "(x+1)/2"),
    ("10{,}000", "10000"),
    ("option B", "B"),
    ("the correct choice (B)", "B. the dog"),
    ("(b)", "B"),
    ("b", "(B)"),
    ("B. 12", "B. 12 cm"),
    ("(A) and (C)", "A, C"),
    ("(1, 2)", "(1,2)"),
    ("(A) " * 2000, "(A) " * 2000),
    (r"1.5 \times 10^3", "1500"),
    ("1.5×10³", "1.5e3"),
    (r"1.5 \cdot 10^{-3}", "0.0015"),
    ("10^3", "1000"),
    (r"2^{10}", "1024"),
    (r"\frac{1}{-2}", "-0.5"),
    (r"-\frac{1}{-2}", "0.5"),
    (r"2\pi", "2π"),
    (r"\frac{\pi}{2}", "π/2"),
    (r"2 \pi", "6.2831853"),
    (r"\sqrt{16}", "4"),
    (r"\frac{\sqrt{2}}{2}", "0.70710678"),
    (r"2\sqrt3", "√12"),
    ("1 000", "1000"),
    ("12\u202f345\u00a0678", "12345678"),
    (r"1\,000", "1000"),
    ("90 degrees", "90°"),
    ("25 °C", "25 degrees Celsius"),
    ("x=5", "5"),
    (r"x = \frac{1}{2}", "0.5"),
    (r"\theta = 30^\circ", "30"),
]


@pytest.mark.parametrize(("a", "b"), SAME)
def test_same(a, b):
    assert same_answer(a, b)
    assert same_answer(b, a)


DIFFERENT = [
    (r"2\frac{1}{2}", "10.5"),
    (r"\frac{x+1}{2}", r"x+\frac{1}{2}"),
    ("(A) and (C)", "A"),
    ("(A)(B)", "(A)"),
    ("3, 100", "3100"),
    ("H. pylori", "H. influenzae"),
    ("ABED", "BEAD"),
    ("(A) " * 2000, "42"),
    ("5", "6"),
    ("1", "1.00001"),
    ("0", "1e-9"),
    ("1/3", "0.333"),
    ("50%", "5"),
    ("50%", "0.5%"),
    ("A", "B"),
    ("B) 12", "C) 12"),
    ("A cat", "A"),
    ("A", "a cat"),
    ("1 1/2", "11/2"),
    ("1,23", "123"),
    ("1/0", "2/0"),
    ("red", "blue"),
    ("", "0"),
    ("B", ""),
    ("9" * 80, "9" * 79 + "8"),
    ("1e999999999", "2e999999999"),
    ("9^9^9^9", "9^9^9^8"),
    ("x=5", "y=5"),
    ("x=5", "x"),
    ("x==5", "5"),
    ("3-4", "-1"),
    ("3+4", "7"),
    ("1/2/2020", "1/4040"),
    ("2π", "2"),
    ("10^3", "103"),
    ("2^10", "210"),
    ("1 00", "100"),
    ("1 2000", "12000"),
    ("25 °C", "25 °F"),
    ("pie", "π"),
    ("(-2)^0.5", "2^0.5"),
    ("sqrt(-4)", "2"),
    ("2(3)", "23"),
]


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_different(a, b):
    assert not same_answer(a, b)
    assert not same_answer(b, a)


def test_an_answer_is_the_same_as_itself_whatever_it_is():
    for text in ["", "{", r"\boxed{", "∞", "(", r"\frac{1}{0}", "0", "-", "%", "$$"]:
        assert same_answer(text, text)


@pytest.mark.parametrize("a, b", [
    ("e^2", "e^{2}"), ("x_1", "x_{1}"), ("a^2", "a²"), (r"\frac1{2}", "0.5"), (r"\frac{1}2", "0.5"), (r"\sqrt[3]{8}", "2"),
    ("1.5 x 10^3", "1500"), ("1.5*10**3", "1500"), ("2**10", "1024"), (r"2\pi r", "2πr"), (r"\{1,2\}", "{1,2}"), (r"\infty", "∞"),
    (r"x\le 5", "x≤5"), (r"x \geq 5", "x>=5"), (r"\pm 5", "±5"), ("–5", "-5"), (r"5\,\mathrm{cm}", "5 cm"), ("50 percent", "50%"),
    ("1'000", "1000"), ("1_000", "1000"), ("½", "0.5"), ("1½", "1.5"), (r"\angle A = 30", "30"), ("a)", "A"),
])  # fmt: skip
def test_ways_to_write_the_same(a, b):
    assert same_answer(a, b) and same_answer(b, a)


@pytest.mark.parametrize("a, b", [
    ("x^12", "x^1"), ("5 cm", "5 m"), ("1_00", "100"), ("**5**", "55"), ("1–2", "12"), ("2**3", "6"), ("x_1", "x_2"), ("x≤5", "x≥5"),
])  # fmt: skip
def test_what_only_looks_alike(a, b):
    assert not same_answer(a, b) and not same_answer(b, a)


@pytest.mark.parametrize("text, answer", [
    (r"so \framebox{5}", "5"), ("steps <answer>5</answer>", "5"), ("work\n#### 42", "42"), ("答案：5", "5"), ("### Answer\n5", "5"),
])  # fmt: skip
def test_other_trainers_ways_to_state_an_answer(text, answer):
    assert extract_answer(text) == answer


# --- other matchers ------------------------------------------------------------------------------


def test_a_matcher_that_is_not_installed_says_how(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert get_matcher("rules") is same_answer
    with pytest.raises(ImportError, match=r"needs the package math-verify; .*'\.\[verify\]'"):
        get_matcher("math_verify")
    with pytest.raises(
        ValueError, match="matcher is 'sympy'; it must be one of rules, math_verify"
    ):
        get_matcher("sympy")


@pytest.mark.parametrize(
    ("stated", "answer", "same"),
    [
        ("x^2+2x+1", "(x+1)^2", True),
        (r"\{1,2\}", r"\{2,1\}", True),
        ("(0,1]", "(0,1)", False),
        ("y=5", "x=5", False),
        ("50%", "0.5", True),
        # What math-verify alone takes for formulas, and calls the same.
        ("cat", "act", False),
        ("2020-01-05", "2014", False),
        ("1, 2, 3", "3, 2, 1", False),
        ("7-3", "4", False),
        ("12 cm", "12", False),
    ],
)
def test_math_verify(stated, answer, same):
    pytest.importorskip("math_verify")
    assert get_matcher("math_verify")(stated, answer) is same
