"""The scoring rules against the functions of VLMEvalKit and lmms-eval as they are installed, on
fixed and random answers (`make test-kits`).

The vectors of test_evaluate_scorers.py are of the versions that made the card's numbers; this shows
what the newest versions say, and where they differ from those.
"""

import functools
import inspect
import itertools
import random
import re

import pytest

from internvl3_jax.evaluate.scorers import (
    boxes,
    letters,
    mathematics,
    mmmu,
    options,
    short,
    spatial,
    yes_no,
)
from tests.support.kit_answers import CHOICES, corpus, differences, pairs, use_newest_letters

# VLMEvalKit leaves files open.
pytestmark = [pytest.mark.kits, pytest.mark.filterwarnings("ignore::ResourceWarning")]

VARIABLE = re.compile(r"\b[ab]\b", re.I)  # names that VLMEvalKit's rule of MathVision uses

# --- VLMEvalKit -----------------------------------------------------------------------------------


def test_letters_as_vlmevalkit(monkeypatch):
    from vlmeval.dataset.utils import longvideobench, multiple_choice, videomme
    from vlmeval.utils import matching_util
    from vlmeval.utils.matching_util import can_infer

    if "answer is" not in inspect.getsource(matching_util):  # before the summer of 2026
        monkeypatch.setattr(letters, "_PHRASE", re.compile("(?!)"))

    ours = lambda text: letters.option_letter(text, CHOICES, newest=True)  # noqa: E731
    assert differences(ours, lambda text: can_infer(text, dict(CHOICES)) or None, corpus()) == []
    for kind, module in (
        ("mme_realworld", multiple_choice),
        ("video_mme", videomme),
        ("longvideobench", longvideobench),
    ):
        ours = lambda text, kind=kind: letters.option_regex(text, kind)  # noqa: E731
        assert differences(ours, module.extract_characters_regex, corpus()) == [], kind


def test_short_answers_as_vlmevalkit():
    from vlmeval.dataset.utils import vqa_eval

    def relaxed(answer, reference):
        return short.relaxed_accuracy(answer, reference, corrected=True)

    def anls(answer, reference):
        line = {"answer": str([reference]), "prediction": answer}
        result = [vqa_eval.process_line(line, method="anls")]
        return float(vqa_eval.hit_calculate(result, "DocVQA_VAL")[0])

    numbers = pairs("12", "0.125", "3000", "two cats", "5")
    theirs = lambda answer, reference: float(vqa_eval.relaxed_correctness(reference, answer))  # noqa: E731
    assert differences(relaxed, theirs, numbers) == []
    assert differences(lambda a, b: short.anls(a, [b]), anls, pairs("word 3", "two cats")) == []


def test_rules_of_single_sets_as_vlmevalkit():
    from vlmeval.dataset.utils import cgbench, crpe, mathv, mathverse, mvbench, yorn

    assert differences(yes_no.yes_no, yorn.YOrN_Extraction, corpus()) == []
    assert (
        differences(
            lambda text: options.cgbench(text, "B"),
            lambda text: cgbench.post_process(text, "B", "long_acc", 0),
            corpus(),
        )
        == []
    )
    assert (
        differences(
            lambda answer, reference: options.crpe_row(reference, answer),
            lambda answer, reference: bool(crpe.is_correct(reference, answer)),
            pairs("A. a red car", "B. a dog"),
        )
        == []
    )
    assert (
        differences(
            lambda answer, reference: options.mvbench(answer, reference, kit=True),
            mvbench.check_ans,
            pairs("(B) a dog", "(A) a red car"),
        )
        == []
    )
    assert (
        differences(
            mathematics.mathvision_equal,
            mathv.is_equal.__wrapped__,
            [
                (text, reference)
                for text, reference in pairs("12", "1/2", "\\frac{1}{2}")
                if not VARIABLE.search(text)
            ],
        )
        == []
    )
    assert (
        differences(
            mathematics.mathverse_prefetch,
            lambda text, answer: bool(
                mathverse.post_check_score({"answer": answer, "extract": text})
            ),
            pairs("B", "12"),
        )
        == []
    )


def test_mathvista_as_vlmevalkit(monkeypatch):
    """Choices by the newest rule of letters; the card's numbers were made with an earlier one."""
    from vlmeval.dataset.utils import mathvista

    use_newest_letters(monkeypatch)
    choices = {"question_type": "multi_choice", "choices": "['3', '8']", "answer_option": "B"}
    number = {"question_type": "free_form", "choices": "[]"}
    for row in (
        choices | {"answer": "8", "answer_type": "text"},
        number | {"answer": "12", "answer_type": "integer"},
        number | {"answer": "12.5", "answer_type": "float"},
    ):
        ours = functools.partial(lambda row, text: mathematics.mathvista_vlmevalkit(text, row), row)
        theirs = functools.partial(lambda row, text: mathvista.post_check(row | {"res": text}), row)
        assert differences(ours, theirs, corpus()) == []


def test_whole_tables_as_vlmevalkit(tmp_path):
    """OCRBench and MTVQA are scored inside of a method that reads a table."""
    import pandas
    from vlmeval.dataset.image_vqa import MTVQADataset, OCRBench

    texts, references = corpus(), ["12", "two cats", "a b c"]
    formula = "Handwritten Mathematical Expression Recognition"
    for category in ("Doc-oriented VQA", formula):
        path = tmp_path / "x_OCRBench.xlsx"
        table = {"prediction": texts, "answer": [str(references)] * len(texts)}
        pandas.DataFrame(table | {"category": category}).to_excel(path)
        found = OCRBench.evaluate(str(path))["Final Score"]
        # A formula that is read as a number is written as one: 12.0 is 12.
        given = [str(text) for text in pandas.read_excel(path)["prediction"]]
        assert found == sum(short.ocrbench(category, text, references) for text in given)
    path = tmp_path / "x_MTVQA_TEST.xlsx"
    for reference in ("word 3", "12"):
        table = {"prediction": texts, "answer": reference, "category": "x"}
        pandas.DataFrame(table).to_excel(path)
        given = [str(text) for text in pandas.read_excel(path)["prediction"]]
        expected = sum(short.mtvqa(text, reference) for text in given) / len(given)
        assert MTVQADataset.evaluate(str(path))["Average"] == pytest.approx(expected)


# --- lmms-eval ------------------------------------------------------------------------------------


def test_short_answers_as_lmms_eval():
    from lmms_eval.api.metrics import anls
    from lmms_eval.tasks.chartqa.utils import relaxed_correctness
    from lmms_eval.tasks.mtvqa.utils import mtvqa_process_results
    from lmms_eval.tasks.ocrbench.utils import ocrbench_process_results
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results

    relaxed = lambda a, b: short.relaxed_accuracy(a, b, corrected=True)  # noqa: E731
    theirs = lambda a, b: float(relaxed_correctness(a, b))  # noqa: E731
    assert differences(relaxed, theirs, pairs("12", "0.125", "3000", "two cats", "5")) == []
    theirs = lambda a, b: float(anls([b], [a])["anls"])  # noqa: E731
    assert differences(lambda a, b: short.anls(a, [b]), theirs, pairs("word 3", "two cats")) == []

    def mtvqa(answer, reference):
        found = mtvqa_process_results({"answer": reference, "category": "x"}, [answer])
        return 100 * found["mtvqa_score"]["score"]

    assert differences(short.mtvqa, mtvqa, pairs("Word 3", "12")) == []
    for category, name in (
        ("Doc-oriented VQA", "x"),
        ("Handwritten Mathematical Expression Recognition", "HME100k"),
    ):

        def ocrbench(answer, reference, name=name):
            document = {"answer": [reference], "dataset": name, "question_type": "x"}
            return ocrbench_process_results(document, [answer])["ocrbench_accuracy"]["score"]

        ours = lambda a, b, category=category: short.ocrbench(category, a, [b])  # noqa: E731
        assert differences(ours, ocrbench, pairs("12", "two cats", "a b c")) == []

    references = ["two cats", "two cats", "Two cats.", "2 cats", "a dog", "dog", *["red"] * 4]

    def textvqa(answer):
        document = {"answers": list(references), "question_id": 0}
        return float(textvqa_process_results(document, [answer])["exact_match"])

    assert (
        differences(lambda text: float(short.vqa_accuracy(text, references)), textvqa, corpus())
        == []
    )


def test_rules_of_single_sets_as_lmms_eval():
    from lmms_eval.tasks.mme.utils import parse_pred_ans
    from lmms_eval.tasks.mmmu.utils import eval_open, parse_open_response

    words = [text for text in corpus() if text not in ("Y", "n")]
    assert differences(yes_no.mme_answer, parse_pred_ans, words) == []
    theirs = lambda text, right: bool(eval_open(right, parse_open_response(text)))  # noqa: E731
    assert differences(mmmu.mmmu_open, theirs, pairs("12", "two cats", "0.5")) == []


def test_boxes_and_numbers_as_lmms_eval():
    from lmms_eval.tasks.refcoco_grounding import utils as refcoco
    from lmms_eval.tasks.vsibench.utils import mean_relative_accuracy

    rng = random.Random(7)
    for _ in range(200):
        size = rng.randint(50, 2000), rng.randint(50, 2000)
        given, right = ([*map(float, _box(rng, *size))] for _ in range(2))
        parts = [1000 * value / side for value, side in zip(given, (*size, *size), strict=True)]
        answer = "[[" + ", ".join(f"{part:.4f}" for part in parts) + "]]"
        iou, _ = boxes.refcoco(answer, *size, right)
        assert iou == pytest.approx(refcoco._compute_iou(given, right), abs=1e-4)
    for value, right in itertools.product((1.0, 2.5, 3.9, 4.0, 4.21, 6.0, 40.0), (1.5, 4.0)):
        theirs = mean_relative_accuracy(value, right, 0.5, 0.95, 0.05)
        assert spatial.vsi_number(str(value), right) == pytest.approx(float(theirs))


def _box(rng: random.Random, width: int, height: int) -> tuple[int, int, int, int]:
    x, y = sorted(rng.sample(range(width), 2)), sorted(rng.sample(range(height), 2))
    return x[0], y[0], x[1], y[1]


# --- where the newest versions differ -------------------------------------------------------------


def test_known_differences():
    from lmms_eval.tasks.mme.utils import parse_pred_ans
    from lmms_eval.tasks.pope.utils import pope_process_results
    from lmms_eval.tasks.vsibench.utils import extract_number
    from vlmeval.dataset.utils import mathv

    # VLMEvalKit's rule of MathVision evaluates an answer "A" as its own variable, the reference.
    assert mathv.is_equal.__wrapped__("A", "12") and not mathematics.mathvision_equal("A", "12")
    # lmms-eval's rule of MME takes one letter.
    assert (parse_pred_ans("Y"), yes_no.mme_answer("Y")) == ("yes", "other")
    # lmms-eval's rule of POPE takes an answer of one word only.
    found = pope_process_results({"answer": "yes", "question_id": 0}, ["Yes, it is"])
    assert found["pope_accuracy"]["score"] == 0.0 and yes_no.yes_no("Yes, it is") == "Yes"
    # ... its rule of VSI-Bench reads the first number of an answer, the card's the last.
    assert extract_number("3 of 4") == 3.0 and spatial.read_number("3 of 4") == 4.0
