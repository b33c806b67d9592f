"""Chooses the frames of a video that are shown, by the rules of the programs that made the card's
numbers.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from internvl3_jax.data.media.images import open_image
from internvl3_jax.data.media.video import Footage, VideoError, read_frames
from internvl3_jax.evaluate.stored import as_jpeg

RULES = ("mvbench", "kit", "vsi", "clues")


def mvbench_frames(
    total: int, fps: float, clip: Sequence[float] | None, count: int, first: int = 0
) -> list[int]:
    """Returns the middle frame of each of `count` segments of a clip in seconds (own code).

    Args:
      first: number of the first frame of the video; `total` - 1 is that of the last.
    """
    start, end = first, total - 1
    if clip is not None:
        start, end = max(first, round(clip[0] * fps)), min(round(clip[1] * fps), total - 1)
    segment = (end - start) / count
    return [int(start + segment / 2 + np.round(segment * k)) for k in range(count)]


def videomme_frames(total: int, count: int) -> list[int]:
    """Returns `count` frames, the ends left out (kit; all sets but MVBench and VSI)."""
    step = total / (count + 1)
    return [int(number * step) for number in range(1, count + 1)]


def vsi_frames(total: int, count: int) -> list[int]:
    """Returns `count` frames from the first to the last, which is added if it is missing (kit)."""
    frames = np.linspace(0, total - 1, count, dtype=int).tolist()
    return frames if frames[-1] == total - 1 else [*frames, total - 1]


def clue_frames(fps: float, clues: Sequence[Sequence[float]], count: int) -> list[int]:
    """Returns frames of intervals in seconds, in proportion to their lengths (kit: CG-Bench)."""
    merged: list[list[float]] = []
    for start, end in sorted(clues, key=lambda clue: clue[0]):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    spans = [(round(start * fps), round(end * fps)) for start, end in merged]
    total = sum(end - start for start, end in spans)
    if count >= total:
        return [frame for start, end in spans for frame in range(start, end)]
    frames = []
    for start, end in spans:
        share = max(1, int(count * ((end - start) / total)))
        segment = (end - start) / share
        frames += [int(start + segment / 2 + segment * number) for number in range(share)]
    return frames


def choose(rule: str, footage: Footage, count: int, clip) -> list[int]:
    """Returns the frames of a video by a rule of RULES.

    Args:
      clip: [start, end] in seconds, or None; for "clues" the intervals.

    Raises:
      VideoError: the frame rate is needed and unknown.
    """
    if rule == "kit":
        return videomme_frames(footage.total, count)
    if rule == "vsi":
        return vsi_frames(footage.total, count)
    if footage.fps is None and (rule == "clues" or clip is not None):
        raise VideoError("the frame rate is unknown, and the clip is in seconds")
    if rule == "mvbench":
        return mvbench_frames(footage.total, footage.fps or 1.0, clip, count)
    last = footage.total - 1
    return [min(frame, last) for frame in clue_frames(footage.fps, clip, count)]


def read_video(
    path: str, rule: str, count: int, clip=None
) -> tuple[list[Image.Image], list[int], float | None]:
    """Returns (frames, their indices, frames per second) of a video.

    A folder holds numbered frames of 3 per second from 00001.jpg on, as MVBench's TVQA.

    Raises:
      VideoError: the video cannot be read; the message names it.
    """
    if rule == "mvbench" and pathlib.Path(path).is_dir():
        return _read_folder(pathlib.Path(path), count, clip)
    seen: dict[str, object] = {}

    def wanted(footage: Footage) -> list[int]:
        seen["indices"], seen["fps"] = choose(rule, footage, count, clip), footage.fps
        return seen["indices"]

    frames = read_frames(path, wanted)
    if rule != "mvbench":  # the kit stores them before it shows them
        frames = [open_image(as_jpeg(frame, path)) for frame in frames]
    return frames, seen["indices"], seen["fps"]


def _read_folder(folder: pathlib.Path, count: int, clip) -> tuple[list[Image.Image], list, float]:
    total = sum(1 for _ in folder.iterdir())
    indices = mvbench_frames(total + 1, 3.0, clip, count, first=1)
    frames = []
    for index in indices:
        path = folder / f"{index:05d}.jpg"
        if not path.is_file():
            raise VideoError(f"{folder}: has no frame {path.name}; was it unpacked completely?")
        with Image.open(path) as image:
            frames.append(image.convert("RGB"))
    return frames, indices, 3.0
