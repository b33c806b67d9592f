"""PDFs in questions: pages as images at the resolution of their tiles, through Chat, infer.py and
its requests; whatever cannot be read is one line.
"""

import concurrent.futures
import json
import sys
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from internvl3_jax import Chat, Document, load
from internvl3_jax.config import ProcessorConfig
from internvl3_jax.data.media.documents import (
    MOST_EXCESS,
    DocumentError,
    PdfFile,
    page_pixels,
    parse_pages,
)
from internvl3_jax.data.media.given import UNTRUSTED, Limits
from internvl3_jax.data.media.images import ImageError
from internvl3_jax.data.media.inputs import OpenedDocument, document_images
from internvl3_jax.data.media.tiles import image_grid
from internvl3_jax.data.tokens import main as tokens_main
from tests.support import tiny_checkpoint
from tests.support.infer_flags import fail
from tests.support.pdfs import damaged, encrypted_pdf, image_pdf, plain_pdf, write
from tests.support.tiny_checkpoint import PROCESSOR, make_image

RELEASED = ProcessorConfig()
COLORS = ["red", "lime", "blue", "white", "black", "yellow"]
SIZES = [(120, 160), (160, 120), (50, 50), (300, 30), (100, 140), (90, 90)]
PDF = image_pdf([Image.new("RGB", size, color) for size, color in zip(SIZES, COLORS, strict=True)])
QUESTION = "What does it say?"


@pytest.fixture(scope="module")
def chat():
    return Chat(load(tiny_checkpoint.directory()), max_new_tokens=4)


@pytest.fixture
def pdf(tmp_path):
    return write(tmp_path / "a.pdf", PDF)


# --- pages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pages"),
    [
        (None, [1, 2, 3, 4, 5, 6]),
        ("2-5", [2, 3, 4, 5]),
        (" 1, 3 ,5- ", [1, 3, 5, 6]),
        ("4", [4]),
        ("5,1", [5, 1]),
        ([2, 6], [2, 6]),
    ],
)
def test_pages(text, pages):
    assert parse_pages(text, 6, "a.pdf") == pages
    assert PdfFile(PDF, text).pages == pages


@pytest.mark.parametrize(
    ("pages", "reason"),
    [
        ("", "pages is ''; write for example 2-5"),
        ("a", "pages is 'a'"),
        ("1-2-3", "pages is '1-2-3'"),
        ("-3", "pages is '-3'"),
        ("5-2", "5-2 is empty"),
        ("8-", "8- is empty; it has 6 pages"),
        ("7", "there is no page 7; it has 6"),
        ("0", "there is no page 0"),
        ("1-999999999", "there is no page 999999999"),
        ("1,2-3,3", "a page occurs twice"),
        ([], "give numbers, from 1"),
        ([True], "give numbers, from 1"),
    ],
    ids=str,
)
def test_wrong_pages(pages, reason):
    with pytest.raises(DocumentError, match=f"^a.pdf: .*{reason}"):
        parse_pages(pages, 6, "a.pdf")


def test_pages_show_what_is_on_them():
    file = PdfFile(PDF, "2,1,4")
    assert file.sizes == [SIZES[1], SIZES[0], SIZES[3]]
    images = file.render(RELEASED, 12)
    for image, page in zip(images, (2, 1, 4), strict=True):
        expected = np.asarray(Image.new("RGB", (1, 1), COLORS[page - 1]))[0, 0]
        assert np.abs(np.asarray(image).astype(int) - expected).max() <= 2, page


def test_a_turned_page_is_upright():
    turned = plain_pdf("/MediaBox [0 0 200 100] /Rotate 90")
    file = PdfFile(turned)
    assert file.sizes == [(100, 200)]
    (image,) = file.render(RELEASED, 2)
    assert image.size == (448, 896)


@pytest.mark.parametrize("max_tiles", [1, 4, 6, 12, 24])
def test_pages_have_the_pixels_of_their_tiles(max_tiles):
    """No side has fewer, and few pixels are scaled away; the grid is that of a large page."""
    rng = np.random.default_rng(max_tiles)
    sizes = [(595.28, 841.89), (841.89, 595.28), (612, 792), (960, 540), (300, 300), (1, 1)]
    sizes += [tuple(rng.uniform(50, 2000, 2)) for _ in range(200)]
    for width, height in sizes:
        pixels = page_pixels(width, height, RELEASED, max_tiles)
        columns, rows = image_grid(*pixels, RELEASED, max_tiles)
        large = image_grid(round(width * 1e6), round(height * 1e6), RELEASED, max_tiles)
        full = columns * 448, rows * 448
        excess = pixels[0] * pixels[1] / (full[0] * full[1])
        assert abs(pixels[0] / pixels[1] - width / height) < 0.01 * width / height
        assert excess <= MOST_EXCESS * 1.01
        if excess < MOST_EXCESS * 0.99:
            assert (columns, rows) == large
            assert min(pixels[0] / full[0], pixels[1] / full[1]) >= 1
            assert min(pixels[0] / full[0], pixels[1] / full[1]) < 1.01
    # 150 dpi are what the caller asked for.
    assert page_pixels(612, 792, RELEASED, max_tiles, 150) == (1275, 1650)


def test_an_extreme_page_is_bounded():
    opened = OpenedDocument(Document(plain_pdf("/MediaBox [0 0 1 10000]")))
    (image,) = opened.images(RELEASED, 12, 0)
    assert image.width * image.height <= 1.1 * MOST_EXCESS * 12 * 448**2
    with pytest.raises(ValueError, match="page 1: .*pixels are more than"):
        OpenedDocument(Document(PDF, [1], dpi=4800), Limits(max_pixels=10_000_000)).images(
            RELEASED, 12, 0
        )


def test_threads_do_not_disturb_each_other():
    """PDFium is not thread-safe."""
    alone = [np.asarray(image) for image in PdfFile(PDF).render(RELEASED, 2)]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        runs = list(threads.map(lambda _: PdfFile(PDF).render(RELEASED, 2), range(8)))
    for images in runs:
        assert all(map(np.array_equal, map(np.asarray, images), alone))


# --- questions -----------------------------------------------------------------------------------


def test_a_document_is_the_same_as_its_pages(chat, pdf):
    images = PdfFile(PDF, "2-3").render(PROCESSOR, 4)
    text = f"Image-1: <image>\nImage-2: <image>\n{QUESTION}"
    by_pages = chat.prepare(text, images)
    for source in (pdf, PDF):
        prompt = chat.prepare(QUESTION, documents=Document(source, "2-3"))
        assert prompt.tokens.tolist() == by_pages.tokens.tolist()
        assert (prompt.positions == by_pages.positions).all()
        assert all(map(np.array_equal, prompt.tiles, by_pages.tiles))
    assert prompt.plan.pages == ((2, 3),) and prompt.plan.max_tiles == 4
    assert [(shown.width, shown.height) for shown in prompt.shown] == [i.size for i in images]
    assert [shown.label for shown in prompt.shown] == ["Image-1", "Image-2"]
    (one,) = PdfFile(PDF, [1]).render(PROCESSOR, 4)
    alone = chat.prepare(QUESTION, documents=[Document(pdf, [1])])
    assert alone.tokens.tolist() == chat.prepare(QUESTION, [one]).tokens.tolist()
    images, lines = document_images(Document(pdf, "2-3"), PROCESSOR)
    assert lines + QUESTION == text and len(images) == 2
    assert document_images(PDF, PROCESSOR, first_number=3)[1].startswith("Image-3: <image>\n")


def test_many_pages_take_a_smaller_delta_and_then_fewer_tiles(chat):
    pages = image_pdf([make_image(100, 100, seed) for seed in range(95)])
    prompt = chat.prepare(QUESTION, documents=pages, max_tiles=4)
    assert prompt.plan.changed == ("delta",) and prompt.plan.delta != "1"
    limit = chat.generator.config.language.max_position
    assert prompt.plan.position <= limit < len(prompt.tokens)
    step = np.diff(prompt.positions[prompt.runs[0][0] :])[0]
    assert step == 256 * Fraction(prompt.plan.delta)
    fewer = chat.prepare(QUESTION, documents=pages, delta=1)
    assert fewer.plan.changed == ("tiles",) and fewer.plan.max_tiles < 4
    with pytest.raises(ValueError, match=r"^q: the prompt does not fit: .*Use fewer pages, "):
        chat.prepare(QUESTION, documents=pages, max_tiles=4, delta=1, where="q")


BAD = {
    "text.pdf": (b"hello" * 300, "is not a PDF; give an image with --image"),
    "nothing.pdf": (b"", "is not a PDF"),
    "cut.pdf": (PDF[: len(PDF) // 3], "is damaged, incomplete or .*; fetch it again"),
    "header.pdf": (b"%PDF-1.7\nnothing more", "is damaged, incomplete"),
    "encrypted.pdf": (encrypted_pdf(), "is encrypted; save a copy without a password"),
    "pages.pdf": (plain_pdf(), "without pages"),
    "flat.pdf": (plain_pdf("/MediaBox [0 0 0 0]"), None),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_one_line(chat, tmp_path, name):
    data, reason = BAD[name]
    path = write(tmp_path / name, data)
    if reason is None:  # PDFium takes the size of a letter
        assert PdfFile(path).sizes == [(612, 792)]
        return
    for source, start in ((path, f"ask: {path}: "), (data, f"ask: document of {len(data)} bytes")):
        with pytest.raises(DocumentError, match=reason) as caught:
            chat.prepare(QUESTION, documents=Document(source), where="ask")
        assert str(caught.value).startswith(start) and "\n" not in str(caught.value)


def test_damage_anywhere_is_one_line():
    """Read as a server reads the bytes of a stranger."""
    outcomes = set()
    for data in damaged(PDF, 200):
        try:
            images, text = document_images(data, PROCESSOR)
            assert len(images) == text.count("<image>")
            outcomes.add("read")
        except (DocumentError, ImageError) as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_missing_files_and_libraries(tmp_path, monkeypatch, pdf):
    with pytest.raises(DocumentError, match=r"gone.pdf: .*No such file"):
        PdfFile(str(tmp_path / "gone.pdf"))
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(DocumentError, match=r"PDFs need pypdfium2: pip install -e '.\[documents\]"):
        PdfFile(pdf)


def test_limits_hold_before_pages_are_rendered():
    for limits, reason in [
        (Limits(max_bytes=500), "bytes are more than 500"),
        (Limits(max_pages=5), "6 pages are more than 5; choose some, such as 1-5"),
    ]:
        with pytest.raises(DocumentError, match=reason):
            OpenedDocument(Document(PDF), limits)
    assert UNTRUSTED.max_pages < Limits().max_pages and UNTRUSTED.max_bytes < Limits().max_bytes
    with pytest.raises(ValueError, match="dpi is 0; it must be from 1 to 4800"):
        Document(PDF, dpi=0)


# --- programs ------------------------------------------------------------------------------------


def test_infer_reads_documents(ask, pdf, capsys):
    out, err = ask(pdf=[pdf], pages=["2-4"], prompt=QUESTION, json=True)
    answer = json.loads(out)
    assert answer["plan"]["pages"] == [[2, 3, 4]] and len(answer["tiles"]) == 3
    assert "note: 3 pages of the document, at most 4 tiles an image, delta 1: " in err
    both = json.loads(ask(pdf=[pdf, pdf], pages=["1", "5-"], prompt=QUESTION, json=True).out)
    assert both["plan"]["pages"] == [[1], [5, 6]]
    assert "there is no page 9; it has 6" in fail(ask, pdf=[pdf], pages=["9"], prompt=QUESTION)
    with pytest.raises(SystemExit):
        ask(pages=["9"], prompt=QUESTION)
    assert "--pages is about --pdf; give that, too" in capsys.readouterr().err


def test_requests_with_documents(ask, pdf, tmp_path):
    rows = [
        {"prompt": QUESTION, "document": "a.pdf"},
        {"prompt": QUESTION, "document": {"path": "a.pdf", "pages": "2-3"}},
        {"prompt": QUESTION, "document": {"path": "a.pdf", "pages": "9"}},
    ]
    path, output = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "1 of 3 requests" in fail(ask, requests=str(path), output=str(output))
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [len(answer.get("tiles", ())) for answer in answers] == [6, 2, 0]
    assert "there is no page 9" in answers[2]["error"]
    assert answers[1]["document"] == rows[1]["document"]
    for row, reason in [
        ({"pdf": "a.pdf"}, "did you mean 'document'"),
        ({"document": "a.pdf", "pages": "2"}, "a key of the document"),
        ({"document": {"path": "a.pdf", "dpi": 0}}, "document: dpi is 0"),
    ]:
        path.write_text(json.dumps({"prompt": "x"} | row))
        assert reason in fail(ask, requests=str(path), output=str(tmp_path / "other.jsonl"))


def test_tokens_of_pages(capsys, pdf):
    assert tokens_main(["tokens", "--pdf", pdf, "--pages", "1,2", "--size", "1b", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in report["images"]] == [f"{pdf}, page 1", f"{pdf}, page 2"]
    assert [row["tiles"] for row in report["images"]] == [13, 13]  # 3 x 4 and 4 x 3
    assert tokens_main(["tokens", "--pdf", pdf, "--pages", "9"]) == 2
    assert "there is no page 9" in capsys.readouterr().err
