"""The frames that training and evaluation choose from a video, and that the images are those
frames.
"""

import numpy as np
import pytest

from internvl3_jax.data.media.video import (
    Footage,
    VideoError,
    draw_frames,
    middle_frames,
    read_frames,
    training_frames,
)
from tests.support.official_data import encoded, frame, numbers, write_video

FILE = Footage(30, 10.0, True)


def by_the_letter(total, count, rng):
    """The rule of training, one interval after the other."""
    parts = min(total, count)
    edges = [int(total * part / parts) for part in range(parts + 1)]
    chosen = []
    for start, end in zip(edges, edges[1:], strict=False):
        among = list(range(start, end - 1))  # the interval without its last frame
        if not among:
            chosen = sorted(rng.permutation(total)[:parts].tolist())
            break
        chosen.append(among)
    else:
        low, high = [a[0] for a in chosen], [a[-1] + 1 for a in chosen]
        chosen = rng.integers(low, high).tolist()
    while len(chosen) < count:
        chosen.append(chosen[-1])
    return chosen


@pytest.mark.parametrize("total", [1, 3, 8, 9, 17, 100, 3001])
@pytest.mark.parametrize("count", [1, 2, 8, 32])
def test_training_draws_by_the_rule(total, count):
    for seed in range(5):
        drawn = draw_frames(total, count, np.random.default_rng(seed))
        assert drawn == by_the_letter(total, count, np.random.default_rng(seed))
        assert (
            len(drawn) == count and drawn == sorted(drawn) and 0 <= drawn[0] and drawn[-1] < total
        )


def test_every_frame_but_an_intervals_last_is_drawn():
    drawn = {
        index for seed in range(300) for index in draw_frames(20, 4, np.random.default_rng(seed))
    }
    assert drawn == set(range(20)) - {4, 9, 14, 19}


def test_the_number_of_frames_is_uniform():
    counts = [len(training_frames(FILE, np.random.default_rng(seed), 2, 5)) for seed in range(400)]
    assert set(counts) == {2, 3, 4, 5} and min(np.bincount(counts)[2:]) > 60


def test_only_files_repeat_their_last_frame():
    rng = np.random.default_rng(0)
    assert training_frames(Footage(3, 10.0, True), rng, 8, 8) == [0, 1, 2, 2, 2, 2, 2, 2]
    assert training_frames(Footage(3, None, False), rng, 8, 8) == [0, 1, 2]


def test_a_clip_is_in_seconds():
    for seed in range(20):
        drawn = training_frames(FILE, np.random.default_rng(seed), 4, 4, [1.0, 2.0])
        assert all(10 <= index < 20 for index in drawn)
    # ends with the video
    assert max(training_frames(FILE, np.random.default_rng(0), 8, 8, [2.5, 9])) < 30


@pytest.mark.parametrize("clip", [[3.5, 4.0], [1.0, 1.0], [-1, 2], [1], "0-1", [0, "1"]], ids=str)
def test_wrong_clips(clip):
    with pytest.raises(VideoError, match="clip"):
        training_frames(FILE, np.random.default_rng(0), 4, 4, clip)
    with pytest.raises(VideoError, match="frame rate is unknown"):
        training_frames(Footage(30, None, False), np.random.default_rng(0), 4, 4, [0, 1])


def test_evaluation_takes_the_middle_of_each_segment():
    for total, count in [(30, 8), (31, 8), (5, 8), (1, 4), (1000, 16)]:
        segment = (total - 1) / count
        expected = [int(segment / 2 + np.round(segment * k)) for k in range(count)]
        assert middle_frames(Footage(total, 10.0, True), count) == expected
        assert max(expected) < total
    assert middle_frames(FILE, 2, [1, 2]) == [12, 17]
    assert middle_frames(FILE, 2, [1, 99]) == [14, 24]
    with pytest.raises(VideoError, match="after the end"):
        middle_frames(FILE, 2, [5, 6])


def test_a_video_file_gives_the_frames_asked_for(tmp_path):
    path = write_video(tmp_path / "a.mp4", 40)
    seen = []

    def choose(footage):
        seen.append(footage)
        return [3, 0, 13, 39, 13, 25]

    images = read_frames(str(path), choose)
    assert numbers(images) == [3, 0, 13, 39, 13, 25]
    assert (seen[0].total, seen[0].fps, seen[0].repeats) == (40, 10.0, True)
    everything = read_frames(str(path), lambda footage: range(footage.total))
    assert numbers(everything) == list(range(40))
    # Jumping to key frames gives the same pixels as decoding from the beginning, and bytes the same
    # as a path.
    for index, jumped in zip([3, 0, 13, 39, 13, 25], images, strict=True):
        np.testing.assert_array_equal(np.asarray(jumped), np.asarray(everything[index]))
    from_bytes = read_frames(path.read_bytes(), lambda footage: [25])
    np.testing.assert_array_equal(np.asarray(from_bytes[0]), np.asarray(everything[25]))


@pytest.mark.parametrize("ending", ["mkv", "avi", "h264"])
def test_other_containers(tmp_path, ending):
    """avi and raw streams have no times of their own."""
    path = write_video(tmp_path / f"a.{ending}", 30)
    assert numbers(read_frames(str(path), lambda footage: [29, 2, 17])) == [29, 2, 17]


def test_a_folder_of_frames_in_order_of_their_numbers(tmp_path):
    for number in range(12):
        frame(number).save(tmp_path / f"frame_{number}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    assert numbers(read_frames(str(tmp_path), lambda footage: range(footage.total))) == list(
        range(12)
    )


def test_a_gif(tmp_path):
    path = tmp_path / "a.gif"
    frames = [frame(number) for number in range(6)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=200)
    seen = []
    images = read_frames(str(path), lambda footage: seen.append(footage) or [5, 1])
    assert numbers(images) == [5, 1] and seen[0].total == 6 and seen[0].fps == pytest.approx(5)
    assert numbers(read_frames(path.read_bytes(), lambda footage: [2], name="a.gif")) == [2]


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_damaged_videos_are_named(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(VideoError, match=f"{name}: no such file"):
        read_frames(str(path), lambda footage: [0])
    path.write_bytes(b"nothing to see here" * 20)
    with pytest.raises(VideoError, match=name):
        read_frames(str(path), lambda footage: [0])
    whole = (
        write_video(tmp_path / "whole.mp4", 10).read_bytes()
        if name == "a.mp4"
        else encoded(frame(1), "GIF")
    )
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VideoError, match=name):
        read_frames(str(path), lambda footage: [footage.total - 1])


def test_an_empty_folder_and_frames_that_do_not_exist(tmp_path):
    with pytest.raises(VideoError, match="holds no images"):
        read_frames(str(tmp_path), lambda footage: [0])
    frame(0).save(tmp_path / "0.png")
    with pytest.raises(VideoError, match=r"frames \[7\] were asked of 1"):
        read_frames(str(tmp_path), lambda footage: [7])
