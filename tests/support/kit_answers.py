"""Answers for comparing scoring rules with those of VLMEvalKit and lmms-eval: fixed odd ones and
random ones.
"""

import functools
import inspect
import itertools
import random
import re

import pytest

from internvl3_jax.evaluate.scorers import letters

CHOICES = {"A": "a red car", "B": "a dog", "C": "two cats", "D": "none of these"}
ANSWERS = """
A|b|(C)|D.|Answer: B|The answer is (A).|The best option is C|A or B|a dog|Two Cats|none|E
I think it is a red car because of the color.|None of these options: A, B, C|[B]|B: a dog|*D*
yes|No.|Yes, it is|no, yes|Y|n|not at all|yesterday|I do not know|It is not yes|YES!
12|12.0|12.5%|0.125|-3|3,000|3000|1/2|\\frac{1}{2}|about 12 cm|twelve|12 of 13|1e3|$5|5.0001|4.9
The covered text|thecoveredtext|Word 3|word 3.|word|in 1990|a b  c|don't|the dog, the cat|two
```json\n{"result": "B"}\n```|```json\n{"result": C}\n```|result: B|{"short answer": "B"}|
<ref>x</ref><box>[[10, 20, 300, 400]]</box>|[0.1, 0.2, 0.3, 0.4]|[[100, 200, 300, 400]]|x=0.1, y=0.2
"""
# Answers as VSI-Bench's rules read them: tags, reasoning, Chinese, several lines.
SPATIAL = """
<answer>B</answer>|<answer> (C) two </answer>|<think>A or B</think> C|<think>maybe A|final answer: b
答案是C|我选 B。|选项 A: x@B. y|A. x@B. y@The answer is B|**D**|(E)|Option A: red@so it is C|I: 3
<answer>3.5 m</answer>|<think>12</think> about 4 to 5|three|Twenty one|1e3|-2.5e-1|.5|[3, 4]|['7', 2]
[]|[x]|two or three|12,5|3 of 4@<answer>7</answer>|<answer>seven</answer>|1.5.2|\u200b9|it is A or C
"""
PIECES = (
    "A B (B) C. D a dog two cats red the yes no 12 3.5 -1 % , . : answer is Answer: not".split()
)


def corpus() -> list[str]:
    fixed = [text for line in ANSWERS.split("\n") for text in line.split("|") if text]
    rng = random.Random(5)
    mixed = [" ".join(rng.choices(PIECES, k=rng.randint(1, 14))) for _ in range(400)]
    return [text.replace("\\n", "\n") for text in fixed] + mixed


def differences(ours, theirs, cases) -> list[tuple]:
    """Returns (case, ours, theirs) of the cases in which two functions differ."""
    found = []
    for case in cases:
        case = case if isinstance(case, tuple) else (case,)
        one, other = ours(*case), theirs(*case)
        if one != pytest.approx(other) if isinstance(other, float) else one != other:
            found.append((case, one, other))
    return found


def pairs(*references: str) -> list[tuple[str, str]]:
    return list(itertools.product(corpus(), references))


def spatial_answers() -> list[str]:
    return split(SPATIAL)


def split(text: str) -> list[str]:
    """Returns the parts of a text between line breaks and |, in which @ is a line break."""
    found = [part for line in text.split("\n") for part in line.split("|") if part]
    return [part.replace("@", "\n") for part in found]


def frame(**columns):
    """Returns a table of pandas, as the kit's programs take it."""
    import pandas

    return pandas.DataFrame(columns)


class NoJudge:
    """In place of a judge: its replies hold no answer."""

    def generate(self, *arguments, **options) -> str:
        return ""


def use_newest_letters(monkeypatch) -> None:
    """Reads options by the installed kit's rule of letters, in place of the card's."""
    from vlmeval.utils import matching_util

    newest = functools.partial(letters.option_letter, newest=True)
    monkeypatch.setattr(letters, "option_letter", newest)
    if "answer is" not in inspect.getsource(matching_util):  # before the summer of 2026
        monkeypatch.setattr(letters, "_PHRASE", re.compile("(?!)"))
