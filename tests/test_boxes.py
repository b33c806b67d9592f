"""Boxes in answers: how they are read, where they are in the image, and how they are drawn."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from internvl3_jax import Chat, load
from internvl3_jax.config import ProcessorConfig
from internvl3_jax.data.boxes import Box, ShownImage, labels_of, parse_boxes
from internvl3_jax.data.media import drawing
from internvl3_jax.data.media.drawing import COLORS, contrast, draw_boxes, draw_tiles, text_color
from internvl3_jax.inference.answer import Answer
from internvl3_jax.inference.answerer import as_json
from internvl3_jax.inference.draw_answer import draw_answer
from tests.support.documented_world import MODEL

ONE = [ShownImage(640, 480)]
TWO = [ShownImage(100, 100, "Image-1"), ShownImage(1000, 500, "Image-2")]


def read(text, images=ONE):
    return [(box.kind, box.label, box.pixels, box.problem) for box in parse_boxes(text, images)]


# --- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "<ref>a cat</ref><box>[[10, 20, 300, 400], [0, 0, 1000, 1000]]</box>",
            [("box", "a cat", (6.4, 9.6, 192, 192)), ("box", "a cat", (0, 0, 640, 480))],
        ),
        ("<box>[500,250,750,500]</box>", [("box", None, (320, 120, 480, 240))]),
        ("<box>(500,250),(750,500)</box>", [("box", None, (320, 120, 480, 240))]),
        ("<box>500 250 750 500</box>", [("box", None, (320, 120, 480, 240))]),
        (
            "<ref>sign</ref> reads <quad>[[0, 0, 500, 0, 500, 500, 0, 500]]</quad>",
            [("quad", "sign", (0, 0, 320, 0, 320, 240, 0, 240))],
        ),
        (
            "<quad>[[0, 0], [500, 0], [500, 500], [0, 500]]</quad>",
            [("quad", None, (0, 0, 320, 0, 320, 240, 0, 240))],
        ),
        ("<box>[[500, 250]]</box>", [("point", None, (320, 120))]),
        ("<point>500 250</point>", [("point", None, (320, 120))]),
        ("<ref>OK</ref><point>[[500, 250]]</point>", [("point", "OK", (320, 120))]),
        ("click(x=500, y=250)", [("point", "click", (320, 120))]),
        ("pyautogui.doubleClick(x=0.5, y=0.25)", [("point", "doubleClick", (320, 120))]),
        # Fractions, by the rule of the official evaluation.
        ("<box>[[0.5, 0.25, 0.75, 0.5]]</box>", [("box", None, (320, 120, 480, 240))]),
        ("<point>1 0</point>", [("point", None, (0.64, 0))]),
        # A label is of the boxes that follow it directly.
        (
            "<ref>a</ref><box>[[0,0,500,500]]</box>, <box>[[0,0,250,250]]</box> or "
            "<box>[[0,0,1000,250]]</box>",
            [
                ("box", "a", (0, 0, 320, 240)),
                ("box", "a", (0, 0, 160, 120)),
                ("box", None, (0, 0, 640, 120)),
            ],
        ),
        ("f(x=1, y=2), [[1, 2, 3, 4]], a boxed 7 and <ref>a cat</ref>", []),
        ("", []),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_boxes_are_read(text, found):
    assert read(text) == [(*box, "") for box in found]


@pytest.mark.parametrize(
    ("text", "pixels", "problem"),
    [
        ("<box>[[1, 2, 3]]</box>", None, "<box> has 3 numbers; expected 4"),
        ("<quad>[[1, 2, 3, 4]]</quad>", None, "<quad> has 4 numbers; expected 8"),
        ("<point>[[1, 2, 3]]</point>", None, "<point> has 3 numbers; expected 2"),
        ("<box>[[1, 2, 3, 4</box>", None, "<box> holds '[[1, 2, 3, 4'; expected numbers"),
        ("<box>[[1, 2, 3, cat]]</box>", None, "expected numbers"),
        ("<box>[[1, 2, 3, 4]] cat</box>", None, "expected numbers"),
        ("<box></box>", None, "<box> holds ''"),
        ("<box>[[1, 2", None, "<box> has no end: '[[1, 2'"),
        (f"<box>[[1, 2, 3, {'9' * 400}]]</box>", None, "has a number that is too large"),
        ("<box>[[500, 500, 900, 1200]]</box>", (320, 240, 576, 480), "reaches beyond the image"),
        ("<box>[[-100, 500, 900, 800]]</box>", (0, 240, 576, 384), "reaches beyond the image"),
        ("<box>[[750, 500, 500, 250]]</box>", (320, 120, 480, 240), "corners were exchanged"),
        ("<box>[[1100, 0, 1200, 500]]</box>", None, "is outside of the image"),
        ("<point>1500 500</point>", None, "is outside of the image"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_what_is_wrong_with_a_box_is_said(text, pixels, problem):
    ((_, _, found, said),) = read(f"Here: {text}")
    assert found == pixels and problem in said
    # It does not hide the next one.
    boxes = parse_boxes(f"{text} <box>[[0, 0, 500, 500]]</box>", ONE)
    assert boxes[-1].pixels == (0, 0, 320, 240) and len(boxes) == 2


def test_any_text_is_read():
    """Whatever a model writes gives boxes or problems, and pixels within the image."""
    rng = np.random.default_rng(0)
    parts = ["<box>", "</box>", "<ref>", "</ref>", "<quad>", "</quad>", "<point>", "[", "]", ","]
    parts += ["[[", "]]", "1000", "-5", "0.5", "12", " ", "cat", "click(x=", "y=", "1e9", "("]
    for _ in range(3000):
        text = "".join(rng.choice(parts, rng.integers(1, 30)))
        for box in parse_boxes(text, ONE):
            assert (box.pixels is not None) or box.problem
            if box.pixels:
                assert all(0 <= x <= 640 for x in box.pixels[::2])
                assert all(0 <= y <= 480 for y in box.pixels[1::2])
                assert (
                    len(box.pixels)
                    == len(box.values)
                    == {"point": 2, "box": 4, "quad": 8}[box.kind]
                )


def test_several_images():
    box = "<box>[[0, 0, 500, 500]]</box>"
    text = f"In Image-2 {box} and {box}; in image 1 {box}."
    assert [(b.image, b.pixels) for b in parse_boxes(text, TWO)] == [
        (2, (0, 0, 500, 250)),
        (2, (0, 0, 500, 250)),
        (1, (0, 0, 50, 50)),
    ]
    (unknown,) = parse_boxes(box, TWO)
    assert (unknown.image, unknown.pixels, unknown.problem) == (None, None, "")
    assert unknown.on(2, TWO[1]).pixels == (0, 0, 500, 250)
    # Image-12 is not Image-1.
    assert parse_boxes(f"Image-12 {box}", TWO)[0].image is None
    assert parse_boxes(box)[0].image is None
    question = "Image-1: <image>\nImage-2: <image>\nThe Frame3: <image> or <image>?"
    assert labels_of(question, 4) == ["Image-1", "Image-2", "Frame-3", ""]


# --- answers -------------------------------------------------------------------------------------

LOCATE = "<image>\nWhere is the <ref>8</ref>?"


@pytest.fixture(scope="module")
def located():
    """The chat of the digits model after a question for a digit's box."""
    chat = Chat(load(MODEL), max_new_tokens=64)
    chat(LOCATE, images=MODEL / "pictures" / "10_locate.png")
    return chat


def test_answers_have_boxes_in_pixels(located):
    answer = located.last
    (box,) = answer.boxes
    width, height = 190, 41
    expected = [v / 1000 * (width, height)[n % 2] for n, v in enumerate(box.values)]
    assert box.label == "8" and box.image == 1 and box.pixels == pytest.approx(expected, abs=0.01)
    assert as_json(answer)["boxes"] == [dataclasses.asdict(box)]
    # A later question is about the same image.
    located("And again, where is the <ref>8</ref>?")
    assert all(box.image == 1 for box in located.last.boxes)
    assert located.shown[0] == located.shown[1] == [ShownImage(width, height)]
    located.undo()
    (many,) = located.answer_many([(LOCATE, MODEL / "pictures" / "10_locate.png")])
    assert many.boxes == answer.boxes


def test_infer_draws_the_answer(ask, capsys, tmp_path):
    target = tmp_path / "out.png"
    image_path = str(MODEL / "pictures" / "10_locate.png")
    question = {"checkpoint": str(MODEL), "image": [image_path], "prompt": LOCATE}
    out, err = ask(**question, max_new_tokens=64, json=True, draw=str(target), draw_tiles=True)
    (box,) = json.loads(out)["boxes"]
    assert err.startswith("note: 1 box drawn at 4 times its size: ") and target.exists()
    drawn, plain = Image.open(target), Image.open(image_path).convert("RGB")
    assert drawn.size == (4 * plain.width, 4 * plain.height)
    changed = np.abs(np.asarray(drawn).astype(int) - np.asarray(plain.resize(drawn.size))) > 60
    rows, columns = np.nonzero(changed.any(-1))
    x = 4 * box["pixels"][0] + 2
    assert any(abs(columns - x) < 6) and len(rows) > 100
    for flags, reason in [
        ({"draw": "out.txt"}, "end it with .png"),
        ({"draw_tiles": True}, "--draw_tiles is about --draw"),
        ({"draw": "out.png", "image": []}, "--draw is about one answer to --prompt, with an image"),
    ]:
        with pytest.raises(SystemExit):
            ask(**question | flags)
        assert reason in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        ask(**question, draw=str(tmp_path / "gone" / "out.png"))
    assert "--draw" in stopped.value.code and "there is no folder" in stopped.value.code


# --- drawings ------------------------------------------------------------------------------------


def answer_of(text, images):
    return Answer(text, [], 0, [1] * len(images), 0, 0, boxes=parse_boxes(text, images))


def test_several_images_are_drawn_side_by_side(tmp_path):
    images = [Image.new("RGB", (700, 100)), Image.new("RGB", (700, 200))]
    shown = [ShownImage(*image.size, f"Image-{n}") for n, image in enumerate(images, 1)]
    path, processor = tmp_path / "out.png", ProcessorConfig()
    named = answer_of("In Image-2 <box>[[0, 0, 500, 500]]</box>", shown)
    assert draw_answer(named, images, processor, path) == [f"1 box drawn: {tmp_path / 'out-2.png'}"]
    assert not path.exists() and not (tmp_path / "out-1.png").exists()
    text = "<box>[[0, 0, 500, 500]]</box> <ref>dog</ref><box>[[1, 2, 3]]</box>"
    lines = draw_answer(answer_of(text, shown), images, processor, path)
    assert lines == [
        "box 2 (dog): <box> has 3 numbers; expected 4",
        "no image is named for 1 of them: drawn on all 2",
        f"1 box drawn: {tmp_path / 'out-1.png'}",
        f"1 box drawn: {tmp_path / 'out-2.png'}",
    ]
    lines = draw_answer(answer_of("No.", shown[:1]), images[:1], processor, path)
    assert lines == ["the answer has no boxes", f"0 boxes drawn: {path}"]


def test_labels_and_lines_show_on_any_background():
    for color in COLORS:
        assert contrast(text_color(color), color) >= 4.5
        shades = [color, "#ffffff", "#000000"]
        for background in [*COLORS, "#ffffff", "#000000", "#808080", "#ff0000"]:
            assert max(contrast(shade, background) for shade in shades) >= 3
    box = Box("box", "cat", (0,) * 4, 1, (100.0, 100.0, 300.0, 200.0))
    for background in ("white", "black", "#808080", COLORS[0]):
        plain = Image.new("RGB", (400, 300), background)
        drawn, remarks = draw_boxes(plain, [box])
        assert remarks == [] and drawn.size == plain.size
        across = {drawn.getpixel((x, 150)) for x in range(90, 110)}
        assert {(255, 255, 255), (0, 0, 0)} <= across and len(across) >= 3
        assert drawn.getpixel((200, 150)) == plain.getpixel((0, 0))  # the inside stays


def test_labels_of_other_scripts(monkeypatch):
    def drawn(label):
        box = Box("box", label, (0,) * 4, 1, (50.0, 100.0, 300.0, 200.0))
        image, remarks = draw_boxes(Image.new("RGB", (400, 300)), [box])
        return np.asarray(image), remarks

    # None of these fonts' signs for a missing character.
    for label in ("größer", "a b\nc"):
        assert drawn(label)[1] == []
    monkeypatch.setattr(drawing, "_font_with", lambda text: None)
    pixels, (remark,) = drawn("猫 a")
    assert remark.startswith("no installed font has 猫, so that a label has their numbers")
    assert (pixels == drawn("U+732B a")[0]).all()


def test_a_font_that_has_the_characters_is_found(tmp_path, monkeypatch):
    """Searched where the system keeps fonts; matplotlib brings one with Cyrillic letters."""
    from matplotlib import get_data_path

    drawing._font_with.cache_clear()
    monkeypatch.setattr(drawing, "FONT_FOLDERS", (str(tmp_path), f"{get_data_path()}/fonts/ttf"))
    assert drawing._font_with("кошка").endswith("DejaVuSans.ttf")
    assert drawing._font_with("猫") is None
    box = Box("box", "кошка", (0,) * 4, 1, (50.0, 100.0, 300.0, 200.0))
    assert draw_boxes(Image.new("RGB", (400, 300)), [box])[1] == []
    drawing._font_with.cache_clear()


def test_labels_stay_in_the_image_and_apart():
    places = []
    original = drawing._plate

    def plate(*arguments):
        places.append(original(*arguments))
        return places[-1]

    rng = np.random.default_rng(0)
    boxes = []
    for number in range(6):
        x, y = rng.integers(0, 300), rng.integers(0, 200)
        corners = (float(x), float(y), float(x + 80), float(y + 80))
        boxes.append(Box("box", f"number {number}", (0,) * 4, 1, corners))
    boxes += [dataclasses.replace(boxes[0], label=f"again {number}") for number in range(4)]
    drawing._plate = plate
    try:
        draw_boxes(Image.new("RGB", (400, 300)), boxes)
    finally:
        drawing._plate = original
    assert all(0 <= p[0] and 0 <= p[1] and p[2] <= 400 and p[3] <= 300 for p in places)
    overlaps = [
        (a, b) for number, a in enumerate(places) for b in places[:number] if drawing._overlap(a, b)
    ]
    assert overlaps == []


@pytest.mark.parametrize("tiles, lines", [(1, 0), (7, 3), (13, 5)])
def test_the_grid_of_tiles(tiles, lines):
    """2 x 3 and 3 x 4 tiles of a page, with a thumbnail; one tile has no lines."""
    size = {1: (400, 400), 7: (400, 600), 13: (600, 800)}[tiles]
    drawn = np.asarray(draw_tiles(Image.new("RGB", size, "#336699"), tiles, ProcessorConfig()))
    white = (drawn == 255).all(-1)
    columns = np.flatnonzero(white.mean(0) > 0.9)
    rows = np.flatnonzero(white.mean(1) > 0.9)

    def groups(places):
        return int((np.diff(places) > 1).sum()) + bool(len(places))

    assert groups(columns) + groups(rows) == lines
