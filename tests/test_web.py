"""The page's files and calls, without a browser; tests/test_browser.py has one."""

import json
import pathlib
import re

import pytest

from internvl3_jax import Critic, load
from internvl3_jax.config import UNITS
from internvl3_jax.data.media.tiles import cut_tiles
from internvl3_jax.inference.engine.engine import Engine
from internvl3_jax.inference.generator import ContextError
from internvl3_jax.positions import build_positions
from internvl3_jax.serve import arguments, web
from internvl3_jax.serve.limits import Limits
from tests.support import tiny_checkpoint
from tests.support.live_server import checkpoint, parts, scripted, serving, user
from tests.support.tiny_checkpoint import make_image

ROOT = pathlib.Path(__file__).resolve().parents[1]
QUESTIONS = ROOT / "examples" / "tiny_digits" / "questions.jsonl"
WIDE, SMALL = make_image(40, 16, 1), make_image(16, 16, 2)
VIDEO = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}


@pytest.fixture(scope="module")
def page():
    engine = Engine.of(checkpoint(), rows=4, max_length=512)
    critic = Critic(load(tiny_checkpoint.directory()), engine.generator)
    offered = web.Page(web.read_examples(QUESTIONS))
    with serving(engine, page=offered, critic=critic) as live:
        yield live


def test_the_page_needs_nothing_from_elsewhere(page):
    """Every file is of this server, and may load nothing from another one."""
    names = [name for name in web.FILES if name != "index.html"]
    index = page.get("/")
    texts = {"/": index.data.decode()}
    for name in names:
        answer = page.get(f"/page/{name}")
        kind = "text/css" if name.endswith(".css") else "text/javascript"
        assert answer.status == 200 and answer.headers["Content-Type"].startswith(kind)
        texts[name] = answer.data.decode()
    assert "default-src 'self'" in index.headers["Content-Security-Policy"]
    for text in texts.values():
        assert not re.findall(r"(?:https?:)?//(?!\s)[a-z0-9.]+\.[a-z]{2,}", text)
    linked = re.findall(r'(?:src|href)="page/([^"]+)"', texts["/"])
    imported = re.findall(r'from "\./([^"]+)"', "".join(texts.values()))
    assert set(linked) | set(imported) == set(names)
    # The scripts find their elements.
    used = set(re.findall(r'\$\("(\w+)"\)', texts["app.js"]))
    assert used <= set(re.findall(r'id="(\w+)"', texts["/"]))


def test_other_files_are_not_served(page):
    for path in ("/page/web.py", "/page/..%2Fweb.py", "/page/examples/99", "/page/examples/-1"):
        assert page.get(path).status in (404, 400, 422), path
    assert "it has index.html" in page.get("/page/nothing.js").error["message"]


def test_the_page_knows_the_server(page):
    settings = page.get("/page/settings.json").json
    assert settings["models"] == ["tiny"] and settings["delta"] == "1"
    assert settings["max_tiles"] == 4 and settings["has_critic"] is True
    assert settings["deltas"][0] == "1" and settings["deltas"][-1] == "1/256"
    for example in settings["examples"]:
        assert example["question"] and page.get(f"/{example['image']}").data[:4] == b"\x89PNG"


def test_counts_are_those_of_the_prompt(page):
    body = {"messages": user(parts("Which is larger?", WIDE, SMALL)), "max_tiles": 3}
    counts = page.post(body, "/v1/internvl/count").json
    processor = checkpoint().processor
    tiles = [len(cut_tiles(image, processor, 3)) for image in (WIDE, SMALL)]
    assert [image["tiles"] for image in counts["images"]] == tiles == [4, 1]
    assert counts["images"][0] == {"columns": 3, "rows": 1, "tiles": 4}
    asked = page.post(body | {"max_tokens": 1}).json
    assert counts["prompt_tokens"] == asked["usage"]["prompt_tokens"]
    text = counts["prompt_tokens"] - 4 * sum(tiles)
    assert [entry["chosen"] for entry in counts["positions"]] == [True] + 6 * [False]
    assert counts["positions"][0]["last"] == counts["prompt_tokens"]
    # At 1/256 an image takes one position, rounded up at its end.
    assert text < counts["positions"][-1]["last"] <= text + 2 * len(tiles)


def test_positions_under_each_delta():
    prompt_length, runs = 30, [(5, 12)]
    last = [int(build_positions(prompt_length, runs, [UNITS // d])[-1]) for d in (1, 2, 4)]
    assert last == sorted(last, reverse=True) and last[0] == 29 * UNITS


def sampled() -> dict:
    messages = user(parts("Read the number.", SMALL))
    return {"messages": messages, "temperature": 1.0, "seed": 3, "max_tokens": 8}


def test_the_critic_chooses(page):
    body = sampled() | {"n": 3}
    choice = page.post(body, "/v1/internvl/best_of").json
    plain = page.post(body).json
    texts = [one["message"]["content"] for one in plain["choices"]]
    assert [candidate["text"] for candidate in choice["candidates"]] == texts
    critic = Critic(load(tiny_checkpoint.directory()))
    scores = critic.score("Read the number.", [SMALL], texts)
    for candidate, expected in zip(choice["candidates"], scores, strict=True):
        assert candidate["score"] == pytest.approx(expected.score, abs=1e-5)
        assert candidate["steps"] == expected.steps
    totals = [candidate["score"] for candidate in choice["candidates"]]
    assert choice["best"] == totals.index(max(totals))


def test_the_critics_best_answers_are_returned(page):
    candidates = page.post(sampled() | {"n": 4}, "/v1/internvl/best_of").json["candidates"]
    answer = page.post(sampled() | {"n": 2, "best_of": 4}).json
    expected = sorted(candidates, key=lambda candidate: -candidate["score"])[:2]
    assert len({candidate["text"] for candidate in candidates}) > 2
    for index, (choice, candidate) in enumerate(zip(answer["choices"], expected, strict=True)):
        assert choice["index"] == index
        assert choice["message"]["content"] == candidate["text"]
        assert choice["critic"]["score"] == pytest.approx(candidate["score"], abs=1e-5)
        assert choice["critic"]["steps"] == candidate["steps"]
    # All four were generated; as many as are asked for are not chosen among.
    plain = page.post(sampled() | {"n": 4}).json
    assert answer["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]
    assert page.post(sampled() | {"n": 4, "best_of": 4}).json["choices"] == plain["choices"]


def test_the_critic_takes_one_question(page):
    messages = [*user("a"), {"role": "assistant", "content": "b"}, *user("c")]
    answer = page.post({"messages": messages, "n": 2}, "/v1/internvl/best_of")
    assert answer.status == 400 and "one question" in answer.error["message"]
    for change in ({"messages": messages}, {"messages": user([VIDEO])}):
        answer = page.post({"best_of": 2, "temperature": 1.0} | change)
        assert answer.status == 400 and "the critic" in answer.error["message"]
    # Without a question to the critic, a conversation is answered.
    assert page.post({"messages": messages, "best_of": 1, "max_tokens": 2}).status == 200


def test_an_answer_that_the_critic_cannot_read_is_said(page, monkeypatch):
    def refuse(*_):
        raise ContextError("solution 1 has 9,999 tokens")

    monkeypatch.setattr(page.service.critic._critic, "score", refuse)
    body = {"messages": user("hi"), "best_of": 2, "temperature": 1.0, "max_tokens": 2}
    answer = page.post(body)
    assert answer.status == 400 and "solution 1 has 9,999" in answer.error["message"]


def test_a_server_without_a_page_or_critic():
    with serving(scripted()) as live:
        assert live.get("/").status == 404
        assert live.post({"messages": user("hi")}, "/v1/internvl/count").status == 404
    with serving(scripted(), page=web.Page()) as live:
        answer = live.post({"messages": user("hi")}, "/v1/internvl/best_of")
        assert answer.status == 404 and "--critic" in answer.error["message"]


def test_limits_and_the_key_hold_for_the_page():
    limits = Limits(images=1)
    body = {"messages": user(parts("?", SMALL, SMALL))}
    with serving(scripted(), page=web.Page(), limits=limits, api_key="secret") as live:
        for path in ("/v1/internvl/count", "/v1/internvl/best_of"):
            assert live.post(body, path).status == 401
        key = {"Authorization": "Bearer secret"}
        assert "1 (--max_images)" in live.post(body, "/v1/internvl/count", **key).error["message"]
        # The page itself has no secrets.
        assert live.get("/").status == 200


def test_examples_are_read_from_a_file(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"prompt": "What?", "image": "no.png"}) + "\n")
    with pytest.raises(ValueError, match="line 1: .*no.png does not exist"):
        web.read_examples(path)
    path.write_text(json.dumps({"prompt": "What?"}) + "\n")
    with pytest.raises(ValueError, match="no line with a prompt and one image"):
        web.read_examples(path)


def test_options_of_the_page_need_the_page(capsys):
    with pytest.raises(SystemExit):
        arguments.parse(["--checkpoint=DIR", "--web_examples=FILE"])
    assert "--web_examples is about --web" in capsys.readouterr().err
