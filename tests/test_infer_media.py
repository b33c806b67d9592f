"""Videos in infer.py, in its requests, and in the program that counts tokens."""

import json
import re

import pytest

from internvl3_jax.data.text.media_tags import frame_lines
from internvl3_jax.data.tokens import main as tokens_main
from tests.support.infer_flags import fail
from tests.support.official_data import write_video
from tests.support.tiny_checkpoint import make_image

QUESTION = "What moves?"


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder with long.mp4 (40 frames, 10 a second) and short.mp4 (6)."""
    folder = tmp_path_factory.mktemp("clips")
    write_video(folder / "long.mp4", 40)
    write_video(folder / "short.mp4", 6)
    return folder


def refused(ask, capsys, **values) -> str:
    """Returns the message of wrong flags (status 2, on stderr) or of wrong inputs."""
    with pytest.raises(SystemExit) as stopped:
        ask(**values)
    return capsys.readouterr().err if stopped.value.code == 2 else stopped.value.code


def test_infer_says_what_it_shows(ask, clips, capsys):
    settings = {"video": [str(clips / "long.mp4"), str(clips / "short.mp4")], "prompt": QUESTION}
    out, err = ask(**settings, num_frames=3, json=True)
    answer = json.loads(out)
    assert answer["tiles"] == [1] * 6 and answer["plan"]["frames"] == [[3, 40], [3, 6]]
    assert "note: 3 of 40 frames of video 1, 3 of 6 frames of video 2, delta 1: " in err
    assert answer["plan"]["tokens"] == answer["prompt_tokens"]
    clip = json.loads(ask(**settings, clip=["1-2", "0-0.4"], fps=5, json=True).out)
    assert clip["plan"]["frames"] == [[5, 40], [2, 6]]
    assert "cache has room" in ask(**settings, cache_gib=0.001).err
    for flags, reason in [
        ({"clip": ["3"]}, "--clip is '3'; write START-END"),
        ({"clip": ["0-1"] * 3}, "3 --clip for 2 inputs"),
        ({"delta": ["1", "1/2", "1/4"]}, "3 deltas for 2 images"),
        ({"prompt": "<video>"}, "2 videos, but 1 <video> tags in --prompt"),
        ({"frame_label": "x"}, "--frame_label: .*must have {} once"),
        ({"best_of": 2, "majority": True}, "--best_of takes images alone"),
        ({"prompt": None}, "--video and --pdf need --prompt"),
        ({"video": [], "fps": 2.0}, "--fps is about --video"),
        ({"video": ["gone.mp4"]}, "gone.mp4: no such file"),
        ({"cache_gib": 1e-5}, "the prompt does not fit: .*cache has room for"),
        ({"cache_gib": -1.0}, "cache_gib is -1.0; it must be above 0"),
    ]:
        assert re.search(reason, refused(ask, capsys, **settings | flags)), flags
    assert "no video for <video>: it is sent" in ask(prompt="<video>").err


def test_requests_with_videos(ask, clips):
    rows = [
        {"prompt": QUESTION, "video": "long.mp4"},
        {"prompt": "hi"},
        {"prompt": QUESTION, "video": [{"path": "long.mp4", "clip": [1, 2], "num_frames": 2}]},
        {"prompt": QUESTION, "video": "gone.mp4"},
    ]
    path, output = clips / "requests.jsonl", clips / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"requests": str(path), "output": str(output), "num_frames": 4}
    assert "1 of 4 requests could not be answered" in fail(ask, **settings)
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [len(answer.get("tiles", ())) for answer in answers] == [4, 0, 2, 0]
    assert "gone.mp4: no such file" in answers[3]["error"]
    assert answers[2]["video"] == rows[2]["video"] and len(answers[0]["image_sha256"]) == 1
    assert answers[2]["plan"]["frames"] == [[2, 40]]
    # Another video under the name is not taken for the one that was answered.
    write_video(clips / "long.mp4", 39)
    assert "was answered for another image" in fail(ask, **settings)
    write_video(clips / "long.mp4", 40)
    for row, reason in [
        ({"video": 3}, "video is the number 3"),
        ({"video": {"path": "a", "clips": 1}}, "unknown key 'clips' of video; did you mean 'clip'"),
        ({"video": {"path": "a", "num_frames": 0}}, "video: num_frames is 0"),
        ({"videos": "a"}, "did you mean 'video'"),
        ({"video": {"clip": [0, 1]}}, "expected a path, an object with path"),
    ]:
        path.write_text(json.dumps({"prompt": "x"} | row))
        assert reason in fail(ask, **settings)


def test_the_program_that_counts_tokens(capsys, clips, tokenizer, tmp_path):
    make_image(1600, 1200).save(tmp_path / "a.png")
    arguments = ["tokens", str(tmp_path / "a.png"), "--video", str(clips / "long.mp4")]
    assert tokens_main([*arguments, "--json", "--text_tokens", "0", "--size", "1b"]) == 0
    report = json.loads(capsys.readouterr().out)
    # The text of the labels, by the tokenizer itself.
    text = "<image>\n" + frame_lines(32, "Frame-{}: ")
    count = len(tokenizer.encode(text.replace("<image>", "<img>")))
    assert report["prompt_tokens"] == (13 + 32) * 256 + 33 + count - 1
    assert report["plan"]["frames"] == [[32, 40]] and report["plan"]["delta"] == "1"
    assert tokens_main([*arguments, "--num_frames", "300", "--size", "8b"]) == 0
    out = capsys.readouterr().out
    assert "long.mp4, 300 frames" in out and "delta 1/4" in out and "delta reduced to fit" in out
    assert tokens_main([*arguments, "--num_frames", "300", "--delta", "1"]) == 2
    assert "the prompt does not fit" in capsys.readouterr().err
