"""Frames of a video: a file that FFmpeg reads (by PyAV), a GIF, or a folder with one picture a frame.

Training draws them as InternVL does (internvl/train/dataset.py): a number of frames n, drawn uniformly; the video in n equal
intervals; one frame of each, drawn from all but the interval's last. Evaluation takes the middle of n segments, as its MVBench
program does. A clip [start, end] is in seconds. Deviations, each where the original fails or ignores the request:

  clip of a GIF       honoured, by its frame durations (the original reads the whole GIF)
  clip of a folder    refused: its pictures carry no times (the original reads the whole folder)
  clip past the end   ends with the video (the original fails if it happens to draw a frame there)
  order in a folder   by name, numbers by value (the original needs names ending in _NUMBER.jpg and leaves others unsorted)
"""

import bisect
import dataclasses
import io
import os
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageSequence

from internvl3_jax.data.files import is_folder, is_remote, join, list_folder, read_bytes
from internvl3_jax.data.images import ImageError, open_image

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class VideoError(ValueError):
    """A video that cannot be used. The message names it and says why."""


@dataclasses.dataclass(frozen=True)
class Footage:
    """What a choice of frames depends on."""

    total: int  # frames
    fps: float | None  # frames a second, on average; None: unknown
    repeats: bool  # whether a video too short for the number drawn repeats its last frame: the original does so for files only


Choose = Callable[[Footage], Sequence[int]]  # indices of the frames wanted, in any order, some maybe twice


def training_frames(footage: Footage, rng: np.random.Generator, fewest: int, most: int, clip=None) -> list[int]:
    """Indices of a number of frames drawn from fewest..most, by the rule of training."""
    start, total = _clip_frames(footage, clip)
    count = int(rng.integers(fewest, most + 1))
    if not footage.repeats:
        count = min(count, total)
    return [start + index for index in draw_frames(total, count, rng)]


def draw_frames(total: int, count: int, rng: np.random.Generator) -> list[int]:
    """`count` ascending indices below `total`, one of each interval; a short video's last one is repeated."""
    parts = min(count, total)
    edges = np.linspace(0, total, parts + 1).astype(int)
    first, last = edges[:-1], edges[1:] - 1
    if (first < last).all():
        drawn = rng.integers(first, last).tolist()
    else:  # some interval has a single frame, of which the rule would draw nothing
        drawn = np.sort(rng.permutation(total)[:parts]).tolist()
    return drawn + drawn[-1:] * (count - parts)


def middle_frames(footage: Footage, count: int, clip=None) -> list[int]:
    """Indices of the middle of each of `count` equal segments of the video or clip: the rule of evaluation."""
    first, last = 0, footage.total - 1
    if clip is not None:
        start, end, fps = _clip_seconds(footage, clip)
        first, last = round(start * fps), min(round(end * fps), last)
        if first > last:
            raise VideoError(f"clip {list(clip)} begins after the end of the video, at {footage.total / fps:.1f} s")
    segment = (last - first) / count
    return [int(first + segment / 2 + np.round(segment * k)) for k in range(count)]


def _clip_seconds(footage: Footage, clip) -> tuple[float, float, float]:
    numbers = isinstance(clip, (list, tuple)) and all(isinstance(t, (int, float)) and not isinstance(t, bool) for t in clip)
    if not numbers or len(clip) != 2 or not 0 <= clip[0] < clip[1]:
        raise VideoError(f"clip is {clip!r}; expected [start, end] in seconds with 0 <= start < end")
    if not footage.fps:
        raise VideoError("clip: the frame rate is unknown, as always of a folder of pictures; leave the clip out")
    return clip[0], clip[1], footage.fps


def _clip_frames(footage: Footage, clip) -> tuple[int, int]:
    """(index of the first frame, number of frames) of a clip in seconds, or of all."""
    if clip is None:
        return 0, footage.total
    start, end, fps = _clip_seconds(footage, clip)
    first = int(start * fps)
    count = min(int((end - start) * fps), footage.total - first)
    if count < 1:
        raise VideoError(
            f"clip {list(clip)} holds no frame of a video of {footage.total / fps:.1f} s at {fps:.4g} frames a second"
        )
    return first, count


def read_frames(video: str | bytes, choose: Choose, name: str = "") -> list[Image.Image]:
    """RGB pictures of the frames that `choose` picks, in its order.

    Args:
      video: path or address of a file or folder, or the bytes of a file.
      name: what errors call it; its ending tells a GIF from other files. By default the path.

    Raises:
      VideoError, ImageError, FileError
    """
    name = name or (video if isinstance(video, str) else f"video of {len(video)} bytes")
    try:
        if isinstance(video, str) and is_folder(video):
            return _read_folder(video, choose)
        if isinstance(video, str) and is_remote(video):
            video = read_bytes(video)
        elif isinstance(video, str) and not os.path.exists(video):
            raise VideoError("no such file or folder")
        return _read_gif(video, choose) if name.lower().endswith(".gif") else _read_file(video, choose)
    except VideoError as error:
        raise VideoError(f"{name}: {error}") from error


def _read_folder(folder: str, choose: Choose) -> list[Image.Image]:
    names = [name for name in list_folder(folder) if name.lower().endswith(PICTURES)]
    if not names:
        raise VideoError(f"the folder holds no pictures ({', '.join(PICTURES)})")
    paths = [join(folder, names[index]) for index in _checked(choose, Footage(len(names), None, False))]
    return [open_image(read_bytes(path) if is_remote(path) else path, name=path) for path in paths]


def _read_gif(video: str | bytes, choose: Choose) -> list[Image.Image]:
    try:
        with Image.open(io.BytesIO(video) if isinstance(video, bytes) else video) as gif:
            seconds = [frame.info.get("duration", 0) / 1000 for frame in ImageSequence.Iterator(gif)]
            total = len(seconds)
            wanted = _checked(choose, Footage(total, total / sum(seconds) if sum(seconds) > 0 else None, False))
            found = {}
            for index in sorted(set(wanted)):
                gif.seek(index)
                found[index] = gif.convert("RGB")
    except (VideoError, ImageError):
        raise
    except Exception as error:  # damaged files make decoders raise nearly anything
        raise VideoError(f"is not a GIF that can be read ({error})") from error
    return [found[index] for index in wanted]


def _checked(choose: Choose, footage: Footage) -> list[int]:
    wanted = [int(index) for index in choose(footage)]
    wrong = [index for index in wanted if not 0 <= index < footage.total]
    if wrong or not wanted:
        raise VideoError(f"frames {wrong or wanted} were asked of {footage.total}")
    return wanted


def _read_file(video: str | bytes, choose: Choose) -> list[Image.Image]:
    try:
        import av
    except ImportError as error:
        raise VideoError("videos need PyAV: pip install 'internvl3-jax[video]'") from error
    try:
        with _open(av, video) as container:
            if not container.streams.video:
                raise VideoError("has no video stream")
            stream = container.streams.video[0]
            times, keys = _frame_times(container, stream)
            rate = float(stream.average_rate or 0) or None
        if not times:  # packets without times: count the frames by decoding them all
            times = _decode_all(av, video, frozenset())[0]
        if not times:
            raise VideoError("holds no frames")
        wanted = _checked(choose, Footage(len(times), rate, True))
        found = _decode(av, video, sorted({times[index] for index in wanted}), keys)
    except av.FFmpegError as error:
        raise VideoError(f"cannot be decoded ({error.strerror})") from error
    return [found[times[index]] for index in wanted]


def _open(av, video: str | bytes):
    return av.open(io.BytesIO(video) if isinstance(video, bytes) else video)


def _frame_times(container, stream) -> tuple[list[int], list[int]]:
    """Times of all frames and of the key frames in the stream's unit, ascending, without decoding; [], [] if they are unknown."""
    packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
    times = [packet.pts for packet in packets]
    if None in times or len(set(times)) != len(times):
        return [], []
    # AVI numbers its packets in the order of decoding, which is not that of showing where frames depend on later ones.
    if stream.codec_context.has_b_frames and times == sorted(times):
        return [], []
    return sorted(times), sorted(packet.pts for packet in packets if packet.is_keyframe)


def _decode(av, video: str | bytes, wanted: list[int], keys: list[int]) -> dict[int, Image.Image]:
    """Pictures by time. Between wanted frames it jumps to the last key frame before the next one, if that is ahead."""
    if not keys:
        return _decode_all(av, video, frozenset(wanted))[1]
    found, now, frames = {}, None, iter(())
    with _open(av, video) as container:
        stream = container.streams.video[0]
        for time in wanted:
            key = keys[max(0, bisect.bisect_right(keys, time) - 1)]
            if now is None or key > now:
                container.seek(key, stream=stream)
                frames = container.decode(stream)
            for frame in frames:
                now = frame.pts
                if now is None or now >= time:
                    break
            if now != time:  # a container whose seeking is inexact
                return _decode_whole(av, video, wanted)
            found[time] = frame.to_image()
    return found


def _decode_whole(av, video: str | bytes, wanted: list[int]) -> dict[int, Image.Image]:
    """As `_decode`, from the beginning to the last frame wanted."""
    remaining, found = set(wanted), {}
    with _open(av, video) as container:
        for frame in container.decode(video=0):
            if frame.pts in remaining:
                found[frame.pts] = frame.to_image()
                remaining.remove(frame.pts)
            if not remaining:
                return found
    raise VideoError(f"{len(remaining)} of the {len(wanted)} frames wanted cannot be decoded; the file is damaged")


def _decode_all(av, video: str | bytes, wanted: frozenset[int]) -> tuple[list[int], dict[int, Image.Image]]:
    """For streams without times: the numbers of all frames, and pictures of those wanted."""
    numbers, found = [], {}
    with _open(av, video) as container:
        for number, frame in enumerate(container.decode(video=0)):
            numbers.append(number)
            if number in wanted:
                found[number] = frame.to_image()
    return numbers, found
