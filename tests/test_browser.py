"""The page in a real browser: a headless Chromium with its driver (`make test-browser`)."""

import json
import os
import pathlib
import shutil
import time

import pytest

from internvl3_jax import Critic, load
from internvl3_jax.inference.engine.engine import Engine
from internvl3_jax.serve import web
from tests.support.live_server import serving

pytestmark = pytest.mark.browser

MODEL = pathlib.Path(__file__).resolve().parents[1] / "examples" / "tiny_digits"
QUESTIONS = MODEL / "questions.jsonl"
# Where screenshots are written, if anywhere.
SCREENSHOTS = os.environ.get("SCREENSHOTS")


@pytest.fixture(scope="module")
def live():
    checkpoint = load(MODEL)
    engine = Engine.of(checkpoint, rows=4, max_length=1024)
    offered, critic = web.Page(web.read_examples(QUESTIONS)), Critic(checkpoint, engine.generator)
    with serving(
        engine, checkpoint=checkpoint, name="digits", page=offered, critic=critic
    ) as started:
        yield started


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    options.add_argument("--window-size=1280,900")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture
def page(live, browser):
    browser.get(f"{live.url}/")
    opened = Page(browser)
    opened.until(lambda: opened.all("#examples button"))
    yield opened
    # Nothing failed that the person does not see.
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


class Page:
    def __init__(self, driver):
        self.driver = driver

    def until(self, condition, seconds: float = 120.0):
        end = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < end, f"the page shows: {self.one('body').text}"
            time.sleep(0.05)
        return value

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str):
        return self.driver.find_element("css selector", selector)

    def shown(self, selector: str) -> bool:
        return self.one(selector).is_displayed()

    def set(self, name: str, value) -> None:
        """Changes a control as a person does."""
        script = """
            const input = document.getElementById(arguments[0]);
            if (input.type === "checkbox") input.checked = arguments[1];
            else input.value = arguments[1];
            for (const kind of ["input", "change"])
              input.dispatchEvent(new Event(kind, { bubbles: true }));"""
        self.driver.execute_script(script, name, value)

    def attach(self, *names: str) -> None:
        before = len(self.all(".attachment"))
        paths = "\n".join(str(MODEL / "pictures" / name) for name in names)
        self.one("#files").send_keys(paths)
        self.until(lambda: len(self.all(".attachment")) == before + len(names))
        self.until(lambda: self.shown("#counts"))

    def ask(self, question: str) -> None:
        self.one("#question").send_keys(question)
        self.one("#send").click()

    def answers(self) -> list[str]:
        """The texts of all answers, after the end of the last."""
        self.until(lambda: self.shown("#send") and not self.shown("#stop"))
        return [bubble.text for bubble in self.all(".answer .bubble")]

    def screenshot(self, name: str) -> None:
        if SCREENSHOTS:
            self.driver.save_screenshot(str(pathlib.Path(SCREENSHOTS) / f"{name}.png"))


def questions(task: str) -> dict:
    rows = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    return next(row for row in rows if row["task"] == task)


def test_an_image_is_read_and_a_second_question_finds_it(page):
    row = questions("read")
    page.attach(pathlib.Path(row["image"][0]).name)
    heads = [cell.text for cell in page.all("#counts th")]
    assert heads[:3] == ["tiles", "tokens", "positions at delta 1"]
    counts = [int(cell.text) for cell in page.all("#counts td")]
    assert counts[1] > 4 * counts[0] and counts[2] == counts[1] > counts[-1]
    page.screenshot("page_question")
    page.ask("Read the number.")
    assert page.answers() == [row["expected"]]
    assert page.all(".attachment") == []
    page.ask("How many digits are there?")
    first, second = page.answers()
    assert second == str(len(row["expected"]))
    note = page.all(".answer .note")[-1].text
    assert "(0 from the cache)" not in note and "from the cache" in note


def test_boxes_are_drawn_on_the_image(page):
    row = questions("locate")
    page.attach(pathlib.Path(row["image"][0]).name)
    before = _pixels(page, ".attachment canvas")
    assert before > 0
    page.ask(row["prompt"].removeprefix("<image>").strip())
    (text,) = page.answers()
    assert "<box>" in text
    canvas = page.until(lambda: page.all(".user canvas[data-shapes]"))[0]
    assert int(canvas.get_attribute("data-shapes")) >= 1
    # The first box is red, with its label.
    red = page.driver.execute_script(
        """
        const canvas = document.querySelector(".user canvas[data-shapes]");
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        let count = 0;
        for (let i = 0; i < data.length; i += 4)
          if (data[i] === 0xe6 && data[i + 1] === 0x19 && data[i + 2] === 0x4b) count += 1;
        return count;"""
    )
    assert red > 200
    page.screenshot("page_boxes")


def _pixels(page, selector: str) -> int:
    return page.driver.execute_script(
        f"const canvas = document.querySelector('{selector}'); return canvas.width * canvas.height"
    )


def test_an_answer_is_stopped(page):
    page.set("temperature", 2)
    page.set("max_tokens", 900)
    # A bias against nothing: at this temperature the answer is long.
    page.ask("Say something long.")
    page.until(lambda: page.shown("#stop") or page.all(".answer .note"))
    if page.shown("#stop"):
        page.one("#stop").click()
    page.until(lambda: page.shown("#send"))
    page.set("temperature", 0)
    # The next question is answered.
    page.one("#clear").click()
    page.attach("02_read.png")
    page.ask("Read the number.")
    assert page.answers() == ["456"]


def test_the_critic_marks_the_best_of_several_answers(page):
    page.set("n", 3)
    page.set("temperature", 0.8)
    page.set("best_of", True)
    page.attach("01_read.png")
    page.ask("Read the number.")
    assert len(page.answers()) == 3
    assert len(page.all(".answer.best")) == 1
    assert len(page.all(".answer .steps")) == 3
    scores = [float(note.text.split()[1].rstrip(",")) for note in page.all(".answer .note")]
    best = page.all(".answer").index(page.one(".answer.best"))
    assert scores[best] == max(scores)
    page.screenshot("page_best_of")


def test_an_example_fills_the_question(page):
    page.all("#examples button")[0].click()
    page.until(lambda: page.all(".attachment"))
    assert page.one("#question").get_attribute("value") == "Read the number."


def test_what_the_server_refuses_is_said(page):
    page.set("max_tokens", 100000)
    page.ask("hi")
    page.until(lambda: page.shown("#notice"))
    assert "max_completion_tokens" in page.one("#notice").text
    page.driver.get_log("browser")  # Chromium notes the status 400


def test_a_file_that_is_no_image_is_said(page, tmp_path):
    path = tmp_path / "note.png"
    path.write_text("no image")
    page.one("#files").send_keys(str(path))
    page.until(lambda: page.shown("#notice"))
    assert page.one("#notice").text == "note.png is not an image that this browser can open"


def test_a_pdf_and_a_video_are_asked_about(page, tmp_path):
    from PIL import Image

    from tests.support import documented_world

    images = [Image.open(MODEL / "pictures" / name) for name in ("01_read.png", "02_read.png")]
    images = [image.convert("RGB").resize((160, 80)) for image in images]
    images[0].save(tmp_path / "pages.pdf", save_all=True, append_images=images[1:])
    documented_world.video(tmp_path / "clip.mp4")
    for name in ("pages.pdf", "clip.mp4"):
        page.one("#clear").click()
        page.one("#files").send_keys(str(tmp_path / name))
        page.until(lambda: page.shown("#counts") or page.shown("#notice"))
        assert page.one("#notice").text == ""
        assert int(page.all("#counts td")[0].text) >= 2
        page.ask("How many digits are there?")
        (text,) = page.answers()
        assert text
