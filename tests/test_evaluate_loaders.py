"""Files of the benchmarks: every task reads its files, right answers are right, and a wrong or
partial file is named with its row and column.
"""

import dataclasses
import io
import re
import sys

import numpy as np
import pytest
from PIL import Image

from internvl3_jax.evaluate import asking, marks, metrics
from internvl3_jax.evaluate.command import load
from internvl3_jax.evaluate.loaders import mantis, places, table, videos
from internvl3_jax.evaluate.scorers import short
from internvl3_jax.evaluate.stored import as_jpeg, as_stored
from internvl3_jax.evaluate.task import Row
from internvl3_jax.evaluate.task_table import TASKS
from internvl3_jax.evaluate.variant import Variant
from internvl3_jax.io.safe_files import FileError
from tests.support import evaluate_world as world

HIGHEST = {"mme": 2800.0, "ocrbench": 6.0}  # of the made-up rows; others 100


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    """For libraries that the tests' environment lacks: pyarrow and spaCy."""
    monkeypatch.setattr(mantis, "read_parquet", lambda path: world.MANTIS)
    monkeypatch.setattr(short, "english_tokenizer", lambda: str.split)
    marks._tokenizer.cache_clear()
    yield
    marks._tokenizer.cache_clear()


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_right_answers_get_the_highest_score_and_others_less(task, tmp_path):
    rows = load(task, world.build(tmp_path, [task])).rows
    frames = 4 if task.frames else None
    for row in rows[:2]:
        question = asking.make_question(Variant(task, frames=frames), row)
        places = len(question.images) if task.prompt != "given" else 0  # `Chat` adds them there
        assert question.images and question.text.count("<image>") == places
    if task.scorer == "none":
        return
    answers = [world.right_answer(task, row) for row in rows]
    assert task.columns[0] in scores_of(task, rows, answers) or task.metric == "by_task"
    for name, value in scores_of(task, rows, answers).items():
        if task.name not in ("mme", "wemath"):
            assert value == pytest.approx(HIGHEST.get(task.name, 100.0)), name
    if task.name not in ("mme", "pope"):  # undefined without a yes
        text = "H" if task.scorer == "cgbench" else "none of it at all"  # it ignores unread ones
        wrong = scores_of(task, rows, [text] * len(rows))
        assert max(wrong.values()) <= 50 or task.name == "wemath"


def scores_of(task, rows, answers) -> dict:
    found = [marks.mark(task.scorer, row, text) for row, text in zip(rows, answers, strict=True)]
    return metrics.METRICS[task.metric](task, rows, answers, found)


@pytest.mark.parametrize(
    ("scorer", "answer", "values", "text", "value", "readable"),
    [
        ("mathvista", "14", {"answer_type": "integer"}, "So.\nAnswer: \\boxed{14.0}", 1, True),
        ("mathvista", "14", {"answer_type": "integer"}, "It is 14.5", 0, True),
        ("mathvista", "1.2", {"answer_type": "float"}, "1.2 m", 1, True),
        ("mathvista", "1000", {"answer_type": "integer"}, "\\boxed{1,000}", 1, True),
        ("mathvista", "14", {"answer_type": "integer"}, "2 or 3", 0, False),
        ("mathvista", "[1, 2]", {"answer_type": "list"}, "[1, 2]", 0, True),
        ("mathvision", "1/2", {"choices": []}, "so \\boxed{\\frac{1}{2}}.", 1, True),
        ("mathvision", "B", {"choices": ["3", "8"]}, "Answer: \\boxed{B}", 1, True),
        ("mathvision", "3", {"choices": []}, "I think\nthat it is hard.", 0, False),
        ("mathverse", "2\\sqrt{3}", {}, "\\boxed{2\\sqrt{3}}", 1, True),
        ("dynamath", "3.142", {"answer_type": "float"}, "Long.\n\\boxed{3.1416}", 1, True),
        ("dynamath", "B", {"answer_type": "multiple choice"}, "...\nAnswer: \\boxed{B}", 1, True),
        ("wemath", "C", {}, "Long.\nAnswer: \\boxed{C}", 1, True),
        ("wemath", "C", {}, "Nothing\nis said.", 0, False),
        ("logicvista", "A, C", {}, "Long.\nAnswer: \\boxed{C, A}", 1, True),
    ],
)
def test_final_answers_after_reasoning(scorer, answer, values, text, value, readable):
    values = {"question_type": "free_form"} | values
    found = marks.mark(scorer, Row("1", "x", "?", answer=answer, values=values), text)
    assert (found.value, found.readable) == (value, readable)


def test_a_library_that_a_rule_needs_is_missed_before_the_model_is_asked(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ValueError, match="pip install spacy"):
        marks.check("vcr")
    marks.check("vqa_accuracy")


def test_mme_and_wemath_count_as_they_do(tmp_path):
    for name, highest in (("mme", 2800.0), ("wemath", 100.0)):
        task = TASKS[name]
        rows = load(task, world.build(tmp_path / name, [task])).rows
        answers = [world.right_answer(task, row) for row in rows]
        assert scores_of(task, rows, answers)[task.columns[0]] == pytest.approx(highest)


# --- tables ---------------------------------------------------------------------------------------


def mmstar(folder, change=None):
    """Rows of MMStar after a change of the file's text."""
    world.build(folder, [TASKS["mmstar"]])
    path = folder / "MMStar.tsv"
    if change:
        path.write_text(change(path.read_text()))
    return load(TASKS["mmstar"], folder).rows


def test_images_lists_and_references(tmp_path):
    task = TASKS["blink"]
    rows = load(task, world.build(tmp_path, [task])).rows
    assert [len(row.load_images()) for row in rows] == [1, 1, 2, 1, 1, 1]
    assert rows[1].load_images() == rows[0].load_images() == [as_jpeg(world.picture(0), "")]
    assert rows[2].load_images() == [world.picture(0), world.picture(1)]
    assert rows[4].load_images() == [as_jpeg(world.picture(4), "")]


def test_images_are_stored_as_in_the_kit():
    """As image.save("x.jpg") does: Pillow's quality 75; gray stays gray; names give the format."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    for mode in ("RGB", "L", "RGBA", "P"):
        image, png, jpeg = Image.fromarray(pixels).convert(mode), io.BytesIO(), io.BytesIO()
        image.save(png, "PNG")
        (image.convert("RGB") if mode in ("RGBA", "P") else image).save(jpeg, "JPEG")
        stored = as_jpeg(png.getvalue(), "x")
        assert stored == jpeg.getvalue()
        assert as_stored([png.getvalue()], [], "x") == [stored]
        two = [png.getvalue()] * 2
        assert as_stored(two, ["a.png", "b.jpg"], "x") == [png.getvalue(), stored]
        assert as_stored(two, [], "x") == two
    assert as_stored(["a.png"], ["a.png"], "x") == ["a.png"]


def test_fields_with_line_breaks_quotes_and_missing_options(tmp_path):
    rows = [
        {
            "index": 1,
            "image": world.in_base64(1),
            "question": 'A "b"\tc\nd?',
            "A": "x",
            "B": "None",
        },
        {"index": 2, "image": 1, "question": "e", "A": "n/a", "B": "y"},
    ]
    rows = [row | {"answer": letter} for row, letter in zip(rows, "AB", strict=True)]
    world.write_table(tmp_path / "MMStar.tsv", rows)
    first, second = load(TASKS["mmstar"], tmp_path).rows
    assert first.question == 'A "b"\tc\nd?' and first.options == {"A": "x"}
    assert second.options == {"B": "y"} and second.load_images() == [as_jpeg(world.picture(1), "")]


def test_images_as_paths(tmp_path):
    world.build(tmp_path, [TASKS["mmstar"]])
    lines = (tmp_path / "MMStar.tsv").read_text().replace("\timage\t", "\timage_path\t").split("\n")
    fields = [line.split("\t") for line in lines if line]
    for number, line in enumerate(fields[1:]):
        line[1] = f"{number}.png"
        world.save(tmp_path / "images" / "MMStar" / f"{number}.png", world.picture(number))
    (tmp_path / "MMStar.tsv").write_text("\n".join("\t".join(line) for line in fields) + "\n")
    rows = load(TASKS["mmstar"], tmp_path).rows
    assert rows[3].load_images() == [str(tmp_path / "images" / "MMStar" / "3.png")]
    # The kit's own name for such a table, and a table in a folder of its own.
    (tmp_path / "MMStar.tsv").rename(tmp_path / "MMStar_local.tsv")
    rows = load(TASKS["mmstar"], tmp_path).rows
    assert rows[3].load_images() == [str(tmp_path / "images" / "MMStar" / "3.png")]
    world.build(tmp_path / "MMStar", [TASKS["mmstar"]])
    assert load(TASKS["mmstar"], tmp_path).files == (str(tmp_path / "MMStar" / "MMStar.tsv"),)
    (tmp_path / "MMStar" / "MMStar.tsv").unlink()
    (tmp_path / "images" / "MMStar" / "3.png").unlink()
    with pytest.raises(FileError, match=r"row 4 \(index 3\): column image_path: there is no 3.png"):
        load(TASKS["mmstar"], tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-40], r"MMStar.tsv line 7: \d fields, the header has 9; was the file"),
        (lambda text: text.replace("\tanswer", "\tlabel"), "has no column answer; it has index, "),
        (lambda text: text.split("\n")[0] + "\n", "MMStar.tsv: has no rows; was it downloaded"),
        (lambda text: "", "MMStar.tsv: has no rows; was it"),
        (
            lambda text: text.replace("\n4\t", "\n3\t"),
            r"row 5 \(index 3\): column index is that of",
        ),
        (
            lambda text: text.replace("\n1\t0\t", "\n1\t9\t"),
            "row 2 .*column image is '9'; expected",
        ),
        (
            lambda text: text.replace("\tB\n", "\tQ\n"),
            r"row 2 .*column answer is 'Q'; expected one",
        ),
        (
            lambda text: text.replace("Question 3?", ""),
            r"row 4 \(index 3\): column question is emp",
        ),
        (
            lambda text: text.replace("Question 3?", '"Question 3?'),
            r"line \d: unexpected end of data",
        ),
    ],
)
def test_wrong_tables_are_named(tmp_path, change, message):
    with pytest.raises(FileError, match=message):
        mmstar(tmp_path, change)


def test_damaged_images_are_named(tmp_path):
    rows = mmstar(tmp_path, lambda text: text.replace("\n3\tiVBOR", "\n3\t*VBOR"))
    with pytest.raises(FileError, match=r"row 4 \(index 3\): column image is '\*VBOR.* not base64"):
        rows[3].load_images()


def test_rows_without_an_image_are_left_out_and_counted(tmp_path):
    world.build(tmp_path, [TASKS["mmstar"]])
    path = tmp_path / "MMStar.tsv"
    path.write_text(path.read_text().replace("\n1\t0\t", "\n1\t\t"))
    loaded = load(TASKS["mmstar"], tmp_path)
    assert [row.id for row in loaded.rows] == list("02345") and loaded.imageless == 1


def test_a_table_that_is_no_text(tmp_path):
    (tmp_path / "MMStar.tsv").write_bytes(b"index\timage\n1\t\xff\xfe\n")
    with pytest.raises(FileError, match="MMStar.tsv line 2: is not UTF-8"):
        table.Table(tmp_path / "MMStar.tsv")


# --- other files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "message"),
    [
        ("chartqa", "chartqa/test_human.jsonl", '"question": ', '"query": ', r"line 1: question"),
        ("chartqa", "chartqa/test_human.jsonl", '"answer": "A"', '"answer": null', "answer is m"),
        ("chartqa", "chartqa/test_human.jsonl", "/5.png", "/9.png", r"line 6: image: there is no"),
        ("textvqa", "textvqa/textvqa_val_annotations.json", '"question_id": 5', '"question_id": 7',
         r"line 6: question_id 5 has no annotation"),
        ("pope", "pope/coco/coco_pope_random.json", '{"label": "no"}\n', "", "more questions than"),
        ("pope", "pope/coco/coco_pope_random.json", '"no"', '"maybe"', "line 2: label is 'maybe'"),
        ("mme", "mme/Your_Results/color.txt", "\tNo", "", "color.txt line 2: is .*expected image"),
        ("mmiu", "mmiu/mmiu.jsonl", '"context"', '"contex"', r"line 1: input: context"),
        ("mirb", "MIRB/count.json", '"images"', '"image"', r"count.json entry 1: images"),
        ("refcoco_val", "refcoco/refcoco_val.jsonl", "[4, 8, 16, 24]", "[4, 8]", "line 1: bbox"),
        ("mmvet2", "mm-vet-v2/mm-vet-v2.json", "<IMG>", "", "v2_0: question has no <IMG>"),
        ("mvbench", "MVBench/json/action_antonym.json", '"answer": "two cats"', '"answer": "x"',
         "action_antonym.json entry 1: answer is none of the candidates"),
        ("mvbench", "MVBench/json/action_sequence.json", '"start"', '"begin"', "entry 1: start"),
        ("mlvu", "MLVU_MCQ.tsv", "\tclip.mp4", "\tclop.mp4", r"row 1 .*there is no .*clop.mp4"),
        ("longvideobench", "LongVideoBench.tsv", "\t3\n", "\t7\n", "correct_choice is '7'; expect"),
        ("vsibench", "VSI-Bench.tsv", "\t4\n", "\tfour\n", "answer is 'four'; expected a nu"),
        ("hallusionbench", "HallusionBench.tsv", "\tYes\n", "\tyes\n", "answer is 'yes'; expected"),
        ("screenspot", "ScreenSpot_Web.tsv", "12, 10]", "12]", r"column bbox is .*expected \[left"),
        ("ocrbench", "OCRBench.tsv", "['word1', 'x']", "word1", "answer is 'word1'; expected a"),
    ],
)  # fmt: skip
def test_wrong_files_are_named(tmp_path, name, file, old, new, message):
    world.build(tmp_path, [TASKS[name]])
    text = (tmp_path / file).read_text()
    (tmp_path / file).write_text(text.replace(old, new))
    assert text != (tmp_path / file).read_text()
    with pytest.raises(FileError, match=message):
        load(TASKS[name], tmp_path)


@pytest.mark.parametrize("name", ["mmstar", "chartqa", "mme", "mvbench", "mantis"])
def test_missing_files_are_named(tmp_path, name):
    task = TASKS[name]
    pattern = re.escape(task.files[0]).replace(r"\*", ".*")
    with pytest.raises(FileError, match=f"{pattern}: no such file; --data is"):
        load(task, tmp_path)
    assert not places.has_files(tmp_path, task.files)


def test_a_split_that_is_missing(tmp_path):
    world.build(tmp_path, [TASKS["mmmu"]])
    rows = load(TASKS["mmmu"], tmp_path).rows
    assert len(rows) == world.ROWS and {row.values["split"] for row in rows} == {"validation"}
    other = dataclasses.replace(TASKS["mmmu"], arguments={"kind": "mmmu", "split": "test"})
    with pytest.raises(FileError, match="no row has the split 'test'"):
        load(other, tmp_path)


def test_the_first_image_of_mmmu_is_doubled(tmp_path):
    world.build(tmp_path, [TASKS["mmmu"]])
    (image,) = load(TASKS["mmmu"], tmp_path).rows[0].load_images()
    assert image.size == (2 * world.SIZE, 2 * world.SIZE)


def test_subtitles_at_the_frames(tmp_path):
    task = TASKS["videomme_subtitles"]
    row = load(task, world.build(tmp_path, [task])).rows[0]
    assert row.values["cues"] == [(0, 1500, "Hello you"), (2000, 2900, "Bye")]
    question = asking.make_question(Variant(task, frames=8), row)
    assert "listed below:\nHello you\nHello you\nHello you\nHello you\nBye\nBye\nSelect" in (
        question.text
    )
    assert videos.shown_subtitles(row.values["cues"], [0, 16, 29], 10.0) == ""


def test_frames_of_a_clip_and_of_a_folder(tmp_path):
    task = TASKS["mvbench"]
    rows = load(task, world.build(tmp_path, [task])).rows
    kinds = {row.values["task"]: row for row in rows}
    assert kinds["action_sequence"].clip == [0.5, 2.0] and kinds["action_antonym"].clip is None
    for row in kinds.values():
        question = asking.make_question(Variant(task, frames=4), row)
        assert question.text.startswith("Frame1: <image>\nFrame2: <image>\n")
        assert len(question.images) == 4


def test_reading_parquet_needs_pyarrow(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        mantis.read_parquet(tmp_path / "test.parquet")
