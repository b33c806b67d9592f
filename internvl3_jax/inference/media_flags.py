"""The flags of infer.py about videos, documents and boxes, and the inputs of a question that they
name.
"""

import pathlib
import re
from collections.abc import Sequence

from absl import flags

from internvl3_jax.data.media.given import Document, Video, check_label
from internvl3_jax.io.command_line import UsageError

FLAGS = flags.FLAGS

flags.DEFINE_multi_string(
    "video",
    [],
    "Video file, GIF or folder of frames; may be repeated. <video> in the prompt marks the places.",
)
flags.DEFINE_integer(
    "num_frames",
    None,
    "Frames of each video, from the middle of equal segments. Default: up to 32, as there is room.",
    lower_bound=1,
)
flags.DEFINE_float(
    "fps", None, "Show this many frames per second, at most --num_frames.", lower_bound=0.0
)
flags.DEFINE_multi_string(
    "clip", [], "Seconds of a video that are shown, such as 3-9.5; once, or once per video."
)
flags.DEFINE_integer("frame_tiles", 1, "Largest number of tiles of a frame.", lower_bound=1)
flags.DEFINE_string(
    "frame_label",
    None,
    'Text before each frame, {} being its number, such as "Frame{}: " of InternVL\'s quick start. '
    "Default: the checkpoint's.",
)
flags.DEFINE_multi_string(
    "pdf",
    [],
    "PDF whose pages are shown; may be repeated. <document> in the prompt marks the places.",
)
flags.DEFINE_multi_string("pages", [], "Pages of a PDF, such as 2-5,8; once, or once per --pdf.")
flags.DEFINE_float(
    "dpi",
    None,
    "Resolution of the pages. Default: as many pixels as their tiles have.",
    lower_bound=1.0,
    upper_bound=4800.0,
)
flags.DEFINE_float(
    "cache_gib",
    None,
    "GiB that the cache of keys and values may have: fewer tiles, and frames of videos, are shown "
    "if the prompt needs more.",
)

flags.DEFINE_string(
    "draw",
    None,
    "Image file for the question's image with the boxes of the answer; of several images those "
    "with boxes, as NAME-1.png and so on.",
)
flags.DEFINE_bool("draw_tiles", False, "With --draw, draw the grid of tiles, too.")

NAMES = (
    *("video", "num_frames", "fps", "clip", "frame_tiles", "frame_label"),
    *("pdf", "pages", "dpi", "cache_gib"),
)
BOX_NAMES = ("draw", "draw_tiles")
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
_VIDEO_FLAGS = ("num_frames", "fps", "clip", "frame_tiles", "frame_label")
_PDF_FLAGS = ("pages", "dpi")


def check() -> None:
    """Raises UsageError for flags that do not go together, or have a wrong form."""
    if FLAGS.requests and (FLAGS.video or FLAGS.pdf or FLAGS.clip or FLAGS.pages):
        raise UsageError("--requests takes videos, clips, documents and pages from the file alone")
    for name, needs, kind in (
        *((name, FLAGS.video, "--video") for name in _VIDEO_FLAGS),
        *((name, FLAGS.pdf, "--pdf") for name in _PDF_FLAGS),
    ):
        if not FLAGS[name].using_default_value and not needs and not FLAGS.requests:
            raise UsageError(f"--{name} is about {kind}; give that, too")
    if (FLAGS.video or FLAGS.pdf) and FLAGS.prompt is None:
        raise UsageError("--video and --pdf need --prompt")
    if FLAGS.best_of and (FLAGS.video or FLAGS.pdf):
        raise UsageError("--best_of takes images alone; leave --video and --pdf out")
    if FLAGS.fps is not None and not FLAGS.fps > 0:
        raise UsageError("--fps is 0; give the frames of a second, such as 0.5")
    if FLAGS.frame_label is not None:
        try:
            check_label(FLAGS.frame_label)
        except ValueError as error:
            raise UsageError(f"--frame_label: {error}") from error
    _check_draw()
    _per_input("clip", FLAGS.video)
    _per_input("pages", FLAGS.pdf)


def _check_draw() -> None:
    if FLAGS.draw_tiles and not FLAGS.draw:
        raise UsageError("--draw_tiles is about --draw; give that, too")
    if not FLAGS.draw:
        return
    if FLAGS.prompt is None or FLAGS.best_of or not (FLAGS.image or FLAGS.video or FLAGS.pdf):
        raise UsageError("--draw is about one answer to --prompt, with an image")
    if pathlib.Path(FLAGS.draw).suffix.lower() not in IMAGE_ENDINGS:
        raise UsageError(f"--draw is {FLAGS.draw!r}; end it with {', '.join(IMAGE_ENDINGS)}")


def of_requests() -> tuple[dict, dict]:
    """Returns the settings of videos and of documents, as keywords of `Video` and `Document`."""
    video = {
        "num_frames": FLAGS.num_frames,
        "fps": FLAGS.fps,
        "tiles": FLAGS.frame_tiles,
        "label": FLAGS.frame_label,
    }
    return video, {"dpi": FLAGS.dpi}


def inputs() -> tuple[list[str], list[Video], list[Document]]:
    """Returns the images, videos and documents of --prompt."""
    clips = [_parse_clip(clip) for clip in _per_input("clip", FLAGS.video)]
    pages = _per_input("pages", FLAGS.pdf)
    of_video, of_document = of_requests()
    return (
        FLAGS.image,
        [Video(path, clip=clip, **of_video) for path, clip in zip(FLAGS.video, clips, strict=True)],
        [
            Document(path, chosen, **of_document)
            for path, chosen in zip(FLAGS.pdf, pages, strict=True)
        ],
    )


def settings() -> dict:
    """Returns what the answers depend on besides the inputs, as far as it is not the default."""
    names = ("num_frames", "fps", "frame_tiles", "frame_label", "dpi")
    return {name: FLAGS[name].value for name in names if not FLAGS[name].using_default_value}


def _per_input(name: str, inputs: Sequence[str]) -> list:
    values = FLAGS[name].value
    if len(values) == 1:
        return values * len(inputs)
    if values and len(values) != len(inputs):
        raise UsageError(f"{len(values)} --{name} for {len(inputs)} inputs; give one, or one each")
    return values or [None] * len(inputs)


def _parse_clip(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+\.?\d*)\s*-\s*(\d+\.?\d*)\s*", text)
    if not match or not float(match[1]) < float(match[2]):
        raise UsageError(f"--clip is {text!r}; write START-END in seconds, such as 3-9.5")
    return float(match[1]), float(match[2])
