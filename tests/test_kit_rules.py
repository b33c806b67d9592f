"""Rules of VLMEvalKit that need more than a text: the place of a judge or of a model of spaCy, an
image, a class's method. Compared with ours on fixed and random answers (`make test-kits`).
"""

import functools
import itertools
import queue
import random
import types

import numpy as np
import pytest
from PIL import Image

from internvl3_jax.evaluate.scorers import (
    boxes,
    judged,
    letters,
    mathematics,
    options,
    short,
    spatial,
)
from tests.support.kit_answers import (
    CHOICES,
    NoJudge,
    corpus,
    differences,
    frame,
    spatial_answers,
    split,
    use_newest_letters,
)

# VLMEvalKit leaves files open.
pytestmark = [pytest.mark.kits, pytest.mark.filterwarnings("ignore::ResourceWarning")]

POINTS = """
x=0.25, y=0.5|x=0.25,y=0.5|pyautogui.click(x=0.1, y=0.9)|x=120, y=44|x=1.0, y=1.0|x=1.2.3, y=0.5
[[100, 200, 300, 400]]|[[100,200,300,400]]|<box>[[0, 0, 999, 999]]</box>|[100, 200, 300, 400]|none
x=0.5, y=|click [[10, 20, 30, 40]] or [[500, 500, 600, 600]]|x=-0.2, y=0.3|x=0.300, y=.3|x=0, y=0
"""


def test_vcr_as_vlmevalkit(monkeypatch):
    """With the tokenizer alone in place of the model en_core_web_sm."""
    import spacy
    from vlmeval.dataset import vcr

    monkeypatch.setattr(vcr, "nlp", {"en": spacy.blank("en")}, raising=False)
    monkeypatch.setattr(
        vcr, "rouge", types.SimpleNamespace(compute=lambda **given: {"rouge1": 0.0}), raising=False
    )
    covered = ["two cats", "the covered text", "in 1990", "don't", "yes, no", "12.5%"]
    odd = [
        "Sorry",
        "I can't say",
        "Assistant: two cats",
        "无法 two cats",
        "two cats' car, in 1990.",
    ]

    def theirs(answer: str) -> list[tuple]:
        _, found = vcr.process_match_single_new("0", answer, list(covered), "en", queue.Queue())
        parts = [found["0"][str(number)] for number in range(len(covered))]
        return [(part["exact_match"], part["jaccard"], part["max_sim_string"]) for part in parts]

    tokenize = short.english_tokenizer()
    ours = lambda answer: [short.vcr(answer, text, tokenize) for text in covered]  # noqa: E731
    assert differences(ours, theirs, [*corpus(), *odd]) == []


def test_textvqa_as_vlmevalkit():
    """The card's number is of InternVL's own program, which is alike but for 's and a full stop
    after a digit.
    """
    from vlmeval.dataset.utils import vqa_eval

    references = ["two cats", "two cats", "Two cats.", "2 cats", "a dog", "dog", "12", "Red's"]
    references += ["red's", "red's"]

    def theirs(answer: str) -> float:
        line = {"answer": str(references), "prediction": answer}
        return float(np.mean(vqa_eval.process_line(line, method="vqa_score")["match"]))

    odd = ["Two cats.", "two, cats", "the red's", "1 2", "12,", "'s red", "A DOG?", "dog\n", "dont"]
    ours = lambda answer: float(short.vqa_accuracy(answer, references))  # noqa: E731
    assert differences(ours, theirs, [*corpus(), *odd]) == []
    known = [("12.",), pytest.approx(0.3), 0.0], [("red 's",), pytest.approx(0.9), 0.0]
    assert list(map(list, differences(ours, theirs, ["12.", "red 's"]))) == list(known)


def test_mlvu_as_vlmevalkit(monkeypatch):
    from vlmeval.dataset.utils import mlvu

    use_newest_letters(monkeypatch)

    def theirs(answer: str) -> bool:
        item = CHOICES | {"question": "?", "prediction": answer, "answer": "B"}
        return mlvu.check_ans_with_model(answer, "(B) a dog", None, item)

    odd = [")", "B)", "(b) a dog", "x) B", "B) or C)", "()"]
    ours = lambda answer: letters.mlvu(answer, CHOICES, "B")  # noqa: E731
    assert differences(ours, theirs, [*corpus(), *odd]) == []


def test_dynamath_as_vlmevalkit():
    from vlmeval.dataset.dynamath import DynaMath_auxeval

    number = '{"short answer": 3.14}'
    odd = [
        number,
        '{"solution": "x", "short answer": "B"}',
        '{"short answer": "3.1415"}',
        'so {"short answer": "12"} as \\boxed{B}',
        "\\boxed{12}",
        "2π",
        "1/2π",
        "π",
        "{}",
        "{B}",
        '{"answer": "B"}',
        "3.1 cm",
        "C or D",
        "the answer is not here",
        '{"short answer": null}',
        "[]",
        "[1]",
    ]
    for kind, reference in (
        ("float", "3.14"),
        ("float", "12"),
        ("multiple choice", "B"),
        ("text", "two cats and 12"),
    ):

        def theirs(answer, kind=kind, reference=reference):
            line = {"prediction": answer, "answer_type": kind, "answer": reference}
            found = DynaMath_auxeval(NoJudge(), line)
            return bool(found["correct"]), bool(found["parse"])

        # There a number in place of a text ends the program.
        texts = [text for text in odd if kind != "text" or text != number]
        ours = functools.partial(mathematics.dynamath_row, kind=kind, reference=reference)
        assert differences(ours, theirs, [*corpus(), *texts]) == []


def test_logicvista_as_vlmevalkit():
    """Letters as a judge returns them; what is not capital letters alone is asked again there."""
    from vlmeval.dataset.utils.logicvista import LogicVista_auxeval

    rng = random.Random(9)
    read = ["".join(rng.choices("ABCDE", k=rng.randint(1, 4))) for _ in range(200)]

    def theirs(found: str, reference: str) -> int:
        judge = types.SimpleNamespace(generate=lambda prompt, temperature: found)
        line = {"question": "?", "prediction": "x", "answer": reference}
        return LogicVista_auxeval(judge, line)["hit"]

    cases = list(itertools.product([*read, ""], ("A", "B, A", "C, B, D")))
    assert differences(options.logicvista, theirs, cases) == []


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value")  # the kit's
def test_points_as_vlmevalkit(tmp_path):
    from vlmeval.dataset.GUI.screenspot import ScreenSpot
    from vlmeval.vlm.internvl.utils import parse_bbox_internvl

    def stored(answer: str) -> str:
        """What the kit's class of InternVL writes into the table."""
        point = parse_bbox_internvl(answer)
        return f"x={point[0] / 1000}, y={point[1] / 1000}" if isinstance(point, list) else point

    rng = random.Random(11)
    texts = split(POINTS)
    for _ in range(100):
        x, y = rng.random(), rng.random()
        texts.append(rng.choice((f"x={x:.3f}, y={y:.2f}", f"x={300 * x:.0f}, y={200 * y:.0f}")))
        left, top = rng.randrange(900), rng.randrange(900)
        texts.append(f"[[{left}, {top}, {left + rng.randrange(99)}, {top + rng.randrange(99)}]]")
    assert differences(boxes.stored_point, stored, texts) == []
    size = (300, 200)
    Image.new("RGB", size).save(tmp_path / "x.png")
    dataset = ScreenSpot("ScreenSpot_Web", skeleton=True)
    dataset.img_root = str(tmp_path)

    def theirs(text: str, box: list[int]) -> float:
        table = frame(
            prediction=[text],
            bbox=[str(box)],
            image_path="x.png",
            data_type="text",
            question="?",
            data_source="x",
        )
        table.to_csv(tmp_path / "x.tsv", sep="\t")
        return float(dataset.evaluate_point(str(tmp_path / "x.tsv"))["Overall_Accuracy"])

    boxes_asked = ([30, 40, 120, 90], [-1, -1, 200, 150], [0, 0, 300, 200])
    cases = [(text, box) for text in map(boxes.stored_point, texts[::3]) for box in boxes_asked]
    ours = lambda text, box: boxes.screenspot(text, box, size)  # noqa: E731
    assert differences(ours, theirs, cases) == []


def test_vsibench_as_vlmevalkit():
    from vlmeval.dataset.utils.spatial_bench import cal_scores, matching_func

    texts = [*corpus(), *spatial_answers()]
    assert differences(spatial.read_number, matching_func.can_match_na, texts) == []
    theirs = lambda text: matching_func.can_match_option(text) or None  # noqa: E731
    assert differences(spatial.vsi_option, theirs, texts) == []
    for right in ("4", "0.5", "12"):
        scored = cal_scores.compute_na_score(frame(prediction=texts, answer=right))
        ours = [spatial.vsi_number(text, float(right)) for text in texts]
        assert ours == pytest.approx(list(scored["MRA:.5:.95:.05"]))


def test_verdicts_of_wildvision_as_vlmevalkit():
    from vlmeval.dataset.wildvision import get_score

    rng = random.Random(13)
    parts = [f"[[{verdict}]]" for verdict in judged.VERDICTS] + ["[[C]]", "[[]]", "A>B", "so", "\n"]
    texts = ["".join(rng.choices(parts, k=rng.randint(0, 4))) for _ in range(300)]
    assert differences(judged.wildvision_verdict, get_score, texts) == []
