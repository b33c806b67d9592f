"""Videos and PDFs of requests become the prompts that `Chat` makes of them."""

import base64
import json

import numpy as np
import pytest

from internvl3_jax import Chat
from internvl3_jax.data.media.given import Document, Video
from internvl3_jax.serve.limits import Limits
from internvl3_jax.serve.media import Sources
from tests.support import documented_world, pdfs
from tests.support.live_server import checkpoint, data_url, scripted, serving, user
from tests.support.tiny_checkpoint import make_image

LIMIT = 32
IMAGE = make_image(40, 16, 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media").resolve()
    documented_world.video(folder / "clip.mp4")
    documented_world.pdf(folder / "paper.pdf")
    return folder


@pytest.fixture(scope="module")
def live(files):
    limits = Limits(new_tokens=LIMIT, frames=16, pages=4)
    with serving(scripted(), limits=limits, sources=Sources(roots=(files,))) as started:
        yield started
        assert started.service.budget.held == 0


@pytest.fixture(scope="module")
def chat():
    return Chat(checkpoint(), max_new_tokens=LIMIT)


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def video(url: str, **settings) -> dict:
    return {"type": "video_url", "video_url": {"url": url} | settings}


def file(data: str, **settings) -> dict:
    return {"type": "file", "file": {"file_data": data, "filename": "a.pdf"} | settings}


def image() -> dict:
    return {"type": "image_url", "image_url": {"url": data_url(IMAGE)}}


def prompt_of(live, content, **fields):
    response = live.post({"messages": user(content)} | fields)
    assert response.status == 200, response.data
    prompt = live.service.engine.tickets[-1].request.prompt
    assert response.json["usage"]["prompt_tokens"] == len(prompt.tokens)
    return prompt


def same(prompt, expected) -> None:
    np.testing.assert_array_equal(prompt.tokens, expected.tokens)
    np.testing.assert_array_equal(prompt.positions, expected.positions)
    assert prompt.runs == expected.runs
    for tiles, others in zip(prompt.tiles, expected.tiles, strict=True):
        np.testing.assert_array_equal(tiles, others)


def test_videos(live, chat, files):
    data = (files / "clip.mp4").read_bytes()
    url = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
    for content, question, settings in (
        ([video(url, num_frames=8), text("What?")], "What?", {"num_frames": 8}),
        ([text("What?"), video("clip.mp4", fps=1)], "What?", {"fps": 1}),
        (
            [video("clip.mp4", num_frames=4, clip=[2, 6], max_tiles=2), text("What?")],
            "What?",
            {"num_frames": 4, "clip": (2.0, 6.0), "tiles": 2},
        ),
        (
            [text("Now"), video("clip.mp4", num_frames=2), text("what?")],
            "Now\n<video>\nwhat?",
            {"num_frames": 2},
        ),
    ):
        same(prompt_of(live, content), chat.prepare(question, videos=[Video(data, **settings)]))


def test_documents(live, chat, files):
    data = (files / "paper.pdf").read_bytes()
    url = f"data:application/pdf;base64,{base64.b64encode(data).decode()}"
    for part, settings in (
        (file(url, pages="2-3"), {"pages": "2-3"}),
        (file("paper.pdf", pages=[1, 6], dpi=36), {"pages": [1, 6], "dpi": 36}),
    ):
        expected = chat.prepare("Sum up.", documents=[Document(data, **settings)])
        same(prompt_of(live, [part, text("Sum up.")]), expected)


def test_all_kinds_in_a_conversation(live, chat, files):
    """The second turn has a video, a PDF and an image; its deltas are its own."""
    clip, paper = (files / "clip.mp4").read_bytes(), (files / "paper.pdf").read_bytes()
    messages = [
        *user([image(), text("First?")]),
        {"role": "assistant", "content": "ok"},
        *user([video("clip.mp4", num_frames=2), file("paper.pdf", pages="1"), image(), text("?")]),
    ]
    response = live.post({"messages": messages, "delta": ["1/2", "1/4", "1/8", "1/16"]})
    assert response.status == 200, response.data
    prompt = live.service.engine.tickets[-1].request.prompt
    media = ([IMAGE], [Video(clip, num_frames=2)], [Document(paper, pages="1")])
    expected = chat.prepare("?", *media, delta=["1/4", "1/8", "1/16"])
    assert [len(tiles) for tiles in prompt.tiles[1:]] == [len(tiles) for tiles in expected.tiles]
    (start, count), *_ = prompt.runs
    steps = np.diff(prompt.positions)
    assert set(steps[start : start + count - 1]) == {128}
    assert steps[prompt.runs[1][0]] == 64


@pytest.mark.parametrize(
    "part, status, message",
    [
        (video("nothing.mp4"), 404, "cannot be read"),
        (video("data:image/png;base64,AAAA"), 400, "expected one such as video/mp4"),
        (video("data:video/mp4;base64,AAAA"), 400, ""),
        (video("clip.mp4", num_frames=0), 400, "from 1"),
        (video("clip.mp4", num_frames=17), 400, "17 frames are more than 16"),
        (video("clip.mp4", fps=0), 400, "fps is"),
        (video("clip.mp4", clip=[3]), 400, "[start, end]"),
        (video("clip.mp4", clip=[3, 1]), 400, "[start, end]"),
        (video("clip.mp4", clip=[900, 901]), 400, ""),
        (video("clip.mp4", frames=3), 400, "did you mean 'num_frames'"),
        (file("paper.pdf"), 400, "6 pages are more than 4"),
        (file("paper.pdf", pages="9"), 400, ""),
        (file("paper.pdf", pages="x"), 400, ""),
        (file("paper.pdf", dpi=0.5), 400, "from 1"),
        (file("clip.mp4"), 400, ""),
        (file("data:application/pdf;base64,AAAA"), 400, ""),
        (file("paper.pdf", file_id="1"), 400, "no files are stored"),
        ({"type": "file"}, 400, "file is missing"),
        ({"type": "video_url"}, 400, "video_url is missing"),
    ],
)
def test_refused(live, part, status, message):
    response = live.post({"messages": user([part, text("What?")])})
    assert response.status == status, response.data
    assert message in response.error["message"]
    assert "Traceback" not in json.dumps(response.error)


def test_a_damaged_or_encrypted_pdf(live):
    for data in (pdfs.encrypted_pdf(), b"%PDF-1.7\nbroken"):
        url = f"data:application/pdf;base64,{base64.b64encode(data).decode()}"
        response = live.post({"messages": user([file(url), text("What?")])})
        assert (response.status, response.error["code"]) == (400, "invalid_media")


def test_an_image_with_tiles_of_its_own_beside_a_video(live):
    content = [image(), video("clip.mp4", num_frames=2), text("What?")]
    content[0]["image_url"]["detail"] = "low"
    response = live.post({"messages": user(content)})
    assert response.status == 400 and "set max_tiles of the request" in response.error["message"]


def test_what_does_not_fit(files):
    """The frames of a video are chosen so that the engine has room for them."""
    limits = Limits(new_tokens=LIMIT, frames=64)
    engine = scripted(max_length=512)
    with serving(engine, limits=limits, sources=Sources(roots=(files,))) as live:
        prompt = prompt_of(live, [video("clip.mp4"), text("What?")])
        assert 1 < len(prompt.tiles) <= 32
        assert len(prompt.tokens) + LIMIT <= 512
        content = [video("clip.mp4", num_frames=64), text("What?")]
        refused = live.post({"messages": user(content)})
        assert (refused.status, refused.error["code"]) == (400, "context_length_exceeded")
