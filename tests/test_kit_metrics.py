"""Ways of averaging that VLMEvalKit has inside of programs for whole tables, against what these
programs say of fixed and random answers (`make test-kits`).
"""

import itertools
import random
import types

import numpy as np
import pytest

from internvl3_jax.evaluate import marks, metrics
from internvl3_jax.evaluate.scorers import letters, options, yes_no
from internvl3_jax.evaluate.task import Row
from internvl3_jax.evaluate.task_table import TASKS
from tests.support.kit_answers import (
    CHOICES,
    NoJudge,
    corpus,
    frame,
    spatial_answers,
    use_newest_letters,
)

# VLMEvalKit leaves files open.
pytestmark = [pytest.mark.kits, pytest.mark.filterwarnings("ignore::ResourceWarning")]


def test_circular_mmbench_as_vlmevalkit(tmp_path, monkeypatch):
    """Each question in all rotations of its options, with right, wrong and unreadable answers."""
    from vlmeval.dataset.utils import multiple_choice

    use_newest_letters(monkeypatch)
    monkeypatch.setenv("PRED_FORMAT", "tsv")
    monkeypatch.setattr(multiple_choice, "timestr", lambda: f"..{tmp_path}/x")  # below /tmp
    rng, rows = random.Random(2), []
    texts = list(CHOICES.values())
    for question, count in itertools.product(range(60), (4,)):
        share = rng.choice((0.0, 0.9, 1.0))
        for turn in range(count):
            turned = dict(zip("ABCD", texts[turn:] + texts[:turn], strict=True))
            right = "ABCD"[rng.randrange(4)]
            given = rng.choice((right, f"({right})", turned[right]))
            answer = given if rng.random() < share else rng.choice(corpus())
            row = {"index": question + turn * 1_000_000, "answer": right, "prediction": answer}
            rows.append(row | turned | {"question": "?", "split": "dev"})
    table = frame(**{name: [row[name] for row in rows] for name in rows[0]})
    found = multiple_choice.mcq_circular_eval(
        None, table, table, 1, str(tmp_path / "x.pkl"), "MMBench_DEV_EN"
    )
    given = []
    for row in rows:
        named = {letter: row[letter] for letter in "ABCD"}
        read = letters.option_letter(row["prediction"], named)
        given.append((str(row["index"]), float(read == row["answer"])))
    assert metrics.circular_mean(given) == pytest.approx(float(found["hit"].mean()))
    assert 0.2 < metrics.circular_mean(given) < 0.8


def test_open_questions_of_mmmu_as_vlmevalkit(tmp_path, monkeypatch):
    from vlmeval.dataset.utils.multiple_choice import mcq_vanilla_eval

    use_newest_letters(monkeypatch)
    texts, none = corpus(), float("nan")
    for reference in ("12", "two cats"):
        table = frame(
            index=range(len(texts)),
            prediction=texts,
            answer=reference,
            question="?",
            A=none,
            B=none,
        )
        path = str(tmp_path / f"{reference}.pkl")
        found = mcq_vanilla_eval(None, table, table, 1, path, "MMMU_DEV_VAL")
        ours = [letters.mmmu_open_vlmevalkit(text, reference) for text in texts]
        assert ours == [bool(hit) for hit in found["hit"]]


def test_halves_of_mme_realworld_as_vlmevalkit(tmp_path):
    from vlmeval.dataset.utils.multiple_choice import get_dimension_rating

    rng = random.Random(4)
    names = ["Perception/Monitoring", "Perception/Remote Sensing", "Reasoning/Monitoring"]
    rows = [(rng.choice(names), rng.randrange(2)) for _ in range(200)]
    table = frame(
        category=[name for name, _ in rows],
        score=[value for _, value in rows],
        **{"l2-category": "x"},
    )
    table.to_excel(tmp_path / "x.xlsx")
    found = get_dimension_rating(str(tmp_path / "x.xlsx"))
    halves = {half: found[half]["Avg"] for half in ("Perception", "Reasoning")}
    assert metrics.mme_realworld(rows) == pytest.approx({"Overall": found["Overall"]} | halves)


def test_hallusionbench_as_vlmevalkit(tmp_path):
    from vlmeval.dataset.utils.yorn import Hallusion_rating

    rng, rows = random.Random(3), []
    for kind, group, figure, question in itertools.product("xyz", range(4), range(3), range(3)):
        index = f"VD_{kind}_{rng.randrange(9)}_{group}_{figure}_{question}"
        rows.append((index, kind, rng.random() < 0.8))
    table = frame(
        index=[row[0] for row in rows],
        score=[row[2] for row in rows],
        **{"l2-category": [r[1] for r in rows]},
    )
    table.to_csv(tmp_path / "x.tsv", sep="\t")
    found = Hallusion_rating(str(tmp_path / "x.tsv")).iloc[0]
    assert yes_no.hallusion(rows) == pytest.approx(
        [found[name] for name in ("aAcc", "fAcc", "qAcc")]
    )
    assert found["qAcc"] < found["aAcc"]


def test_groups_of_crpe_as_vlmevalkit(tmp_path):
    from vlmeval.dataset.image_vqa import CRPE

    rng, rows = random.Random(14), []
    for _ in range(50):
        kind = rng.choice(("subject", "predicate", "object"))
        for _ in range(4):
            answer = "A" if rng.random() < 0.9 else rng.choice([text for text in corpus() if text])
            rows.append(("A. a red car", answer, kind))
    references, given, kinds = map(list, zip(*rows, strict=True))
    table = frame(index=range(200), answer=references, prediction=given, category=kinds)
    table.to_csv(tmp_path / "x_CRPE_RELATION.tsv", sep="\t")
    found = CRPE.evaluate(str(tmp_path / "x_CRPE_RELATION.tsv"))
    ours = metrics.crpe_group(rows)
    assert {name: found[name] for name in ours} == pytest.approx(ours) and 0 < ours["total"] < 1


def test_worst_case_of_dynamath_as_vlmevalkit(tmp_path, monkeypatch):
    from vlmeval.dataset import dynamath

    monkeypatch.setenv("PRED_FORMAT", "tsv")
    monkeypatch.setattr(dynamath, "build_judge", lambda **options: NoJudge())
    rng, rows = random.Random(6), []
    for question, variant in itertools.product(range(40), range(1, 11)):
        answer = "B" if rng.random() < (0.5 if question % 3 else 1.0) else "C"
        rows.append((question, variant, answer))
    # A question has the index of its first variant.
    table = frame(
        index=[question + 40 * (variant - 1) for question, variant, _ in rows],
        qid=[row[0] for row in rows],
        varid=[row[1] for row in rows],
        prediction=[row[2] for row in rows],
        answer="B",
        answer_type="multiple choice",
        subject="x",
        knowledge_level="y",
    )
    path = tmp_path / "x.tsv"
    table.to_csv(path, sep="\t")
    found = dynamath.Dynamath.evaluate(None, str(path), model="none", nproc=1)
    theirs = dict(zip(found["Setting"], map(float, found["Overall"]), strict=True))
    ours = metrics.dynamath_worst([(str(q), float(answer == "B")) for q, _, answer in rows])
    assert ours == pytest.approx(theirs) and 0.2 < ours["Worst Case"] < ours["Average"] < 1


def test_letters_of_wemath_as_vlmevalkit(tmp_path):
    from vlmeval.dataset.utils import wemath

    odd = [
        "<Answer>: <<B>>",
        "<Thought process>: A <Answer>: <<C. 3>>",
        "Answer",
        "Answer: \\boxed{B}",
    ]
    texts = [*corpus(), *odd, "Answer: I", "answer: B", "Answers: H"]
    frame(prediction=texts, answer="B").to_csv(tmp_path / "x.tsv", sep="\t")
    found = wemath.load_and_process_data(str(tmp_path / "x.tsv"))
    given = [text if isinstance(text, str) else "" for text in found["prediction"]]
    theirs = [letter if isinstance(letter, str) else None for letter in found["processed_answer"]]
    assert [options.wemath_letter(text) for text in given] == theirs
    assert len(given) == len(texts) and {"B", "C", None} <= set(theirs)


def test_score_of_wemath_as_vlmevalkit():
    from vlmeval.dataset.utils import wemath

    rng, rows, problems = random.Random(8), [], []
    for number in range(120):
        steps = 2 + number % 2
        keys = [*map(str, range(1, steps + 1)), "multi"]
        right = [rng.random() < 0.6 for _ in keys]
        problems.append([float(value) for value in right])
        rows += [(number, f"{steps}steps_{key}", hit) for key, hit in zip(keys, right, strict=True)]
    columns = zip(("ID", "key", "joker"), zip(*rows, strict=True), strict=True)
    data = frame(**{name: list(values) for name, values in columns})
    merged = [
        wemath.evaluate_process_steps_data(data[data["key"].str.contains(f"{steps}steps")], steps)
        for steps in (2, 3)
    ]
    counts, rates = wemath.evaluate_compute_final_scores(
        wemath.evaluate_calculate_metrics(*merged), metrics.WEMATH_PROBLEMS
    )
    # It adds the row of results with a method that pandas 3 has no longer.
    table = types.SimpleNamespace(_append=lambda row, ignore_index: row)
    found = wemath.evaluate_update_main_results_df(table, counts, rates)
    strict, loose = metrics.wemath_scores(problems)
    assert (found["Score (Strict)"], found["Score (Loose)"]) == (f"{strict:.2%}", f"{loose:.2%}")
    assert strict < loose


def test_columns_of_vsibench_as_vlmevalkit():
    from vlmeval.dataset.utils.spatial_bench import cal_scores
    from vlmeval.dataset.vsibench import VsiBench

    texts = [*corpus(), *spatial_answers()]
    rng, rows, found = random.Random(12), [], []
    kinds = [kind for group in metrics._VSI_COLUMNS.values() for kind in group]
    for kind, text in itertools.product(kinds, rng.sample(texts, 60)):
        answer = "4" if kind in marks.VSI_NUMBERS else "B"
        row = Row(id="", where="", question="?", answer=answer, values={"question_type": kind})
        rows.append(row)
        found.append((row, text))
    tables = {}
    for name, numbers, score in (
        ("mcq", False, cal_scores.compute_mcq_score),
        ("na", True, cal_scores.compute_na_score),
    ):
        part = [
            (row, text)
            for row, text in found
            if (row.values["question_type"] in marks.VSI_NUMBERS) == numbers
        ]
        tables[name] = score(
            frame(
                prediction=[text for _, text in part],
                answer=[row.answer for row, _ in part],
                question_type=[row.values["question_type"] for row, _ in part],
            )
        )
    theirs = VsiBench._aggregate(None, tables["mcq"], tables["na"])
    given = [marks.mark("vsi", row, text) for row, text in found]
    ours = metrics.vsi(TASKS["vsibench"], rows, [text for _, text in found], given)
    printed = [value for name, value in theirs.items() if name.startswith(("obj", "room", "route"))]
    assert list(ours.values()) == pytest.approx(printed)
    assert np.mean(list(ours.values())) == pytest.approx(theirs["overall"])
