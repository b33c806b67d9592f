"""The scoring rules of the model card, on results of the reference's own functions
(tests/data/evaluate/vectors.txt).
"""

import ast
import functools
import json
import pathlib
import re
import sys

import pytest

from internvl3_jax.evaluate import frames, metrics
from internvl3_jax.evaluate.scorers import (
    boxes,
    judged,
    letters,
    mathematics,
    mmmu,
    options,
    short,
    spatial,
    yes_no,
)

pytestmark = pytest.mark.smoke

VECTORS = pathlib.Path(__file__).parent / "data" / "evaluate" / "vectors.txt"
LINE = re.compile(r"(\w+)\((.*)\) -> (.*?)(?:   # (.*))?$")
OPTIONS = {"A": "a red car", "B": "a dog", "C": "two cats", "D": "none of these"}
YES_NO = {"A": "Yes", "B": "No"}
WXYZ = dict(zip("ABCD", "wxyz", strict=True))
COLORS = dict(zip("ABCD", ("red", "blue", "green", "black"), strict=True))
SETS = {
    "MME-RealWorld": "mme_realworld",
    "Video-MME": "video_mme",
    "LongVideoBench": "longvideobench",
}
# Tokens of spaCy's tokenizer of English, of the texts of the vectors.
TOKENS = {
    'The covered text is: "since its creation in 1990".': 'The|covered|text|is|:|"|since|its|'
    'creation|in|1990|"|.',
    "since its creation in 1990": "since|its|creation|in|1990",
    "since its creation in 1991": "since|its|creation|in|1991",
    "creation in 1990": "creation|in|1990",
    "the band's first album": "the|band|'s|first|album",
}


def tokenize(text: str) -> list[str]:
    return TOKENS[text].split("|")


def circular(questions) -> float:
    rows = [
        (str(number * 1 + rotation * 10**6), float(letters.option_letter(answer, WXYZ) == right))
        for number, question in enumerate(questions)
        for rotation, (answer, right) in enumerate(question)
    ]
    return metrics.circular_mean(rows)


def dynamath_worst(rows) -> dict:
    def right(row) -> bool:
        if isinstance(row[2], bool):
            return row[2]
        return mathematics.dynamath_row(row[2], "multiple choice", row[3])[0]

    return metrics.dynamath_worst([(row[0], float(right(row))) for row in rows])


def wemath(*problems) -> list[str]:
    scores = metrics.wemath_scores([problem for kind in problems for problem in kind])
    return [f"{score:.2%}" for score in scores]


def mathvista_normalize(text, choices, question, kind, precision, reference) -> list:
    read = mathematics.mathvista_normalize(text, choices, question, kind, precision)
    return [read, read == reference]


def box_centre(text: str):
    found = boxes.box_centre(text)
    return text if found is None else list(found)


def hallusion(rows) -> list[float]:
    """In the vectors the second part of the index is the category."""
    return yes_no.hallusion([(index, index.split("_")[1], right) for index, right in rows])


def refcoco(*arguments) -> list:
    return list(boxes.refcoco(*arguments))


# Name in the file -> function of the vector's arguments.
FUNCTIONS = {
    "vqa_accuracy": short.vqa_accuracy,
    "anls": short.anls,
    "relaxed_accuracy": short.relaxed_accuracy,
    "exact_match": options.exact_match,
    "option_letter": lambda text: letters.option_letter(text, OPTIONS) or False,
    "option_letter_yesno": lambda text: letters.option_letter(text, YES_NO) or False,
    "mmmu_open_vlmevalkit": letters.mmmu_open_vlmevalkit,
    "circular": circular,
    "option_first": lambda text: options.option_first(text, OPTIONS),
    "mme_realworld": metrics.mme_realworld,
    "mvbench": options.mvbench,
    "mantis": lambda kind, text, right: options.mantis(kind, text, right, ["(A) x", "(B) y"]),
    "mirb": options.mirb,
    "crpe_row": options.crpe_row,
    "mlvu": lambda text: letters.mlvu(text, COLORS, "B"),
    "cgbench": lambda text: options.cgbench(text, "B"),
    "wemath_letter": options.wemath_letter,
    "ocrbench": short.ocrbench,
    "mtvqa": short.mtvqa,
    "vcr": lambda text, covered: list(short.vcr(text, covered, tokenize)[:2]),
    "mmmu_open": mmmu.mmmu_open,
    "mme_answer": yes_no.mme_answer,
    "mme_score": yes_no.mme_score,
    "pope_f1": yes_no.pope_f1,
    "yes_no": yes_no.yes_no,
    "hallusion": hallusion,
    "mathvista_vlmevalkit": mathematics.mathvista_vlmevalkit,
    "mathvista_normalize": mathvista_normalize,
    "final_answer": mathematics.final_answer,
    "mathvision_equal": mathematics.mathvision_equal,
    "mathverse_prefetch": mathematics.mathverse_prefetch,
    "dynamath_row": lambda *arguments: mathematics.dynamath_row(*arguments)[0],
    "dynamath_worst": dynamath_worst,
    "wemath": wemath,
    "logicvista": options.logicvista,
    "refcoco": refcoco,
    "box_centre": box_centre,
    "screenspot": boxes.screenspot,
    "vsi_number": spatial.vsi_number,
    "vsi_option": lambda text: spatial.vsi_option(text) or False,
    "mvbench_frames": frames.mvbench_frames,
    "videomme_frames": frames.videomme_frames,
    "vsi_frames": frames.vsi_frames,
    "wildvision_verdict": lambda text: list(judged.wildvision_verdict(text)),
    "mmhal_reply": judged.mmhal_reply,
}
# What a vector's second half is -> (pattern, function).
REMARKS = {
    "relaxed_accuracy": (
        r"right way round: (.*)",
        functools.partial(short.relaxed_accuracy, corrected=True),
    ),
    "option_letter": (
        r"2026: (.*)",
        lambda text: letters.option_letter(text, OPTIONS, newest=True) or False,
    ),
    "option_letter_yesno": (
        r"2026: (.*)",
        lambda text: letters.option_letter(text, YES_NO, newest=True) or False,
    ),
    "mvbench": (r"kit: (.*)", functools.partial(options.mvbench, kit=True)),
    "refcoco": (r"box (\[.*?\])", lambda *a: boxes.read_box(*a[:3]).tolist()),
    "hallusion": (r"mean (.*)", lambda rows: sum(hallusion(rows)) / 3),
    "vcr": (r"best run: (.*)", lambda text, covered: short.vcr(text, covered, tokenize)[2]),
}


def vectors() -> list[tuple[str, str, str, str]]:
    lines = VECTORS.read_text(encoding="utf-8").splitlines()
    found = [LINE.match(line) for line in lines if line and not line.startswith("#")]
    return [match.groups() for match in found if match]


def arguments_of(text: str) -> list:
    return eval(f"[{text}]", {"__builtins__": {}})


def test_all_rules_have_vectors():
    """Two rules whose vectors are written differently have tests of their own below."""
    names = {name for name, *_ in vectors()}
    assert names == {*FUNCTIONS, "option_regex"} - {"dynamath_worst"}
    # 236 in all, ten of them in the other form
    assert len(vectors()) + 10 == 236


@pytest.mark.parametrize(("name", "arguments", "result", "remark"), vectors())
def test_results_are_the_references(name, arguments, result, remark):
    given = arguments_of(arguments)
    if name == "option_regex":
        for label, letter in re.findall(r'([\w-]+) "(.?)"', result):
            assert letters.option_regex(given[0], SETS[label]) == letter
        return
    if result.startswith("raises "):
        with pytest.raises((IndexError, ValueError, ZeroDivisionError)):
            FUNCTIONS[name](*given)
        return
    expected = ast.literal_eval(result)
    assert close(FUNCTIONS[name](*given), expected)
    pattern, function = REMARKS.get(name, ("$", None))
    if remark and function and (found := re.match(pattern, remark)):
        assert close(function(*given), ast.literal_eval(found[1]))


def close(given, expected) -> bool:
    if isinstance(expected, dict):
        return given == {name: pytest.approx(value, abs=5e-5) for name, value in expected.items()}
    numbers = expected if isinstance(expected, list) else [expected]
    if any(isinstance(number, float) for number in numbers):
        return given == pytest.approx(expected, abs=5e-5)
    return given == expected


def grouped(name: str) -> list[tuple[list, str]]:
    """Vectors of the form "name: remark; rows ROWS -> RESULT"."""
    text = VECTORS.read_text(encoding="utf-8")
    found = re.findall(rf"^{name}: .*?; rows (\[.*\]) -> (.*)$", text, re.M)
    return [
        (json.loads(rows.replace("True", "true").replace("False", "false")), result)
        for rows, result in found
    ]


def test_worst_case_of_dynamath():
    cases = grouped("dynamath_worst")
    assert len(cases) == 5
    for rows, result in cases:
        assert close(dynamath_worst(rows), ast.literal_eval(result))


def test_groups_of_crpe():
    right, wrong = ("A. x", "A", "subject"), ("A. x", "B", "subject")
    assert metrics.crpe_group([right] * 4)["total"] == 1.0
    assert metrics.crpe_group([right] * 3 + [wrong])["total"] == 0.0
    assert metrics.crpe_group([right] * 4 + [wrong] * 4)["total"] == 0.5
    (rows, result), (five, _) = grouped("crpe_group")
    assert metrics.crpe_group(rows)["total"] == pytest.approx(float(result.split()[1]))
    with pytest.raises(ValueError, match="5 rows; every question of CRPE has 4"):
        metrics.crpe_group(five)


def test_a_missing_tokenizer_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ValueError, match="pip install spacy"):
        short.english_tokenizer()
