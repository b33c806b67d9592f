"""The table of tasks, their prompts, and how the card averages its numbers."""

import pytest

from internvl3_jax.evaluate import card, marks, metrics, prompts, task_table
from internvl3_jax.evaluate.loaders.registry import LOADERS
from internvl3_jax.evaluate.task import EXACTNESS, Row
from internvl3_jax.evaluate.task_table import TASKS, find_tasks
from internvl3_jax.evaluate.variant import Variant
from tests.support.documents import ROOT
from tests.support.evaluate_page import task_table as table_of_the_page

pytestmark = pytest.mark.smoke

LETTER = "Answer with the option's letter from the given choices directly."
FRAMES = "Frame-1: <image>\nFrame-2: <image>\nFrame-3: <image>\n"
WATCH = (
    "Carefully watch this video and pay attention to every detail. Based on your observations, "
    "select the best option that accurately addresses the question."
)
REASONING = (
    " If you are uncertain or the problem is too complex, make a reasoned guess based on the "
    "information provided. Avoid repeating steps indefinitely—provide your best guess even if "
    "unsure. Think step by step logically, considering all relevant information before answering."
)
ANIMALS = {"A": "cat", "B": "dog"}


def row(question: str, options=None, **values) -> Row:
    return Row("1", "x.tsv row 1", question, options=options or {}, values=values)


# --- the card -----------------------------------------------------------------------------------


@pytest.mark.parametrize("group", card.GROUPS.values(), ids=card.GROUPS)
def test_published_numbers_give_every_overall(group):
    """To 0.05, half a unit of the last digit that is printed."""
    for size in group.rows:
        best_of = size.endswith(" Bo8")
        published = group.published(size.removesuffix(" Bo8"), best_of)
        overall = group.overall(published)
        if group.has_overall:
            assert overall == pytest.approx(published["Overall"], abs=0.0501), size
        else:
            assert overall is None


def test_an_overall_needs_all_columns():
    published = card.OCR.published("8B")
    assert card.OCR.overall(published | {"AI2D (mask)": None}) is None
    assert card.SPATIAL.published("1B") == {}
    assert card.REASONING.published("8B", best_of=True)["MMMU"] == 66.0
    assert card.OCR.published("8B", best_of=True) == {}


# --- the table ----------------------------------------------------------------------------------


def test_every_column_of_the_card_has_one_task():
    columns = [
        (task.group, column)
        for task in TASKS.values()
        if task.group in card.GROUPS
        for column in task.columns
    ]
    of_card = [(group.name, column) for group in card.GROUPS.values() for column in group.columns]
    assert sorted(columns) == sorted(of_card) and len(columns) == 79


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_names_of_the_table_mean_something(task):
    assert task.loader in LOADERS and task.metric in metrics.METRICS
    assert task.scorer in marks.SCORERS and task.exact in EXACTNESS
    assert Variant(task).options()["max_new_tokens"] == task.max_new_tokens
    assert (task.prompt in prompts.VIDEO) == bool(task.frames or task.frame_rule)
    assert (task.prompt in prompts.IMAGE) != (task.prompt in prompts.VIDEO)
    # What is not scored here becomes a file for those who score it.
    assert (task.scorer == "none") == bool(task.file_form) == bool(task.file_name)
    assert (task.scorer == "none") == (task.exact in ("server", "judge"))


def test_exactness_by_columns():
    count = dict.fromkeys(EXACTNESS, 0)
    for task in find_tasks(["card"]):
        count[task.exact] += len(task.columns)
    assert count == {"rule": 60, "reasoning": 7, "server": 6, "judge": 6}


def test_tiles_tokens_and_frames_of_the_programs():
    tiles = {task.name: task.max_tiles for task in TASKS.values() if not task.frames}
    more = {
        "chartqa": 12,
        "docvqa": 18,
        "docvqa_val": 18,
        "infovqa": 24,
        "infovqa_val": 24,
        "ocrbench": 24,
        "mmmu": 12,
        "mme_realworld": 12,
        "vcr": 12,
        "screenspot": 12,
        "screenspot_v2": 12,
        "mmiu": 12,
    }
    assert tiles == dict.fromkeys(tiles, 6) | more
    videos = [task for task in TASKS.values() if task.frames]
    assert {task.max_tiles for task in videos} == {1}
    assert [task.frames for task in videos if task.name in ("mvbench", "cgbench_long")] == [
        (16,),
        (32,),
    ]
    kit = {task.max_new_tokens for task in TASKS.values() if task.program == "kit"}
    assert kit == {4096}
    own = {"textvqa": 10, "ai2d_mask": 10, "mme": 20, "mantis": 50, "mirb": 512, "mvbench": 1000}
    assert {name: TASKS[name].max_new_tokens for name in own} == own


def test_names_of_tasks_and_groups():
    assert [task.name for task in find_tasks(["mmstar", "hallucination", "mmstar"])] == [
        "mmstar",
        "hallusionbench",
        "mmhal",
        "crpe",
        "pope",
    ]
    with pytest.raises(ValueError, match=r"'mmstr', which is not a task or group; did you mean"):
        find_tasks(["mmstr"])


def test_known_files_have_a_digest():
    files = [name for task in TASKS.values() if task.program == "kit" for name in task.files]
    assert {name for name in files if name.endswith(".tsv")} <= set(task_table.KNOWN_MD5)


def test_the_page_has_every_task():
    """docs/evaluation.md has the table that tests/support/evaluate_page.py makes."""
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert table_of_the_page() in page
    assert all(f"`{name}`" in page for name in [*TASKS, *card.GROUPS])


# --- prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "images", "text"),
    [
        (
            "mmstar",
            row("What is shown?", ANIMALS),
            1,
            f"<image>\nWhat is shown?\nA. cat\nB. dog\n{LETTER}",
        ),
        (
            "mmstar",
            row("What is shown?", ANIMALS, hint="It barks."),
            1,
            f"<image>\nIt barks.\nWhat is shown?\nA. cat\nB. dog\n{LETTER}",
        ),
        (
            "blink",
            row("What is shown?", ANIMALS),
            2,
            f"Image-1: <image>\nImage-2: <image>\nWhat is shown?\nA. cat\nB. dog\n{LETTER}",
        ),
        (
            "mmstar",
            row("图中是什么?", ANIMALS),
            1,
            "<image>\n图中是什么?\nA. cat\nB. dog\n请直接回答选项字母。",
        ),
        (
            "mmmu",
            row("How many <image 1>?"),
            1,
            "<image>\nHow many <image 1>?\nAnswer the question directly.",
        ),
        (
            "muirbench",
            row("Which of <image> and <image> is red?", ANIMALS),
            2,
            "Image-1: <image>\nImage-2: <image>\nWhich of <Image-1> and <Image-2> is red?\nA. cat\n"
            f"B. dog\n{LETTER}",
        ),
        (
            "muirbench",
            row("<image> <image> Which?", ANIMALS),
            2,
            f"Image-1: <image>\nImage-2: <image>\n Which?\nA. cat\nB. dog\n{LETTER}",
        ),
        (
            "videomme",
            row("What happens?", candidates=["A. x", "B. y"]),
            3,
            f"{FRAMES}\nThese are the frames of a video. Select the best answer to the following "
            "multiple-choice question based on the video. Respond with only the letter (A, B, C, "
            f"or D) of the correct option.\nQuestion: What happens?\nA. x\nB. y \n{LETTER}",
        ),
        (
            "videomme_subtitles",
            row("What happens?", candidates=["A. x", "B. y"], subtitles="Hi.\nBye."),
            3,
            f"{FRAMES}\nThese are the frames of a video. This video's subtitles are listed below:\n"
            "Hi.\nBye.\nSelect the best answer to the following multiple-choice question based on "
            "the video. Respond with only the letter (A, B, C, or D) of the correct option.\n"
            f"Question: What happens?\nA. x\nB. y \n{LETTER}",
        ),
        (
            "mmbench_video",
            row("What happens?"),
            3,
            f"{FRAMES}\nYou will be provided with 3 separate frames uniformly sampled from a "
            "video, the frames are provided in chronological order of the video.\nPlease analyze "
            "these images and provide the answer to the question about the video content.\nPlease "
            "directly reply with your response to the only question.\nQuestion: What happens? ",
        ),
        (
            "longvideobench",
            row("What happens?", {"A": "x", "B": "y"}),
            3,
            f"{FRAMES}What happens?\nA. x\nB. y\n{LETTER}",
        ),
        (
            "mlvu",
            row("What?", {"A": "x", "B": "y"}),
            3,
            f"{FRAMES}{WATCH}Question: What?\nOptions:\n(A) x\n(B) y\nOnly give the best option.",
        ),
        (
            "vsibench",
            row("How many chairs?"),
            3,
            f"{FRAMES}These are frames of a video.\nHow many chairs?\nAnswer briefly and directly "
            "in one float number.",
        ),
        (
            "vsibench",
            row("Which is near Image-2?", candidates=["A. x", "B. y"]),
            3,
            f"{FRAMES}These are frames of a video.\nWhich is near Frame-2?\nA. x\nB. y\n{LETTER}",
        ),
        (
            "mvbench",
            row("What?", {"A": "x", "B": "y"}),
            2,
            "Frame1: <image>\nFrame2: <image>\nCarefully watch the video and pay attention to the "
            "cause and sequence of events, the detail and movement of objects, and the action and "
            "pose of persons. Based on your observations, select the best option that accurately "
            "addresses the question.\n\nQuestion: What?\nOptions:\n(A) x\n(B) y\nOnly give the "
            "best option.",
        ),
        (
            "hallusionbench",
            row("Is it red?"),
            1,
            "<image>\nIs it red? Please answer yes or no. Answer the question using a single word "
            "or phrase.",
        ),
        (
            "mme_realworld",
            row("What?", **{"multi-choice options": "The choices are listed below:\n(A) x"}),
            1,
            "<image>\nWhat? The choices are listed below:\n(A) x\nSelect the best answer to the "
            "above multiple-choice question based on the image. Respond with only the letter (A, "
            "B, C, D, or E) of the correct option. \nThe best answer is:",
        ),
        (
            "screenspot",
            row("open it"),
            1,
            "<image>\nPlease provide the bounding box coordinate of the region this sentence "
            "describes: <ref>open it</ref>",
        ),
        (
            "docvqa",
            row("Who?"),
            1,
            "<image>\nWho? Answer the question using a single word or phrase.",
        ),
        (
            "ocrbench",
            row("Who?"),
            1,
            "<image>\nWho?\nAnswer the question using a single word or phrase.",
        ),
        (
            "mantis",
            row("<image> <image> Which?", kind="multi-choice", texts=["(A) x", "(B) y"]),
            2,
            f"Image-1: <image>\nImage-2: <image>\nWhich?\n(A) x\n(B) y\n{LETTER}",
        ),
        (
            "mantis",
            row("Is <image> like <image>?", kind="short-answer", texts=[]),
            2,
            "Image-1: <image>\nImage-2: <image>\nIs Image-1 like Image-2?\nAnswer the question "
            "using a single word or phrase.",
        ),
        (
            "mirb",
            row("How many?", task="3d_scene"),
            2,
            "Image-1: <image>\nImage-2: <image>\nHow many?\nThe following images are different "
            "views of the same 3D scene. Answer with a single number.",
        ),
        (
            "mmiu",
            row("Which?", context="Select from:\nA: x"),
            2,
            f"Image-1: <image>\nImage-2: <image>\nWhich?\nSelect from:\nA: x\n{LETTER}",
        ),
        (
            "mmbench_cn",
            row("什么?", ANIMALS, language="cn"),
            1,
            "<image>\n什么?\nA. cat\nB. dog\n请直接回答选项字母。",
        ),
        ("pope", row("Is it? Answer it."), 1, "<image>\nIs it? Answer it."),
        (
            "mathverse",
            row("As shown, please directly answer the question and give the letter."),
            1,
            "<image>\nAs shown, please give the letter.",
        ),
    ],
)
def test_prompts_are_those_of_the_programs(name, given, images, text):
    assert prompts.build(TASKS[name], given, images) == text


def test_prompts_with_reasoning():
    text = prompts.build(TASKS["mmmu"], row("What?", ANIMALS), 1, reasoning=True)
    assert text == (
        "<image>\nWhat?\nA. cat\nB. dog\nAnswer the preceding multiple choice question. The last "
        "line of your response should follow this format: 'Answer: \\boxed{$LETTER}' (without "
        f"quotes), where LETTER is one of the options.{REASONING}"
    )
    text = prompts.build(TASKS["mathvista"], row("What?"), 1, reasoning=True)
    assert text == (
        "<image>\nWhat?\nAnswer the preceding question. The last line of your response should "
        "follow this format: 'Answer: \\boxed{$FINAL_ANSWER}' (without quotes), where "
        "'FINAL_ANSWER' is your conclusion based on the reasoning provided." + REASONING
    )
    open_question = prompts.build(TASKS["mmmu"], row("What?"), 1, reasoning=True)
    assert open_question.startswith("<image>\nWhat?\nAnswer the question directly.\nAnswer the pre")
    # It changes nothing in short and long answers and in yes or no.
    for name in ("ocrbench", "wildvision", "hallusionbench"):
        texts = [prompts.build(TASKS[name], row("What?"), 1, reasoning=on) for on in (False, True)]
        assert texts[0] == texts[1]
