"""The digits data: handwriting split for good, items that depend on their number alone, answers
that are true of their images.
"""

import collections
import functools
import re

import numpy as np
import pytest

from configs.tiny_digits import get_config
from examples.tiny_digits.recipe import data as digits
from examples.tiny_digits.recipe.data import DigitsSource, Question, is_right
from examples.tiny_digits.recipe.evaluate import score
from internvl3_jax.config import UNITS
from internvl3_jax.data.media.tiles import count_tiles, image_limit
from internvl3_jax.data.pipeline import make_tokenizer
from tests.support.official_data import make_sample

CONFIG = get_config()
LATE = 20_000  # items from here on are as hard as they get
BOX = re.compile(r"\[(\d+), (\d+), (\d+), (\d+)\]")


@functools.cache
def items(count=250):
    source = DigitsSource(LATE + count, seed=3)
    return [source[LATE + index] for index in range(count)]


@functools.cache
def asked(per_task=40):
    return digits.held_out(per_task)


def turns(question: Question):
    """(what is asked, what is answered) of each turn, without the image's tag."""
    users, answers = question.messages[::2], question.messages[1::2]
    assert [message["role"] for message in question.messages] == ["user", "assistant"] * len(users)
    return [
        (user["content"].removeprefix("<image>\n"), answer["content"])
        for user, answer in zip(users, answers, strict=True)
    ]


def task_of(prompt: str) -> str:
    patterns = {
        task: re.escape(text).replace(r"\{\}", r"\d") for task, text in digits.PROMPTS.items()
    }
    patterns["compare"] = patterns["compare"].replace("<image>", r"(<image>|\d+)")
    (task,) = [task for task, pattern in patterns.items() if re.fullmatch(pattern, prompt)]
    return task


# --- handwriting ---------------------------------------------------------------------------------


def test_test_handwriting_is_never_trained_on():
    (train, train_labels), (test, test_labels) = (
        digits.handwriting(split) for split in ("train", "test")
    )
    assert len(train) + len(test) == 1797 and len(test) == 360
    assert not {scan.tobytes() for scan in train} & {scan.tobytes() for scan in test}
    assert train.dtype == np.uint8 and train.max() == 255
    for labels in (train_labels, test_labels):
        assert len(labels) and set(labels) == set(range(10))
        assert np.bincount(labels).min() > 0.05 * len(labels)


def test_training_images_use_training_handwriting_alone(monkeypatch):
    asked_for = []
    original = digits.handwriting
    monkeypatch.setattr(
        digits, "handwriting", lambda split: asked_for.append(split) or original(split)
    )
    for index in range(30):
        DigitsSource(100, seed=0)[index]
    assert set(asked_for) == {"train"}
    asked_for.clear()
    digits.held_out(2)
    assert set(asked_for) == {"test"}


# --- items ---------------------------------------------------------------------------------------


def contents(question):
    return (
        question.task,
        question.messages,
        [(image.size, image.tobytes()) for image in question.images],
    )


def test_an_item_depends_on_its_number_alone():
    source, again = DigitsSource(LATE + 50, seed=3), DigitsSource(10**6, seed=3)
    order = np.random.default_rng(0).permutation(50)
    read = {index: contents(source[LATE + index]) for index in order}
    assert all(
        read[index] == contents(again[LATE + index]) == contents(items()[index])
        for index in range(50)
    )
    assert len({repr(read[index][1:]) for index in read}) == 50
    assert contents(DigitsSource(100, seed=4)[0]) != contents(DigitsSource(100, seed=3)[0])


def test_eval_questions_stay_the_same():
    first, second = digits.held_out(3), digits.held_out(5)
    assert [question.task for question in first] == [
        task for task in digits.TASKS for _ in range(3)
    ]
    for task in range(len(digits.TASKS)):
        for index in range(3):
            assert contents(first[3 * task + index]) == contents(second[5 * task + index])


def test_every_kind_occurs():
    """All tasks, one to five digits, one and several tiles, upright and lying images."""
    tasks, lengths, tiles = collections.Counter(), collections.Counter(), collections.Counter()
    for question in items():
        limit = image_limit(CONFIG.processor, len(question.images))
        tiles.update(count_tiles(*image.size, CONFIG.processor, limit) for image in question.images)
        for prompt, answer in turns(question):
            tasks[task_of(prompt)] += 1
            if task_of(prompt) == "read":
                lengths[len(answer)] += 1
    assert set(tasks) == set(digits.TASKS) and min(tasks.values()) > 15
    assert set(lengths) == {1, 2, 3, 4, 5} and min(lengths.values()) > 5
    assert len(tiles) >= 4 and tiles[1] > 10
    sizes = [image.size for question in items() for image in question.images]
    assert len(set(sizes)) > 150
    assert any(height > width for width, height in sizes) and any(
        width > 3 * height for width, height in sizes
    )


def test_the_first_items_are_easier():
    source = DigitsSource(10**6, seed=0)
    for index in range(40):
        assert all(
            len(answer) == 1 for prompt, answer in turns(source[index]) if task_of(prompt) == "read"
        )


def test_answers_have_their_form_and_agree():
    """Every answer parses; the answers about one image do not contradict one another."""
    forms = {
        "read": r"\d{1,5}",
        "count": r"[1-5]",
        "locate": r"(\d+): <ref>(\d)</ref><box>\[\[\d+, \d+, \d+, \d+\]\]</box>",
        "compare": r"(\d{1,2}), (\d{1,2}): (Image-1|Image-2|Neither)",
    }
    for question in [*items(), *asked()]:
        answers = {}
        for prompt, answer in turns(question):
            task = task_of(prompt)
            answers.setdefault(task, answer)
            parts = re.fullmatch(forms[task], answer)
            assert parts and is_right(task, answer, answer)
            if task == "locate":
                # It reads as far as the digit that was asked for, which occurs nowhere else.
                seen, wanted = parts.groups()
                assert f"<ref>{wanted}</ref>" in prompt and seen.index(wanted) == len(seen) - 1
                if "read" in answers:
                    assert answers["read"].startswith(seen) and answers["read"].count(wanted) == 1
            if task == "compare":
                first, second, verdict = parts.groups()
                order = int(first) - int(second)
                assert verdict == ("Image-1" if order > 0 else "Image-2" if order else "Neither")
                assert first == str(int(first)) and second == str(int(second))
                assert question.images or f"Image-1: {first}\nImage-2: {second}\n" in prompt
        if {"read", "count"} <= answers.keys():
            assert len(answers["read"]) == int(answers["count"])
        tags = sum(message["content"].count("<image>") for message in question.messages)
        assert (
            tags
            == len(question.images)
            == {"compare": 2, "compare in words": 0}.get(question.task, 1)
        )


def test_boxes_lie_on_their_digits():
    """Inside the image, with ink in the middle, and from left to right."""
    rng = np.random.default_rng(0)
    for number in range(120):
        scene = (digits.line if number % 2 else digits.sheet)(rng, "test", 5)
        width, height = scene.image.size
        pixels = np.asarray(scene.image).astype(int)
        paper = np.median(pixels.reshape(-1, 3), axis=0)
        assert 1 <= len(scene.digits) == len(scene.boxes) <= 5
        for left, top, right, bottom in scene.boxes:
            # The sides of the image are whole pixels.
            assert 0 <= left < right <= width + 0.5 and 0 <= top < bottom <= height + 0.5
            inside = pixels[round(top) : round(bottom), round(left) : round(right)]
            assert (np.abs(inside - paper).sum(axis=-1) > 60).mean() > 0.1
        if number % 2:
            assert [box[0] for box in scene.boxes] == sorted(box[0] for box in scene.boxes)


def test_written_boxes_are_thousandths_of_the_image():
    assert digits.format_box((0, 10, 50, 40), (100, 40)) == "[0, 250, 500, 1000]"
    assert digits.format_box((-3, 0, 120, 40), (100, 40)) == "[0, 0, 1000, 1000]"
    for question in asked():
        if question.task == "locate":
            for box in BOX.findall(question.answer):
                left, top, right, bottom = map(int, box)
                assert 0 <= left < right <= 1000 and 0 <= top < bottom <= 1000
                assert all(side % 10 == 0 for side in (left, top, right, bottom))


# --- scoring -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answered", "right"),
    [
        ("3: <ref>3</ref><box>[[100, 100, 200, 200], [300, 100, 400, 200]]</box>", True),
        ("3: <ref>3</ref><box>[[110, 100, 200, 200], [300, 120, 400, 200]]</box>", True),
        ("3: <ref>3</ref><box>[[100, 100, 200, 200], [360, 100, 460, 200]]</box>", False),
        ("3: <ref>3</ref><box>[[300, 100, 400, 200], [100, 100, 200, 200]]</box>", False),
        ("3: <ref>3</ref><box>[[100, 100, 200, 200]]</box>", False),
        (
            "3: <ref>3</ref><box>[[100, 100, 200, 200], [300, 100, 400, 200], [1, 1, 2, 2]]</box>",
            False,
        ),
        ("8: <ref>8</ref><box>[[100, 100, 200, 200], [300, 100, 400, 200]]</box>", False),
        ("3: <ref>3</ref><box>[[200, 200, 100, 100], [300, 100, 400, 200]]</box>", False),
        ("3: <ref>3</ref><box>[[100, 100, 200, 200], [300, 100, 400, 200]]", False),
        ("31: <ref>3</ref><box>[[100, 100, 200, 200], [300, 100, 400, 200]]</box>", True),
        ("<ref>3</ref><box>[[100, 100, 200, 200], [300, 100, 400, 200]]</box>", False),
        ("", False),
    ],
)
def test_located_digits_are_right_by_overlap(answered, right):
    expected = "3: <ref>3</ref><box>[[100, 100, 200, 200], [300, 100, 400, 200]]</box>"
    assert is_right("locate", expected, answered) == right


def test_other_answers_are_right_when_they_are_equal():
    assert (
        is_right("read", "12", "12")
        and not is_right("read", "12", "012")
        and not is_right("count", "1", "")
    )
    assert not is_right("compare", "1, 2: Image-2", "1, 2: Image-1")


def test_scores():
    questions = asked()
    answers = [question.answer for question in questions]
    assert score(questions, answers) == dict.fromkeys([*digits.TASKS, "digit"], 1.0)
    assert score(questions, [""] * len(questions)) == dict.fromkeys([*digits.TASKS, "digit"], 0.0)
    wrong = list(answers)
    wrong[0] = answers[0][:-1] + str((int(answers[0][-1]) + 1) % 10)
    digits_read = sum(len(question.answer) for question in questions if question.task == "read")
    scores = score(questions, wrong)
    assert (
        scores["read"] == 39 / 40
        and scores["digit"] == pytest.approx(1 - 1 / digits_read)
        and scores["count"] == 1
    )
    wrong[0] = answers[0] + "0"  # one digit too many counts against the digits, too
    assert score(questions, wrong)["digit"] == pytest.approx(digits_read / (digits_read + 1))


# --- tokens --------------------------------------------------------------------------------------


def test_samples_fit_the_rows_of_the_configuration():
    tokenizer = make_tokenizer(CONFIG.data)
    lengths, tiles = [], []
    for question in items():
        sample = make_sample(
            question.messages,
            question.images,
            tokenizer,
            CONFIG.processor,
            [UNITS] * len(question.images),
        )
        lengths.append(len(sample["tokens"]))
        tiles.append(len(sample["tiles"]))
        assert (sample["loss_weights"] > 0).sum() >= 2
    assert max(lengths) <= CONFIG.data.tokens_per_row and max(tiles) <= CONFIG.data.tiles_per_row
