"""Messages with videos and PDFs: how many frames, pages and tiles of them fit, as of `Chat`."""

import dataclasses
import threading
from collections.abc import Sequence

import numpy as np

from internvl3_jax.data.media.documents import DocumentError
from internvl3_jax.data.media.given import UNTRUSTED, Document, Video
from internvl3_jax.data.media.images import ImageError
from internvl3_jax.data.media.video_file import VideoError
from internvl3_jax.data.plan import PlanError
from internvl3_jax.data.text.chat_template import ChatError
from internvl3_jax.inference import turn as turns
from internvl3_jax.io.safe_files import FileError
from internvl3_jax.serve.chat_request import ChatRequest
from internvl3_jax.serve.errors import ApiError
from internvl3_jax.serve.messages import Turn
from internvl3_jax.serve.parts import DocumentPart, Media, VideoPart

_UNREADABLE = (ImageError, VideoError, DocumentError, FileError)
# Decoded frames and pages are large: one message at a time has them.
_decoding = threading.Lock()


def planned_turn(
    turn: Turn,
    asked: ChatRequest,
    service,
    earlier: tuple[list[dict], list[np.ndarray], list[int]],
    deltas: Sequence[int] | None,
    name: str,
) -> turns.Turn:
    """Reads a message with videos or documents.

    Args:
      earlier: messages, tiles and deltas before it.
      deltas: V2PE units of its images, videos and documents; None: as they fit.
      name: of its content, for errors.

    Raises:
      ApiError: a file cannot be used, or the prompt does not fit.
    """
    limits = service.limits
    media = dataclasses.replace(
        UNTRUSTED,
        max_bytes=limits.body_bytes,
        max_frames=limits.frames,
        max_pages=limits.pages,
    )
    reader = turns.TurnReader(service, np.int8, media)
    for part in turn.images:
        if part.max_tiles is not None:
            raise ApiError(
                f"{part.name} has tiles of its own, and its message a video or file; set max_tiles "
                "of the request instead",
                param=part.name,
            )
    pixels = min(limits.image_pixels or UNTRUSTED.max_pixels, UNTRUSTED.max_pixels)
    options = dataclasses.replace(
        asked.options,
        max_new_tokens=asked.max_new_tokens or limits.new_tokens,
        delta=None if deltas is None else [delta / 256 for delta in deltas],
        max_image_pixels=pixels,
        # Room of the engine.
        cache_gib=service.engine.max_length * reader.slot_bytes / (1 << 30),
    )
    inputs = _inputs(turn.media, service, name)
    try:
        with _decoding:
            return reader.read(turn.message["content"], inputs, options, earlier, name)
    except _UNREADABLE as error:
        raise ApiError(str(error), param=name, code="invalid_media") from error
    except PlanError as error:
        text = str(error).replace("(cache_gib)", "(--max_length of the server)")
        raise ApiError(text, param=name, code="context_length_exceeded") from error
    except ChatError as error:
        raise ApiError(str(error), param=name) from error


def _inputs(media: Sequence[Media], service, name: str) -> tuple[list, list, list]:
    """Returns images, videos and documents, with their bytes."""
    images, videos, documents = [], [], []
    for part in media:
        try:
            if isinstance(part, VideoPart):
                data = service.sources.read(part.url, part.name, "video/mp4")
                videos.append(Video(data, **part.settings))
            elif isinstance(part, DocumentPart):
                data = service.sources.read(part.url, part.name, "application/pdf")
                documents.append(Document(data, **part.settings))
            else:
                images.append(service.sources.read(part.url, part.name))
        except ValueError as error:
            raise ApiError(f"{part.name}: {error}", param=part.name) from error
    return images, videos, documents
