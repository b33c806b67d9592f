"""Videos in questions: the frames and ids of InternVL's quick start and of transformers' processor,
through Chat, infer.py, its requests, and the program that counts tokens.
"""

import types

import numpy as np
import pytest

from internvl3_jax import Chat, load
from internvl3_jax.config import UNITS, ProcessorConfig
from internvl3_jax.data.batch import make_prompt
from internvl3_jax.data.boxes import ShownImage
from internvl3_jax.data.media.given import Limits, Video
from internvl3_jax.data.media.images import ImageError
from internvl3_jax.data.media.inputs import OpenedVideo, video_images
from internvl3_jax.data.media.video import Footage, VideoError, middle_frames, probe, read_frames
from internvl3_jax.data.text.chat_template import ChatError
from internvl3_jax.data.text.media_tags import frame_lines, place_media
from internvl3_jax.positions import next_position
from tests.support import tiny_checkpoint
from tests.support.official_data import frame, numbers, write_video
from tests.support.pdfs import damaged
from tests.support.tiny_checkpoint import PROCESSOR, make_image

QUESTION = "What moves?"


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder with long.mp4 (40 frames, 10 a second), short.mp4 (6) and a.gif (5)."""
    folder = tmp_path_factory.mktemp("clips")
    write_video(folder / "long.mp4", 40)
    write_video(folder / "short.mp4", 6)
    frames = [frame(number) for number in range(5)]
    frames[0].save(folder / "a.gif", save_all=True, append_images=frames[1:], duration=200)
    return folder


@pytest.fixture(scope="module")
def chat():
    return Chat(load(tiny_checkpoint.directory()), max_new_tokens=4)


# --- frames --------------------------------------------------------------------------------------


def official_indices(bound, fps, total, num_segments):
    """The rule of `get_index` in InternVL's quick start, index by index."""
    first, last = 0, total - 1
    if bound:
        first = max(0, round(bound[0] * fps))
        last = min(round(bound[1] * fps), last)
    length = float(last - first) / num_segments
    return [int(first + length / 2 + np.round(length * k)) for k in range(num_segments)]


def test_frames_are_those_of_the_quick_start():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        total, count = int(rng.integers(1, 5000)), int(rng.integers(1, 65))
        fps = float(rng.choice([10, 23.976, 25, 29.97, 30, 60]))
        bound = None
        if rng.random() < 0.5:
            start = float(rng.random() * total / fps * 0.9)
            bound = [start, start + 0.1 + float(rng.random() * total / fps)]
        footage = Footage(total, fps, True)
        try:
            ours = middle_frames(footage, count, bound)
        except VideoError:
            assert round(bound[0] * fps) > total - 1
            continue
        assert ours == official_indices(bound, fps, total, count)


def shown(clips, name="long.mp4", **settings):
    opened = OpenedVideo(Video(str(clips / name), **settings))
    return numbers(opened.images(PROCESSOR, 1, opened.frames)), opened


def test_the_number_of_frames(clips):
    frames, opened = shown(clips, num_frames=8)
    assert frames == official_indices(None, 10, 40, 8) and opened.is_fixed
    # A short video repeats frames if their number was asked for, as in the quick start.
    assert shown(clips, "short.mp4", num_frames=8)[0] == official_indices(None, 10, 6, 8)
    frames, opened = shown(clips, "short.mp4")
    assert frames == official_indices(None, 10, 6, 6) and not opened.is_fixed
    assert len(shown(clips)[0]) == 32
    # Frames per second give their number; the segments stay the rule.
    assert shown(clips, fps=2)[0] == official_indices(None, 10, 40, 8)
    assert shown(clips, fps=2, num_frames=5)[0] == official_indices(None, 10, 40, 5)
    assert shown(clips, fps=2, clip=(1, 3))[0] == official_indices([1, 3], 10, 40, 4)
    assert shown(clips, clip=(1, 3), num_frames=3)[0] == official_indices([1, 3], 10, 40, 3)
    assert len(shown(clips, clip=(1, 2))[0]) == 11
    assert shown(clips, "a.gif", num_frames=3)[0] == official_indices(None, 5, 5, 3)


def test_a_probe_decodes_nothing(clips, monkeypatch):
    from internvl3_jax.data.media import video_file

    monkeypatch.setattr(video_file.VideoFile, "_image", None)
    assert probe(str(clips / "long.mp4")) == Footage(40, 10.0, True)
    assert probe((clips / "a.gif").read_bytes(), "a.gif").total == 5


# --- text and ids --------------------------------------------------------------------------------


def test_a_video_is_the_same_as_its_frames(chat, clips):
    """Ids, tiles and answer are those of a question with the frames as images."""
    path = str(clips / "long.mp4")
    frames = read_frames(path, lambda footage: official_indices(None, 10, 40, 5))
    text = "".join(f"Frame-{n}: <image>\n" for n in range(1, 6)) + QUESTION
    by_frames = chat.prepare(text, frames, max_tiles=1)
    for question in (QUESTION, f"<video>\n{QUESTION}", f"<video>{QUESTION}"):
        prompt = chat.prepare(question, videos=Video(path, 5))
        assert prompt.tokens.tolist() == by_frames.tokens.tolist()
        assert (prompt.positions == by_frames.positions).all()
        assert all(map(np.array_equal, prompt.tiles, by_frames.tiles))
    assert prompt.plan.frames == ((5, 40),) and by_frames.plan is None
    assert prompt.plan.tokens == len(prompt.tokens)
    chat.reset()
    assert chat(QUESTION, videos=Video(path, 5)) == chat.answer_many([by_frames])[0].text
    assert chat.last.plan == prompt.plan and chat.last.tiles == [1] * 5
    assert chat.shown == [[ShownImage(64, 48, f"Frame-{n}") for n in range(1, 6)]]


def test_ids_of_transformers_processor(tokenizer, transformers_tokenizer):
    """Its text for videos, with the label of its processor; the template puts <video>\\n."""
    from transformers.models.internvl.processing_internvl import InternVLProcessor

    processor = ProcessorConfig(
        image_size=16, tokens_per_tile=3, system_message=None, frame_label="Frame{}: "
    )
    them = types.SimpleNamespace(
        start_image_token="<img>",
        end_image_token="</img>",
        image_token="<IMG_CONTEXT>",
        image_seq_length=3,
    )
    question, videos = "<video>\nFirst.\n<video>\nWhich is longer?", (2, 12)
    theirs = question
    for index in range(2):
        frames = {"pixel_values_videos": [np.zeros((count, 3, 16, 16)) for count in videos]}
        lines = InternVLProcessor.replace_video_token(them, frames, index)
        theirs = theirs.replace("<video>", lines, 1)
    theirs = f"<|im_start|>user\n{theirs}<|im_end|>\n<|im_start|>assistant\n"

    lines = [frame_lines(count, processor.frame_label) for count in videos]
    text, places = place_media(question, 0, lines, [])
    tiles = [np.zeros((1, 16, 16, 3), np.uint8)] * sum(videos)
    messages = [{"role": "user", "content": text}]
    prompt = make_prompt(messages, tiles, tokenizer, processor, [256] * sum(videos))
    assert places == [("video", 0), ("video", 1)]
    assert prompt.tokens.tolist() == transformers_tokenizer(theirs).input_ids


def test_where_media_are_placed():
    video = [frame_lines(2, "Frame{}: ")]
    frames = "Frame1: <image>\nFrame2: <image>\n"
    place = place_media
    # Without tags: images, videos, documents, then the text.
    assert place("Q", 0, video, []) == (f"{frames}Q", [("video", 0)])
    assert place("Q", 0, [], [1]) == ("<image>\nQ", [("document", 0)])
    assert place("Q", 0, [], [2])[0] == "Image-1: <image>\nImage-2: <image>\nQ"
    text, places = place("Q", 1, video, [2])
    assert text == f"Image-1: <image>\n{frames}Image-2: <image>\nImage-3: <image>\nQ"
    assert places == [("image", 0), ("video", 0), ("document", 0)]
    # At their tags, in any order.
    text, places = place("a <document>b <image> c <video>\n\nd", 1, video, [2])
    assert text == f"a Image-2: <image>\nImage-3: <image>\nb <image> c {frames}\nd"
    assert places == [("document", 0), ("image", 0), ("video", 0)]
    # More tags than inputs are text, as <image> is without images.
    assert place("<video>x<video>", 0, video, [])[0] == f"{frames}x<video>"
    assert place("x<document>", 0, video, [])[0] == f"{frames}x<document>"
    with pytest.raises(ChatError, match=r"2 videos, but 1 <video> tags; write one for each"):
        place("<video>", 0, video * 2, [])
    with pytest.raises(ChatError, match=r"at: 0 images, but one <image> more before the place"):
        place("<image> <video>", 0, video, [], "at")
    assert place("<video> <image>", 0, video, [])[0] == f"{frames} <image>"


def test_a_video_in_a_conversation(chat, clips):
    """A later turn with an image, tags that are text, and taking it back."""
    chat.reset()
    chat("How many digits?", images=[make_image(16, 16)])
    chat("<video>\nAnd here, in SVG's <image>?", videos=[str(clips / "short.mp4")])
    assert chat.last.tiles == [1] * 7 and chat.last.reused_tokens > 0
    assert len(chat.deltas) == 7 and [len(shown) for shown in chat.shown] == [1, 6]
    chat("And now?", images=[make_image(40, 16)])
    assert chat.last.tiles == [1] * 7 + [4]
    chat.undo()
    chat.undo()
    assert len(chat.tiles) == len(chat.shown) == 1
    chat.reset()


def test_the_label_is_the_checkpoints_or_as_asked(chat, clips):
    path = str(clips / "short.mp4")
    chat.reset()
    chat(QUESTION, videos=Video(path, 2, label="Frame{}: "))
    assert chat.messages[0]["content"] == f"Frame1: <image>\nFrame2: <image>\n{QUESTION}"
    _, text = video_images(Video(path, 2), ProcessorConfig())
    assert text == "Frame-1: <image>\nFrame-2: <image>\n"
    with pytest.raises(ValueError, match="must have {} once"):
        Video(path, label="Frame: ")


def test_frames_of_several_tiles_have_thumbnails(chat, clips):
    prompt = chat.prepare(QUESTION, videos=Video(str(clips / "short.mp4"), 2, tiles=4))
    alone = chat.prepare("<image>", [frame(0)], max_tiles=4)
    assert [len(tiles) for tiles in prompt.tiles] == [len(alone.tiles[0])] * 2 != [1, 1]
    last = next_position(prompt.positions) // UNITS + chat.options.max_new_tokens
    assert (prompt.plan.tokens, prompt.plan.position) == (len(prompt.tokens), last)


def test_one_delta_for_each_input(chat, clips):
    path = str(clips / "short.mp4")
    prompt = chat.prepare(QUESTION, [make_image(16, 16)], Video(path, 2), delta=["1", "1/4"])
    steps = [np.diff(prompt.positions[start : start + 2])[0] for start, _ in prompt.runs]
    assert steps == [256, 64, 64] and prompt.plan.delta == ("1", "1/4")
    with pytest.raises(ChatError, match="2 deltas for 3 images; .*a video or document counts as"):
        chat.prepare(QUESTION, [], [path] * 3, delta=["1", "1/4"])


def test_a_smaller_delta_is_the_batchs_too(chat, clips):
    """A plan with a delta below 1 answers alike alone and among others."""
    language = chat.generator.config.language
    many = Video(str(clips / "long.mp4"), 120)
    prompt = chat.prepare(QUESTION, videos=many)
    assert prompt.plan.changed == ("delta",) and prompt.plan.position <= language.max_position
    (alone,), (together, _) = chat.answer_many([prompt]), chat.answer_many([prompt, ("hi", [])])
    assert alone.token_ids == together.token_ids


# --- limits and errors ---------------------------------------------------------------------------


def test_limits_hold_before_frames_are_decoded(clips, monkeypatch):
    from internvl3_jax.data.media import inputs

    monkeypatch.setattr(inputs, "read_frames", None)
    path, data = str(clips / "long.mp4"), (clips / "long.mp4").read_bytes()
    for limits, reason in [
        (Limits(max_bytes=100), r"bytes are more than 100"),
        (Limits(max_seconds=3), r"4 s are more than 3"),
        (Limits(max_video_frames=39), r"has more than 39 frames"),
        (Limits(max_pixels=64 * 47), r"64 x 48 pixels are more than 3,008"),
        (Limits(max_frames=7), r"8 frames are more than 7"),
    ]:
        for source in (path, data):
            with pytest.raises(ValueError, match=reason):
                OpenedVideo(Video(source, 8), limits)
    assert OpenedVideo(Video(path), Limits(max_frames=7)).frames == 7


@pytest.mark.parametrize("name", ["cut.mp4", "text.mp4", "gone.mp4", "empty.mp4"])
def test_damaged_videos_are_one_line(chat, clips, tmp_path, name):
    data = {"cut.mp4": (clips / "long.mp4").read_bytes()[:900], "text.mp4": b"no" * 99}
    if name != "gone.mp4":
        (tmp_path / name).write_bytes(data.get(name, b""))
    with pytest.raises(VideoError, match=f"^ask: .*{name}: ") as caught:
        chat.prepare(QUESTION, videos=str(tmp_path / name), where="ask")
    assert "\n" not in str(caught.value)


def test_damage_anywhere_is_one_line(clips):
    """Read as a server reads the bytes of a stranger. Frames of a damaged part may be replaced."""
    outcomes = set()
    for data in damaged((clips / "long.mp4").read_bytes(), 200):
        try:
            images, text = video_images(Video(data, 3), PROCESSOR)
            assert len(images) == text.count("<image>") == 3
            outcomes.add("read")
        except (VideoError, ImageError) as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_what_a_video_can_be(chat, clips):
    expected = chat.prepare(QUESTION, videos=Video(str(clips / "short.mp4"))).tokens.tolist()
    with open(clips / "short.mp4", "rb") as file:
        for source in (clips / "short.mp4", file, bytearray((clips / "short.mp4").read_bytes())):
            assert chat.prepare(QUESTION, videos=[source]).tokens.tolist() == expected
    with pytest.raises(ChatError, match="videos is 3; give one or a list: paths, bytes, or a Vid"):
        chat.prepare(QUESTION, videos=3)
    with pytest.raises(ValueError, match=r"video is of type Image; .*frames as images"):
        chat.prepare(QUESTION, videos=[frame(1)])
    with pytest.raises(ValueError, match=r"document is of type int; give a path or the bytes"):
        chat.prepare(QUESTION, documents=[3])


def test_settings_out_of_range():
    for settings in ({"num_frames": 0}, {"num_frames": 1.5}, {"fps": 0}, {"tiles": True}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} is "):
            Video("a.mp4", **settings)
