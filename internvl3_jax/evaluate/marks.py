"""Marks answers: the scoring rules of scorers/, applied to rows.

With reasoning, a boxed or stated answer is read first. An answer that the rule cannot read is worth
nothing and counted (`Mark.readable`); in the card's runs a language model read some of them.
"""

import functools
import io
import re
from collections.abc import Callable

from internvl3_jax.data.media.images import open_image
from internvl3_jax.evaluate.scorers import (
    boxes,
    letters,
    mathematics,
    options,
    short,
    spatial,
    yes_no,
)
from internvl3_jax.evaluate.task import Mark, Row
from internvl3_jax.reward.answer_matching import extract_answer, same_answer

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)")
VSI_NUMBERS = (
    "object_counting",
    "object_abs_distance",
    "object_size_estimation",
    "room_size_estimation",
)


def mark(scorer: str, row: Row, answer: str) -> Mark:
    """Returns what an answer is worth by a rule of SCORERS."""
    return SCORERS[scorer](row, answer)


def check(scorer: str) -> None:
    """Raises ValueError if a library is missing that a rule needs."""
    if scorer == "vcr":
        _tokenizer()


def _right(is_right, read=None, readable: bool = True) -> Mark:
    return Mark(float(is_right), read, readable)


# --- options ------------------------------------------------------------------------------------


def read_letter(row: Row, answer: str) -> str | None:
    """Returns the option that an answer names; None if the rule cannot read it."""
    stated = extract_answer(answer) if "boxed" in answer else None
    if stated is not None:
        letter = letters.option_letter(stated, row.options)
        if letter is not None:
            return letter
    return letters.option_letter(answer, row.options)


def _option_letter(row: Row, answer: str) -> Mark:
    letter = read_letter(row, answer)
    return _right(letter == row.answer, letter, letter is not None)


def _mmmu(row: Row, answer: str) -> Mark:
    if row.options:
        return _option_letter(row, answer)
    stated = extract_answer(answer) if "boxed" in answer else None
    text = answer if stated is None else stated
    return _right(letters.mmmu_open_vlmevalkit(text, row.answer), text)


def _option_first(row: Row, answer: str) -> Mark:
    if not answer.strip():
        return _right(False, "", False)
    read = options.option_first(answer, row.options)
    return _right(read == row.answer, read, read in row.options)


def _option_regex(kind: str, row: Row, answer: str) -> Mark:
    read = letters.option_regex(answer, kind)
    if not read and kind == "video_mme":  # the kit asks the judge, or else reads by option_letter
        read = letters.option_letter(answer, row.options) or ""
    return _right(read == row.answer, read, bool(read))


def _mantis(row: Row, answer: str) -> Mark:
    values = row.values
    return _right(options.mantis(values["kind"], answer, row.answer, values["texts"]), answer)


def _crpe(row: Row, answer: str) -> Mark:
    if not answer:
        return _right(False, "", False)
    return _right(options.crpe_row(row.answer, answer), answer)


def _mlvu(row: Row, answer: str) -> Mark:
    readable = ")" in answer or letters.option_letter(answer, row.options) is not None
    return _right(letters.mlvu(answer, row.options, row.answer), answer, readable)


def _cgbench(row: Row, answer: str) -> Mark:
    value = options.cgbench(answer, row.answer)
    return Mark(None, None, False) if value < 0 else _right(value)


# --- short answers, yes or no, boxes --------------------------------------------------------------


def _chartqa(row: Row, answer: str) -> Mark:
    scores = [
        max(short.relaxed_accuracy(answer, reference, corrected) for reference in row.answer)
        for corrected in (False, True)
    ]
    return Mark(scores[0], answer, values=tuple(scores))


@functools.cache
def _tokenizer():
    return short.english_tokenizer()


def _vcr(row: Row, answer: str) -> Mark:
    scores = [short.vcr(answer, covered, _tokenizer()) for covered in row.answer]
    return Mark(None, [run for *_, run in scores], values=tuple(score[:2] for score in scores))


def _hallusion(row: Row, answer: str) -> Mark:
    read = yes_no.yes_no(answer)
    return _right(read == row.answer, read, read != "Unknown")


def _mme(row: Row, answer: str) -> Mark:
    read = yes_no.mme_answer(answer)
    return _right(read == row.answer.lower(), read, read != "other")


def _pope(row: Row, answer: str) -> Mark:
    read = yes_no.pope_answer(answer)
    return _right(read == row.answer, read)


def _refcoco(row: Row, answer: str) -> Mark:
    box = boxes.read_box(answer, row.values["width"], row.values["height"])
    iou, right = boxes.refcoco(answer, row.values["width"], row.values["height"], row.answer)
    return Mark(float(right), box.tolist(), bool(box.any()), values=(iou,))


def _screenspot(row: Row, answer: str) -> Mark:
    (image,) = row.load_images()
    opened = open_image(io.BytesIO(image) if isinstance(image, bytes) else image)
    text = boxes.stored_point(answer)
    text = boxes.click_point(answer) if text == answer else text
    value = boxes.screenspot(text, row.answer, opened.size) / 100
    return Mark(value, text, text.startswith("x="))


def _vsi(row: Row, answer: str) -> Mark:
    if row.values["question_type"] in VSI_NUMBERS:
        read = spatial.read_number(answer)
        return Mark(spatial.vsi_number(answer, float(row.answer)), read, read is not None)
    read = spatial.vsi_option(answer)
    return _right(read == spatial.vsi_option(row.answer), read, read is not None)


# --- mathematics and reasoning --------------------------------------------------------------------


def _stated(answer: str) -> str:
    """Returns the boxed or stated answer, or else the whole text."""
    read = mathematics.read_answer(answer)
    return answer.strip() if read is None else read


def _mathvista(row: Row, answer: str) -> Mark:
    values, stated = row.values, _stated(answer)
    if values["question_type"] == "multi_choice":
        choices = letters.options_of([str(choice) for choice in values["choices"]])
        read = letters.option_letter(stated, choices) or letters.option_letter(answer, choices)
        return _right(read == values["answer_option"], read, read is not None)
    if values["answer_type"] not in ("integer", "float"):
        return _right(False, stated)  # the kit compares such an answer with "None"
    number = _only_number(stated)
    return _right(number is not None and number == float(row.answer), number, number is not None)


def _only_number(text: str) -> float | None:
    """Returns the only number of a text, without separators; None if there is none or several."""
    found = {float(number.replace(",", "")) for number in _NUMBER.findall(text)}
    return found.pop() if len(found) == 1 else None


def _mathvision(row: Row, answer: str) -> Mark:
    stated, readable = _stated(answer), mathematics.read_answer(answer) is not None
    choices = row.values["choices"]
    if choices:
        named = letters.options_of([str(choice) for choice in choices])
        read = letters.option_letter(stated, named) or letters.option_letter(answer, named)
        return _right(read == row.answer, read, read is not None)
    return _right(mathematics.mathvision_equal(stated, row.answer), stated, readable)


def _mathverse(row: Row, answer: str) -> Mark:
    read = mathematics.read_answer(answer)
    if read is None:
        return _right(False, None, False)
    equal = mathematics.mathverse_prefetch(read, row.answer) or same_answer(read, row.answer)
    return _right(equal, read)


def _dynamath(row: Row, answer: str) -> Mark:
    kind = row.values["answer_type"]
    right, readable = mathematics.dynamath_row(answer, kind, row.answer)
    stated = mathematics.read_answer(answer)
    if stated is not None and (not readable or kind not in ("float", "multiple choice")):
        right, readable = mathematics.dynamath_row(stated, kind, row.answer)
    return _right(right, stated, readable)


def _wemath(row: Row, answer: str) -> Mark:
    read = options.wemath_letter(answer) if "Answer" in answer else None
    if read is None:
        found = re.findall(r"\b[A-H]\b", _stated(answer))
        read = found[0] if len(set(found)) == 1 else None
    return _right(read == row.answer, read, read is not None)


def _logicvista(row: Row, answer: str) -> Mark:
    read = "".join(dict.fromkeys(re.findall(r"\b[A-Z]\b", _stated(answer))))
    return _right(options.logicvista(read, row.answer), read, bool(read))


# Name -> function of (row, answer).
SCORERS: dict[str, Callable[[Row, str], Mark]] = {
    "none": lambda row, answer: Mark(None, None),
    "option_letter": _option_letter,
    "mmmu": _mmmu,
    "option_first": _option_first,
    "mme_realworld": functools.partial(_option_regex, "mme_realworld"),
    "video_mme": functools.partial(_option_regex, "video_mme"),
    "longvideobench": functools.partial(_option_regex, "longvideobench"),
    "exact_match": lambda row, answer: _right(options.exact_match(answer, row.answer), answer),
    "mvbench": lambda row, answer: _right(options.mvbench(answer, row.answer), answer),
    "mantis": _mantis,
    "mirb": lambda row, answer: _right(options.mirb(row.values["task"], answer, row.answer)),
    "crpe": _crpe,
    "mlvu": _mlvu,
    "cgbench": _cgbench,
    "chartqa": _chartqa,
    "vqa_accuracy": lambda row, answer: Mark(short.vqa_accuracy(answer, row.answer), answer),
    "anls": lambda row, answer: Mark(short.anls(answer, row.answer), answer),
    "ocrbench": lambda row, answer: _right(
        short.ocrbench(row.values["category"], answer, row.answer), answer
    ),
    "mtvqa": lambda row, answer: Mark(short.mtvqa(answer, row.answer) / 100, answer),
    "vcr": _vcr,
    "hallusion": _hallusion,
    "mme": _mme,
    "pope": _pope,
    "refcoco": _refcoco,
    "screenspot": _screenspot,
    "text_or_box": lambda row, answer: _right(boxes.text_or_box(answer, row.answer), answer),
    "vsi": _vsi,
    "mathvista": _mathvista,
    "mathvision": _mathvision,
    "mathverse": _mathverse,
    "dynamath": _dynamath,
    "wemath": _wemath,
    "logicvista": _logicvista,
}
