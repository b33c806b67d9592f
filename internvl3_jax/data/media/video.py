"""Reads frames of a video: of a file that FFmpeg reads (video_file.py), a GIF, or a folder with one
image per frame.

Training samples frames as InternVL does (internvl/train/dataset.py): a number of frames n is
sampled uniformly, the video is divided into n equal intervals, and one frame of each is sampled,
but not the interval's last. Evaluation takes the middle of n segments, as InternVL's MVBench
program does. A clip [start, end] is in seconds. Deviations, each where InternVL's code fails or
ignores the request:

  clip of a GIF      honored, by its frame durations (InternVL reads the whole GIF)
  clip of a folder   refused: its images have no times (InternVL reads the whole folder)
  clip past the end  ends with the video (InternVL fails if it samples a frame there)
  order in a folder  by name, numbers by value (InternVL needs names ending in _NUMBER.jpg and does
                     not sort others)
"""

import dataclasses
import io
import itertools
import os
import stat
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageSequence

from internvl3_jax.data.media import pillow
from internvl3_jax.data.media.images import MAX_PIXELS, ImageError, check_pixels, open_image
from internvl3_jax.data.media.video_file import MOST_FRAMES, VideoError, read_file
from internvl3_jax.data.sources.files import is_folder, is_remote, join, list_folder, read_bytes
from internvl3_jax.io.safe_files import reason
from internvl3_jax.io.terminal import excerpt, short_name

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclasses.dataclass(frozen=True)
class Footage:
    """The properties of a video by which frames are chosen.

    Attributes:
      total: Number of frames.
      fps: Frames per second on average; None if unknown.
      repeats: Whether a video that is too short repeats its last frame; InternVL does so for files
        only.
    """

    total: int
    fps: float | None
    repeats: bool


# Returns the indices of the wanted frames, in any order and with repetitions. None: nothing is
# decoded.
Choose = Callable[[Footage], Sequence[int] | None]


def training_frames(
    footage: Footage, rng: np.random.Generator, fewest: int, most: int, clip=None
) -> list[int]:
    """Samples a number of frames from fewest..most, and their indices, by the rule of training."""
    start, total = _clip_frames(footage, clip)
    count = int(rng.integers(fewest, most + 1))
    if not footage.repeats:
        count = min(count, total)
    return [start + index for index in draw_frames(total, count, rng)]


def draw_frames(total: int, count: int, rng: np.random.Generator) -> list[int]:
    """Samples `count` ascending indices below `total`, one of each interval.

    A video with fewer frames repeats its last one.
    """
    intervals = min(count, total)
    edges = np.linspace(0, total, intervals + 1).astype(int)
    first, last = edges[:-1], edges[1:] - 1
    if (first < last).all():
        sampled = rng.integers(first, last).tolist()
    else:  # an interval has a single frame, so that the rule leaves nothing to sample
        sampled = np.sort(rng.permutation(total)[:intervals]).tolist()
    return sampled + sampled[-1:] * (count - intervals)


def middle_frames(footage: Footage, count: int, clip=None) -> list[int]:
    """Returns the middle of each of `count` equal segments of the video or clip, for evaluation."""
    first, last = frame_range(footage, clip)
    segment = (last - first) / count
    return [int(first + segment / 2 + np.round(segment * k)) for k in range(count)]


def frame_range(footage: Footage, clip=None) -> tuple[int, int]:
    """Returns the first and the last frame between which `middle_frames` chooses."""
    first, last = 0, footage.total - 1
    if clip is not None:
        start, end, fps = _clip_seconds(footage, clip)
        first, last = round(start * fps), min(round(end * fps), last)
        if first > last:
            raise VideoError(
                f"clip {list(clip)} begins after the end of the video, at "
                f"{footage.total / fps:.1f} s"
            )
    return first, last


def _clip_seconds(footage: Footage, clip) -> tuple[float, float, float]:
    numbers = isinstance(clip, (list, tuple)) and all(
        isinstance(t, (int, float)) and not isinstance(t, bool) for t in clip
    )
    if not numbers or len(clip) != 2 or not 0 <= clip[0] < clip[1]:
        raise VideoError(
            f"clip is {excerpt(clip)}; expected [start, end] in seconds with 0 <= start < end"
        )
    if not footage.fps:
        raise VideoError(
            "clip: the frame rate is unknown, as it always is for a folder of images; leave the "
            "clip out"
        )
    return clip[0], clip[1], footage.fps


def _clip_frames(footage: Footage, clip) -> tuple[int, int]:
    """Returns (index of the first frame, number of frames) of a clip, or of the whole video."""
    if clip is None:
        return 0, footage.total
    start, end, fps = _clip_seconds(footage, clip)
    first = int(start * fps)
    count = min(int((end - start) * fps), footage.total - first)
    if count < 1:
        raise VideoError(
            f"clip {list(clip)} holds no frame of a video of {footage.total / fps:.1f} s at "
            f"{fps:.4g} frames per second"
        )
    return first, count


def read_frames(
    video: str | bytes,
    choose: Choose,
    name: str = "",
    max_pixels: int | None = MAX_PIXELS,
    allow_truncated: bool = False,
    most_frames: int = MOST_FRAMES,
) -> list[Image.Image]:
    """Reads the frames that `choose` picks as RGB images, in its order.

    Args:
      video: Path or address of a file or folder, or the bytes of a file.
      choose: Returns the indices of the wanted frames.
      name: What errors call it, by default the path; its suffix tells a GIF from other files.
      max_pixels: Frames with more are refused; 0 and None are no limit.
      allow_truncated: Whether a file whose end is missing is used up to there.
      most_frames: Videos with more are refused.

    Raises:
      VideoError, ImageError, FileError: The video cannot be used.
    """
    name = name or (video if isinstance(video, str) else f"video of {len(video)} bytes")
    is_gif, name = name.lower().endswith(".gif"), short_name(name)
    limits = max_pixels, allow_truncated, most_frames
    try:
        if isinstance(video, str) and _is_folder(video):
            return _read_folder(video, choose, *limits)
        if isinstance(video, str) and is_remote(video):
            video = read_bytes(video)
        elif isinstance(video, str):
            _check_path(video)
        if is_gif:
            return _read_gif(video, choose, name, *limits)
        return read_file(
            video, lambda total, fps: _checked(choose, Footage(total, fps, True)), name, *limits
        )
    except VideoError as error:
        raise VideoError(f"{name}: {error}") from error


def probe(video: str | bytes, name: str = "", **limits) -> Footage:
    """Returns the properties of a video without decoding its frames. Takes and raises what
    `read_frames` does.
    """
    seen = []
    read_frames(video, seen.append, name, **limits)
    return seen[0]


def _is_folder(path: str) -> bool:
    try:
        return is_folder(path)
    except ValueError as error:  # a null character
        raise VideoError(f"is not a usable path ({error})") from error


def _check_path(path: str) -> None:
    if path.startswith("data:"):
        raise VideoError("is a video written as text; store it in a file")
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise VideoError("no such file or folder") from error
    except OSError as error:
        raise VideoError(f"cannot be read ({reason(error)})") from error
    if not stat.S_ISREG(mode):
        raise VideoError("is not a regular file (a pipe, socket or device)")


def _read_folder(
    folder: str, choose: Choose, max_pixels: int | None, allow_truncated: bool, most_frames: int
) -> list[Image.Image]:
    names = [name for name in list_folder(folder) if name.lower().endswith(IMAGE_SUFFIXES)]
    if not names:
        raise VideoError(f"the folder holds no images ({', '.join(IMAGE_SUFFIXES)})")
    if len(names) > most_frames:
        raise VideoError(f"has more than {most_frames:,} frames; cut it into parts")
    paths = [
        join(folder, names[index]) for index in _checked(choose, Footage(len(names), None, False))
    ]
    limits = {"max_pixels": max_pixels or 0, "allow_truncated": allow_truncated}
    return [
        open_image(read_bytes(path) if is_remote(path) else path, name=path, **limits)
        for path in paths
    ]


def _read_gif(
    video: str | bytes,
    choose: Choose,
    name: str,
    max_pixels: int | None,
    truncated: bool,
    most_frames: int,
) -> list[Image.Image]:
    source = io.BytesIO(video) if isinstance(video, bytes) else video
    try:
        with pillow.allows(True, truncated), Image.open(source, formats=("GIF",)) as gif:
            check_pixels(gif.width, gif.height, max_pixels, name)
            frames = itertools.islice(ImageSequence.Iterator(gif), most_frames + 1)
            seconds = [frame.info.get("duration", 0) / 1000 for frame in frames]
            if len(seconds) > most_frames:
                raise VideoError(f"has more than {most_frames:,} frames; cut it into parts")
            total = len(seconds)
            wanted = _checked(
                choose, Footage(total, total / sum(seconds) if sum(seconds) > 0 else None, False)
            )
            decoded = {}
            for index in sorted(set(wanted)):
                gif.seek(index)
                decoded[index] = gif.convert("RGB")
    except (VideoError, ImageError):
        raise
    except Exception as error:  # damaged files make decoders raise errors of many types
        raise VideoError(f"is not a GIF that can be read ({short_name(reason(error))})") from error
    return [decoded[index] for index in wanted]


def _checked(choose: Choose, footage: Footage) -> list[int]:
    chosen = choose(footage)
    if chosen is None:
        return []
    wanted = [int(index) for index in chosen]
    wrong = [index for index in wanted if not 0 <= index < footage.total]
    if wrong or not wanted:
        raise VideoError(f"frames {wrong or wanted} were asked of {footage.total}")
    return wanted
