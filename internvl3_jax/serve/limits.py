"""Limits of one request, and of all requests together."""

import dataclasses
import threading

from internvl3_jax.serve.errors import ApiError, busy


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of the server. All are of one request but the last two.

    Attributes:
      body_bytes: of the body, images in base64 included.
      body_seconds: until the body has arrived.
      seconds: from the body to the end of the answer.
      messages: of the conversation.
      images: of the conversation; a video or a PDF counts as one.
      frames, pages: of one video, of one PDF.
      tiles: of all images, thumbnails included.
      image_pixels: of one image; None: PIL.Image.MAX_IMAGE_PIXELS.
      answers: largest `n`.
      new_tokens: of an answer for which the request gives no limit.
      held_bytes: bodies and tiles of all requests together.
      step_seconds: of a round of the engine, compilation included; after that it is called stuck.
    """

    body_bytes: int = 32 << 20
    body_seconds: float = 60.0
    seconds: float = 600.0
    messages: int = 256
    images: int = 64
    frames: int = 64
    pages: int = 32
    tiles: int = 256
    image_pixels: int | None = None
    answers: int = 16
    new_tokens: int = 1024
    held_bytes: int = 4 << 30
    step_seconds: float = 600.0


class Budget:
    """Bytes that requests hold. Threads may share it."""

    def __init__(self, size: int):
        self.size, self.held = size, 0
        self._lock = threading.Lock()

    def add(self, count: int) -> bool:
        """Takes bytes; returns False if there are not as many left."""
        with self._lock:
            if self.held + count > self.size:
                return False
            self.held += count
            return True

    def remove(self, count: int) -> None:
        with self._lock:
            self.held -= count


class Hold:
    """The share of a budget that one request holds until `close`. Threads may share it."""

    def __init__(self, budget: Budget):
        self._budget, self._count, self._closed = budget, 0, False
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Takes bytes.

        Raises:
          ApiError: 413 if they are more than all that there is, 429 if too many are in use, 499 if
            the request has ended meanwhile.
        """
        with self._lock:
            if self._closed:
                raise ApiError("the request has ended", 499, code="ended")
            if self._count + count > self._budget.size:
                raise ApiError(
                    f"the request needs {self._count + count:,} bytes of memory for its images; "
                    f"the server has {self._budget.size:,} (--max_held_mb). Send fewer images or "
                    "tiles",
                    413,
                    code="request_too_large",
                )
            if not self._budget.add(count):
                raise busy("the server's memory for requests is full; try again in a moment")
            self._count += count

    def close(self) -> None:
        """Gives all bytes back."""
        with self._lock:
            self._closed = True
            self._budget.remove(self._count)
            self._count = 0
