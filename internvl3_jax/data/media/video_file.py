"""Frames of a video file, by PyAV: counted without decoding where that is safe, upright, and the
same ones whatever else is drawn.

As decord, the reader of the InternVL code, and ffmpeg:

  the stream              the best one, never a cover picture
  turned, mirrored        as the display matrix says (phones); angles that are no multiple of 90 degrees are left, as decord does
  sample aspect ratio     ignored
  hidden frames           not counted: edit lists, VP8 and VP9 frames that are only referred to, leading frames that need an earlier part
  a start between key     counted by decoding: what comes before the first usable key frame is left out
    frames
  a damaged middle        the last frame that can be decoded stands in the place of those that cannot; a line in the log says so
"""

import bisect
import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from internvl3_jax.data.media.images import MAX_PIXELS, TRUNCATED_REMEDY, check_pixels
from internvl3_jax.io.terminal import one_line

MOST_FRAMES = 2_000_000  # of a file; 18 hours
# FFmpeg also reads playlists and patterns, which name other files.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,asf,ogg,h264,hevc,vvc,obu,av1,m4v,ivf,mxf,nut,rm,"
    "dv,wtv,gif,apng,mjpeg,yuv4mpegpipe,h263,vc1,dirac,swf,amv,gxf,nuv"
)


class VideoError(ValueError):
    """A video that cannot be used. The message names it and says why."""


def read_file(
    video: str | bytes,
    choose: Callable[[int, float | None], Sequence[int]],
    name: str,
    max_pixels: int | None = MAX_PIXELS,
    allow_truncated: bool = False,
) -> list[Image.Image]:
    """RGB images of the frames that `choose` picks, in its order.

    Args:
      video: path of a regular file, or its bytes.
      choose: (number of frames, frames a second on average or None) -> indices.
      max_pixels: of a frame; 0 or None: no limit.
      allow_truncated: a file whose end is missing is used up to there.

    Raises:
      VideoError, without the name, or ImageError, with it.
    """
    try:
        import av
    except ImportError as error:
        raise VideoError("videos need PyAV: pip install -e '.[video]'") from error
    file = _File(av, video, name, max_pixels, allow_truncated)
    try:
        with file.open() as container:
            stream = file.stream(container)
            rate = float(stream.average_rate or 0) or None
            file.check_whole(container, stream)
            times, keys = file.times(container, stream)
        if not keys:  # the packets do not tell: count the frames by decoding them all
            times = file.numbers({})
        if not times:
            raise VideoError(
                "holds no frame that can be decoded; the file is damaged or incomplete"
            )
        wanted = choose(len(times), rate)
        distinct = sorted({times[index] for index in wanted})
        if keys:
            found = file.by_time(distinct, keys)
        else:
            found = dict.fromkeys(distinct)
            file.numbers(found)
    except av.FFmpegError as error:
        raise VideoError(
            f"cannot be decoded ({error.strerror}); the file is damaged, incomplete or no video"
        ) from error
    return [found[times[index]] for index in wanted]


class _File:
    """One file, opened as often as its frames need."""

    def __init__(
        self, av, video: str | bytes, name: str, max_pixels: int | None, allow_truncated: bool
    ):
        self.av, self.video, self.name = av, video, name
        self.max_pixels, self.allow_truncated = max_pixels, allow_truncated

    def open(self):
        # The prefix keeps FFmpeg from taking the beginning of a name for a protocol.
        source = (
            io.BytesIO(self.video)
            if isinstance(self.video, bytes)
            else f"file:{os.fspath(self.video)}"
        )
        return self.av.open(
            source, options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
        )

    def stream(self, container):
        streams = [
            stream
            for stream in container.streams.video
            if "attached_pic" not in str(stream.disposition)
        ]
        if not streams:
            raise VideoError(
                "has no video stream"
                + (", only a cover picture" if container.streams.video else "")
            )
        best = container.streams.best("video")
        stream = next(
            (stream for stream in streams if best is not None and stream.index == best.index),
            streams[0],
        )
        check_pixels(
            stream.codec_context.width, stream.codec_context.height, self.max_pixels, self.name
        )
        return stream

    def check_whole(self, container, stream) -> None:
        """VideoError if the index names bytes beyond the end of the file (MP4, MOV). FFmpeg would
        just stop there.
        """
        size = len(self.video) if isinstance(self.video, bytes) else os.path.getsize(self.video)
        entries = [entry for entry in stream.index_entries if entry.pos >= 0]
        missing = sum(entry.pos + entry.size > size for entry in entries)
        if missing and container.format.name.startswith("mov") and not self.allow_truncated:
            raise VideoError(
                f"the last {missing} of {len(entries)} frames are missing: the file is incomplete; {TRUNCATED_REMEDY}"
            )

    def times(self, container, stream) -> tuple[list[int], list[int]]:
        """Times of all frames and of the key frames in the stream's unit, ascending, without
        decoding; [], [] if they are not sure.
        """
        codec = stream.codec_context.name
        packets = []
        for packet in self._packets(container, stream):
            if not packet.size or packet.is_discard:
                continue
            if not _is_hidden(codec, packet):
                packets.append((packet.pts, packet.is_keyframe, packet.is_corrupt))
            if len(packets) > MOST_FRAMES:
                raise VideoError(f"has more than {MOST_FRAMES:,} frames; cut it into parts")
        times = [time for time, _, _ in packets]
        keys = sorted(time for time, is_key, _ in packets if is_key and time is not None)
        if (
            not keys
            or None in times
            or len(set(times)) != len(times)
            or any(corrupt for _, _, corrupt in packets)
        ):
            return [], []
        # Frames that come before the first key frame, in the file or when shown, may lack what they
        # are made from.
        if not packets[0][1] or min(times) < packets[0][0]:
            return [], []
        # AVI numbers its packets in the order of decoding, which is not that of showing where
        # frames depend on later ones.
        if stream.codec_context.has_b_frames and times == sorted(times):
            return [], []
        return sorted(times), keys

    def by_time(self, wanted: list[int], keys: list[int]) -> dict[int, Image.Image]:
        """Images by time. Between wanted frames it jumps to the last key frame before the next one,
        if that is ahead.
        """
        found, now, frames = {}, None, iter(())
        with self.open() as container:
            stream = self.stream(container)
            for time in wanted:
                key = keys[max(0, bisect.bisect_right(keys, time) - 1)]
                if now is None or key > now:
                    container.seek(key, stream=stream)
                    frames = self._frames(container, stream)
                for frame in frames:
                    now = frame.pts
                    if now is None or now >= time:
                        break
                if now != time:  # a container whose seeking is inexact, or damage
                    return self._from_the_beginning(wanted)
                found[time] = self._image(frame)
        return found

    def _from_the_beginning(self, wanted: list[int]) -> dict[int, Image.Image]:
        """As `by_time`, by decoding up to the last frame wanted; in the place of a missing one the
        last one before it.
        """
        found, missing, before, remaining = {}, 0, None, list(wanted)
        with self.open() as container:
            for frame in self._frames(container, self.stream(container)):
                if frame.pts is None:
                    continue
                while remaining and frame.pts > remaining[0]:
                    found[remaining.pop(0)] = self._image(before or frame)
                    missing += 1
                if remaining and frame.pts == remaining[0]:
                    found[remaining.pop(0)] = self._image(frame)
                if not remaining:
                    break
                before = frame
            if remaining and before is None:
                raise VideoError("holds no frame that can be decoded; the file is damaged")
            for time in remaining:
                found[time] = self._image(before)
            missing += len(remaining)
        if missing:
            message = "%s: %d of %d frames cannot be decoded, the frame before stands in their place; the file is damaged"
            logging.getLogger(__name__).warning(message, one_line(self.name), missing, len(wanted))
        return found

    def numbers(self, wanted: dict[int, Image.Image | None]) -> list[int]:
        """The numbers of all frames, by decoding them; those in `wanted` get their image."""
        numbers = []
        with self.open() as container:
            for number, frame in enumerate(self._frames(container, self.stream(container))):
                if number >= MOST_FRAMES:
                    raise VideoError(f"has more than {MOST_FRAMES:,} frames; cut it into parts")
                numbers.append(number)
                if number in wanted:
                    wanted[number] = self._image(frame)
        return numbers

    def _packets(self, container, stream) -> Iterator:
        try:
            yield from container.demux(stream)
        except self.av.FFmpegError:
            if not self.allow_truncated:
                raise

    def _frames(self, container, stream) -> Iterator:
        """The frames that can be decoded."""
        for packet in self._packets(container, stream):
            try:
                frames = packet.decode()
            except self.av.FFmpegError:
                continue
            yield from frames

    def _image(self, frame) -> Image.Image:
        check_pixels(frame.width, frame.height, self.max_pixels, self.name)
        pixels = frame.to_ndarray(format="rgb24")
        for item in frame.side_data:
            if item.type.name == "DISPLAYMATRIX":
                pixels = upright(pixels, np.frombuffer(item, np.int32).reshape(3, 3))
        return Image.fromarray(np.ascontiguousarray(pixels))


def upright(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """A frame [H, W, 3] as its display matrix i32[3, 3] shows it: turned by a multiple of 90
    degrees and mirrored, or as it is.

    The matrix maps (x, y), y downwards, to (a x + c y, b x + d y), with a, b and c, d at the
    beginnings of its first two rows.
    """
    (a, b), (c, d) = matrix[:2, :2].astype(float)
    degree = np.tan(np.radians(1))  # ffmpeg's tolerance
    if max(abs(b), abs(c)) <= degree * min(abs(a), abs(d)):
        return pixels[:: 1 if d >= 0 else -1, :: 1 if a >= 0 else -1]
    if max(abs(a), abs(d)) <= degree * min(abs(b), abs(c)):
        return pixels.swapaxes(0, 1)[:: 1 if b >= 0 else -1, :: 1 if c >= 0 else -1]
    return pixels


def _is_hidden(codec: str, packet) -> bool:
    """Whether a packet of VP8 or VP9 holds nothing but a frame that later ones refer to."""
    data = memoryview(packet)
    if codec in ("vp8", "libvpx"):
        return not data[0] >> 4 & 1
    # a superframe ends with a frame that is shown
    if codec not in ("vp9", "libvpx-vp9") or data[-1] >> 5 == 0b110:
        return False
    header = data[0] if data[0] >> 4 & 3 != 3 else data[0] << 1  # profile 3 has one bit more
    return not header >> 3 & 1 and not header >> 1 & 1
