"""Video files as phones, recorders and damage leave them: upright frames, the same pixels whatever is
drawn, or an error.
"""

import os
import struct

import numpy as np
import pytest
from PIL import Image

from internvl3_jax.data.media.images import ImageError
from internvl3_jax.data.media.video import VideoError, read_frames, training_frames
from tests.support.official_data import frame, numbers


def scene(number, width=64, height=48):
    """A frame without symmetry that tells its number by its gray value."""
    pixels = np.full((height, width, 3), 4 * number, np.uint8)
    pixels[: height // 4, : width // 2] = 255
    pixels[: height // 2, : width // 8] = (255, 0, 0)
    return Image.fromarray(pixels)


def record(path, codec="libx264", frames=30, options=None):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            codec, rate=10, options=options or {"crf": "1", "g": "12", "bf": "2"}
        )
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_image(scene(number))))
        container.mux(stream.encode())
    return path


def shown(path):
    """All frames that FFmpeg shows, in order."""
    import av

    with av.open(str(path)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def with_matrix(path, *matrix):
    """The file with another display matrix, which players and decord turn frames by; a, b, c, d in
    whole numbers or fractions.
    """
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44
    a, b, c, d = (round(value * 65536) for value in matrix)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


TURNS = {
    (1, 0, 0, 1): None,
    # as ffmpeg: a phone held upright, turned clockwise to be shown
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
    (0, 0.5, -0.5, 0): Image.Transpose.ROTATE_270,  # scaled
    (0.707, 0.707, -0.707, 0.707): None,  # decord leaves such angles
}


@pytest.mark.parametrize("matrix", TURNS, ids=str)
def test_frames_are_upright(tmp_path, matrix):
    import av

    path = record(tmp_path / "a.mp4")
    stored = shown(path)[17]
    with_matrix(path, *matrix)
    want = stored.transpose(TURNS[matrix]) if TURNS[matrix] is not None else stored
    for source in (str(path), path.read_bytes()):
        last, image = read_frames(source, lambda footage: [29, 17])
        np.testing.assert_array_equal(np.asarray(image), np.asarray(want))
        assert last.size == want.size
    a, b, c, d = matrix
    if a * d - b * c > 0 and not a * b:  # PyAV knows the angle where nothing is mirrored
        with av.open(str(path)) as container:
            angle = next(container.decode(video=0)).rotation
        np.testing.assert_array_equal(
            np.asarray(image), np.asarray(stored.rotate(angle, expand=True))
        )


def cut_between_keys(tmp_path):
    """A recording whose first seven frames lack their key frame; as from a camera's ring buffer."""
    path = record(
        tmp_path / "whole.ts", options={"g": "12", "bf": "0", "x264-params": "repeat-headers=1"}
    )
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        places = [packet.pos for packet in container.demux(stream) if packet.size]
    data = path.read_bytes()
    tables = b"".join(data[at : at + 188] for at in range(0, places[0], 188))
    cut = tmp_path / "cut.ts"
    cut.write_bytes(tables + data[places[5] :])
    return cut


def trimmed(tmp_path):
    """An edit list that shows the recording from its seventh frame on."""
    path = record(tmp_path / "edit.mp4")
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 12
    duration, time = struct.unpack_from(">Ii", data, at)
    scale = struct.unpack_from(">I", data, data.index(b"mdhd") + 16)[0]
    struct.pack_into(">Ii", data, at, duration - 600, time + 6 * scale // 10)
    path.write_bytes(data)
    return path


ALTERNATE = {"auto-alt-ref": "1", "lag-in-frames": "16", "b": "30k", "deadline": "good", "g": "30"}
RECORDINGS = {
    "between key frames": cut_between_keys,
    "edit list": trimmed,
    "hidden frames of VP8": lambda folder: record(folder / "a.webm", "libvpx", 40, ALTERNATE),
    "hidden frames of VP9": lambda folder: record(folder / "a.webm", "libvpx-vp9", 40, ALTERNATE),
    "open groups": lambda folder: record(
        folder / "a.ts",
        options={"bf": "2", "g": "10", "x264-params": "open-gop=1:repeat-headers=1"},
    ),
    "MPEG-4 in AVI": lambda folder: record(folder / "a.avi", "mpeg4", 30, {"bf": "2", "g": "10"}),
    "MPEG-2": lambda folder: record(folder / "a.mpg", "mpeg2video", 30, {"bf": "2", "g": "10"}),
}


@pytest.mark.parametrize("kind", RECORDINGS)
def test_the_count_is_that_of_frames_that_can_be_decoded_whatever_is_drawn(tmp_path, kind):
    path = RECORDINGS[kind](tmp_path)
    frames, totals = shown(path), set()
    assert len(frames) > 15

    def choose(footage):
        totals.add(footage.total)
        drawn.extend(training_frames(footage, rng, 4, 8))
        return drawn

    for seed in range(12):
        rng, drawn = np.random.default_rng(seed), []
        images = read_frames(str(path), choose)
        for index, image in zip(drawn, images, strict=True):
            np.testing.assert_array_equal(np.asarray(image), np.asarray(frames[index]))
    assert totals == {len(frames)}


DAMAGED = {  # file, codec, key frame interval, frames that refer to later ones, damaged packets
    "one group": ("a.mp4", "libx264", 60, 0, (20, 30)),
    "Matroska": ("a.mkv", "libx264", 12, 2, (20, 30)),
    "AVI": ("a.avi", "libx264", 60, 0, (20, 30)),
    "MPEG-TS": ("a.ts", "libx264", 12, 2, (20, 30)),
    "several groups": ("a.mp4", "libx264", 12, 2, (18, 45)),
    "MPEG-4": ("a.mp4", "mpeg4", 12, 0, (24, 25)),
    "HEVC": ("a.mp4", "libx265", 12, 2, (45, 46)),
}


def packet_places(path):
    """(position, size) of each packet in the file."""
    import av

    with av.open(str(path)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_middle_gives_the_same_pixels_whatever_is_drawn(tmp_path, kind):
    name, codec, interval, bf, (first, last) = DAMAGED[kind]
    options = {"g": str(interval), "bf": str(bf), "crf": "1"}
    path = record(tmp_path / name, codec, 60, options)
    places, data = packet_places(path), bytearray(path.read_bytes())
    start, stop = places[first][0] + 14, places[last][0]
    data[start:stop] = np.random.default_rng(0).bytes(stop - start)
    path.write_bytes(data)
    totals = set()

    def read(choose):
        indices = []

        def choose_once(footage):
            totals.add(footage.total)
            indices.extend(choose(footage))
            return indices

        images = read_frames(str(path), choose_once)
        return [(index, np.asarray(image)) for index, image in zip(indices, images, strict=True)]

    frames = [image for _, image in read(lambda footage: range(footage.total))]
    assert {image.shape for image in frames} == {(48, 64, 3)}
    for seed in range(10):
        rng = np.random.default_rng(seed)
        for index, image in read(lambda footage, rng=rng: training_frames(footage, rng, 1, 8)):
            np.testing.assert_array_equal(image, frames[index])
    assert totals == {len(frames)}


def test_the_last_frame_before_them_replaces_destroyed_frames(tmp_path, caplog):
    options = {"g": "12", "bf": "0", "b": "2M"}
    path = record(tmp_path / "a.mp4", "mpeg4", 36, options)
    places, whole = packet_places(path), path.read_bytes()

    def destroy(first, last, wanted):
        data = bytearray(whole)
        for position, size in places[first:last]:
            data[position : position + size] = bytes(size)
        path.write_bytes(data)
        caplog.clear()
        return numbers(read_frames(str(path), lambda footage: wanted))

    frame_11, frame_12, frame_35 = destroy(0, 0, [11, 12, 35])
    assert not caplog.records
    assert destroy(12, 24, [11, 12, 23, 35]) == [frame_11, frame_11, frame_11, frame_35]
    assert "2 of 4 frames cannot be decoded" in caplog.text
    assert destroy(12, 24, [20]) == [frame_11]
    assert destroy(0, 12, [3, 12]) == [frame_12, frame_12]  # nothing comes before them
    with pytest.raises(VideoError, match="no frame that can be decoded"):
        destroy(0, 36, [20])


def test_a_truncated_file_is_refused_unless_that_is_allowed(tmp_path):
    import av

    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "5", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(60):
            container.mux(stream.encode(av.VideoFrame.from_image(scene(number))))
        container.mux(stream.encode())
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    with pytest.raises(
        VideoError, match=r"a\.mp4: the last \d+ of 60 frames are missing: .* --allow_truncated"
    ):
        read_frames(str(path), lambda footage: [0])
    seen = []
    images = read_frames(
        str(path),
        lambda footage: seen.append(footage.total) or range(footage.total),
        allow_truncated=True,
    )
    assert 10 < seen[0] < 60 and len(images) == seen[0]


def test_a_cover_image_is_not_the_video(tmp_path):
    import av

    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 320, 240, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        stream = container.add_stream("libx264", rate=10, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(9):
            container.mux(stream.encode(av.VideoFrame.from_image(scene(number))))
        container.mux(stream.encode())
        container.mux(cover.encode(av.VideoFrame.from_image(scene(3, 320, 240))))
        container.mux(cover.encode())
    assert read_frames(str(path), lambda footage: [footage.total - 1])[0].size == (64, 48)


def test_the_limit_of_pixels(tmp_path):
    path = record(tmp_path / "a.mp4")
    frame(0).save(tmp_path / "a.gif")
    for name in ("a.mp4", "a.gif"):
        with pytest.raises(
            ImageError, match=rf"{name}: 64 x 48 pixels are more than 3,071; .*--max_image_pixels"
        ):
            read_frames(str(tmp_path / name), lambda footage: [0], max_pixels=3071)
    for limit in (0, None, 3072):
        assert read_frames(str(path), lambda footage: [0], max_pixels=limit)[0].size == (64, 48)


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nsecret.ts\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile secret.ts\n",
    ],
    ids=["m3u8", "concat"],
)
def test_playlists_that_name_other_files_are_refused(tmp_path, text):
    record(tmp_path / "secret.ts")
    (tmp_path / "a.mp4").write_text(text)
    with pytest.raises(VideoError, match=r"a\.mp4: cannot be decoded"):
        read_frames(str(tmp_path / "a.mp4"), lambda footage: [0])


@pytest.mark.parametrize("name", ["pipe.mp4", "pipe.gif"])
def test_pipes_are_refused_without_waiting(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(VideoError, match="is not a regular file"):
        read_frames(str(tmp_path / name), lambda footage: [0])


def test_sound_alone_and_long_names():
    with pytest.raises(VideoError, match="no such file|File name too long") as error:
        read_frames("b" * 100_000, lambda footage: [0])
    assert len(str(error.value)) < 400
    with pytest.raises(VideoError, match="written as text") as error:
        read_frames("data:video/mp4;base64," + "A" * 100_000, lambda footage: [0])
    assert len(str(error.value)) < 400
