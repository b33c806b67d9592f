"""Yes or no: MME and POPE as InternVL's programs, HallusionBench as VLMEvalKit."""

import re
from collections.abc import Sequence

import numpy as np

from internvl3_jax.evaluate.scorers.vqa_text import without_punctuation

_CHINESE = re.compile("[\u4e00-\u9fa5]")


def mme_answer(text: str) -> str:
    """Returns "yes", "no" or "other". All but the first four characters are ignored."""
    text = text.replace("\n", "").replace("不是", "No").replace("是", "Yes").replace("否", "No")
    text = text.lower().replace("true", "yes").replace("false", "no")
    text = _CHINESE.sub("", text)
    if text in ("yes", "no"):
        return text
    return "yes" if "yes" in text[:4] else "no" if "no" in text[:4] else "other"


def mme_score(rows: Sequence[tuple[str, str]]) -> float:
    """Returns 100 (acc + acc+) of one task of MME.

    Args:
      rows: (reference, answer) in the order of the file: the two questions of an image follow one
        another.

    Raises:
      ValueError: no answer is a yes or a no, where the reference's program fails, too; or the
        number of rows is odd.
    """
    if len(rows) % 2:
        raise ValueError(f"{len(rows)} rows; every image of MME has two")
    read = [mme_answer(text) for _, text in rows]
    if set(read) == {"other"}:
        raise ValueError("no answer begins with yes or no; MME gives no score to such a task")
    right = [truth.lower() == text for (truth, _), text in zip(rows, read, strict=True)]
    both = [all(right[start : start + 2]) for start in range(0, len(right), 2)]
    return 100 * float(np.mean(right) + np.mean(both))


def pope_answer(text: str) -> str:
    """Returns "no" if one of No, not and no is a word of the first sentence, else "yes"."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def pope_f1(answers: Sequence[str], labels: Sequence[str]) -> float:
    """Returns the F1 score of yes in percent, of one category of POPE.

    Raises:
      ZeroDivisionError: there is no true positive, where the reference's program fails, too.
    """
    read = [pope_answer(answer) for answer in answers]
    pairs = list(zip(read, labels, strict=True))
    true, wrong, missed = (
        pairs.count(pair) for pair in (("yes", "yes"), ("yes", "no"), ("no", "yes"))
    )
    precision, recall = true / float(true + wrong), true / float(true + missed)
    return 100 * 2 * precision * recall / (precision + recall)


def yes_no(text: str) -> str:
    """Returns "Yes", "No" or "Unknown"."""
    words = without_punctuation(text.lower()).split()
    if ("yes" in words) == ("no" in words):
        return "Unknown"
    return "Yes" if "yes" in words else "No"


def hallusion(rows: Sequence[tuple[str, str, bool]]) -> list[float]:
    """Returns [aAcc, fAcc, qAcc] of HallusionBench in percent: of questions, of figures and of
    questions about all their figures.

    Args:
      rows: (index, l2-category, whether the answer is right). Parts 3, 4 and 5 of the index,
        counted from 0, are set, figure and question.
    """
    figures, questions = {}, {}
    for index, category, right in rows:
        parts = index.split("_")
        figures.setdefault((category, parts[3], parts[4]), []).append(right)
        questions.setdefault((category, parts[3], parts[5]), []).append(right)
    groups = [[[right] for *_, right in rows], figures.values(), questions.values()]
    return [100 * float(np.mean([all(group) for group in kind])) for kind in groups]
