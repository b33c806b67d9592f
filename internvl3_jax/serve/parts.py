"""Reads the parts of a message: texts, images, videos and PDFs."""

import dataclasses
import math

from internvl3_jax.inference.options import MAX_TILES
from internvl3_jax.io.terminal import excerpt
from internvl3_jax.serve.body import Fields
from internvl3_jax.serve.errors import ApiError

_DETAILS = ("auto", "low", "high")
# Parts that are not taken, and what to send in their place.
_OTHERS = {
    "input_file": "send it as file, as in chat completions",
    "input_image": "send it as image_url, as in chat completions",
    "input_audio": "the model has no audio",
    "audio_url": "the model has no audio",
    "video": "send its frames as image_url, or the file as video_url",
    "image": "send it as image_url",
}


@dataclasses.dataclass(frozen=True)
class ImagePart:
    """An image of a message.

    Attributes:
      url: data URL, address or path.
      name: its field, for errors.
      max_tiles: its own limit of tiles; None: that of the request.
    """

    url: str
    name: str
    max_tiles: int | None = None


@dataclasses.dataclass(frozen=True)
class VideoPart:
    """A video of a message.

    Attributes:
      url, name: as of `ImagePart`.
      settings: keyword arguments of `Video`.
    """

    url: str
    name: str
    settings: dict


@dataclasses.dataclass(frozen=True)
class DocumentPart:
    """A PDF of a message.

    Attributes:
      url, name: as of `ImagePart`.
      settings: keyword arguments of `Document`.
    """

    url: str
    name: str
    settings: dict


Media = ImagePart | VideoPart | DocumentPart


def read_parts(values: list, name: str) -> list[str | Media]:
    """Reads a list of parts.

    Raises:
      ApiError: it names the part and the field that is wrong.
    """
    if not values:
        raise ApiError(f"{name} is an empty list; give at least one part", param=name)
    return [_read_part(Fields(value, f"{name}[{index}]")) for index, value in enumerate(values)]


def _read_part(fields: Fields) -> str | Media:
    kind = fields.get("type", str)
    if kind in ("text", "input_text"):
        text = fields.get("text", str)
        fields.finish()
        return text
    if kind in _READERS:
        return _READERS[kind](fields)
    known = _OTHERS.get(kind, f"expected text, {', '.join(_READERS)}")
    raise ApiError(
        f"{fields.name('type')} is {excerpt(kind)}; {known}",
        param=fields.name("type"),
        code="unsupported_part",
    )


def _inner(fields: Fields, field: str) -> Fields:
    """Returns the fields of {field: {"url": ...}}, or of {field: URL}."""
    value = fields.get(field, (dict, str))
    fields.finish(("uuid",))
    return Fields({"url": value} if isinstance(value, str) else value, fields.name(field))


def _read_image(fields: Fields) -> ImagePart:
    image = _inner(fields, "image_url")
    url = image.get("url", str, low=1)
    detail = image.get("detail", str, "auto", choices=_DETAILS)
    max_tiles = image.get("max_tiles", int, None, low=1, high=MAX_TILES)
    # LMDeploy's name.
    patch = image.get("max_dynamic_patch", int, None, low=1, high=MAX_TILES)
    image.finish()
    if max_tiles is not None and patch is not None:
        raise ApiError(
            f"{image.path} has max_tiles and max_dynamic_patch, which mean the same; give one",
            param=image.name("max_dynamic_patch"),
        )
    max_tiles = patch if max_tiles is None else max_tiles
    if detail == "low":
        if max_tiles not in (None, 1):
            raise ApiError(
                f"{image.path} has detail low, which is one tile, and max_tiles {max_tiles}; leave "
                "one out",
                param=image.name("detail"),
            )
        max_tiles = 1
    return ImagePart(url, image.name("url"), max_tiles)


def _read_video(fields: Fields) -> VideoPart:
    video = _inner(fields, "video_url")
    url = video.get("url", str, low=1)
    settings = {
        "num_frames": video.get("num_frames", int, None, low=1, high=1 << 20),
        "fps": video.get("fps", float, None),
        "tiles": video.get("max_tiles", int, 1, low=1, high=MAX_TILES),
        "clip": _read_clip(video),
    }
    video.finish()
    return VideoPart(url, video.name("url"), settings)


def _read_clip(video: Fields) -> tuple[float, float] | None:
    clip = video.get("clip", list, None)
    if clip is None:
        return None
    numbers = [
        value
        for value in clip
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    ]
    if len(clip) != 2 or numbers != clip or not 0 <= clip[0] < clip[1]:
        raise ApiError(
            f"{video.name('clip')} is {excerpt(clip)}; expected [start, end] in seconds",
            param=video.name("clip"),
        )
    return float(clip[0]), float(clip[1])


def _read_file(fields: Fields) -> DocumentPart:
    name = fields.name("file")
    file = fields.object("file")
    fields.finish()
    if file is None:
        raise ApiError(f"{name} is missing", param=name, code="missing_field")
    if file.get("file_id", str, None) is not None:
        raise ApiError(
            f"{name}.file_id: no files are stored here; send file_data, a data: URL of a PDF",
            param=f"{name}.file_id",
        )
    data = file.get("file_data", str, low=1)
    settings = {
        "pages": file.get("pages", (str, list), None, low=1, high=1000),
        "dpi": file.get("dpi", float, None, low=1, high=4800),
    }
    file.finish(("filename",))
    return DocumentPart(data, file.name("file_data"), settings)


_READERS = {"image_url": _read_image, "video_url": _read_video, "file": _read_file}
