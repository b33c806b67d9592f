"""Reads frames of a video file by PyAV: upright, and the same whichever others are read.

Frames are counted without decoding them where the packets suffice. As in decord, the reader of the
InternVL code, and in ffmpeg:

  stream               the best one, never a cover image
  turned               as the display matrix says (phones), bit for bit as decord 0.6; by angles
                       that are no multiple of 90 degrees: not turned
  mirrored             as the display matrix says, as ffmpeg; decord leaves the mirroring out
  sample aspect ratio  ignored
  hidden frames        not counted: those that edit lists cut off, VP8 and VP9 frames that are only
                       referred to, leading frames that need an earlier part
  a start between      counted by decoding: frames before the first usable key frame are left out
    key frames
  a damaged middle     frames that cannot be decoded are replaced by the last one before them that
                       can, with a warning in the log
"""

import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from internvl3_jax.data.media.frame_groups import FrameGroups, is_counted
from internvl3_jax.data.media.images import MAX_PIXELS, TRUNCATED_REMEDY, check_pixels
from internvl3_jax.io.terminal import one_line

MOST_FRAMES = 2_000_000  # of a file; 18 hours
# Without playlists and patterns, which name other files.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,asf,ogg,h264,"
    "hevc,vvc,obu,av1,m4v,ivf,mxf,nut,rm,dv,wtv,gif,apng,mjpeg,yuv4mpegpipe,h263,vc1,dirac,swf,amv,"
    "gxf,nuv"
)


class VideoError(ValueError):
    """A video that cannot be used. The message names it and the reason."""


def read_file(
    video: str | bytes,
    choose: Callable[[int, float | None], Sequence[int]],
    name: str,
    max_pixels: int | None = MAX_PIXELS,
    allow_truncated: bool = False,
    most_frames: int = MOST_FRAMES,
) -> list[Image.Image]:
    """Reads the frames that `choose` picks as RGB images, in its order.

    Args:
      video: Path of a regular file, or its bytes.
      choose: Takes (number of frames, frames per second on average or None); returns indices. If it
        returns none, nothing is decoded.
      name: What warnings and ImageError call the file.
      max_pixels: Frames with more are refused; 0 and None are no limit.
      allow_truncated: Whether a file whose end is missing is used up to there.
      most_frames: Files with more are refused.

    Raises:
      VideoError: The video cannot be used; the message does not name it.
      ImageError: The frames are too large.
    """
    try:
        import av
    except ImportError as error:
        raise VideoError("videos need PyAV: pip install -e '.[video]'") from error
    file = VideoFile(av, video, name, max_pixels, allow_truncated, most_frames)
    try:
        with file.open() as container:
            stream = file.stream(container)
            rate = float(stream.average_rate or 0) or None
            file.check_whole(container, stream)
            times, keys = file.times(container, stream)
        if not keys:  # the packets do not suffice: count the frames by decoding them
            times = file.numbers({})
        if not times:
            raise VideoError(
                "holds no frame that can be decoded; the file is damaged or incomplete"
            )
        wanted = choose(len(times), rate)
        distinct = sorted({times[index] for index in wanted})
        if keys:
            images = file.by_time(distinct, times, keys)
        else:
            images = dict.fromkeys(distinct)
            if distinct:
                file.numbers(images)
    except av.FFmpegError as error:
        raise VideoError(
            f"cannot be decoded ({error.strerror}); the file is damaged, incomplete or no video"
        ) from error
    return [images[times[index]] for index in wanted]


class VideoFile:
    """A video file, which is opened for each pass over its packets."""

    def __init__(
        self,
        av,
        video: str | bytes,
        name: str,
        max_pixels: int | None,
        allow_truncated: bool,
        most_frames: int = MOST_FRAMES,
    ):
        self.av, self.video, self.name = av, video, name
        self.max_pixels, self.allow_truncated = max_pixels, allow_truncated
        self.most_frames = most_frames

    def open(self):
        """Opens the file as a PyAV container."""
        # Without the prefix, FFmpeg may take the beginning of a name for a protocol.
        source = (
            io.BytesIO(self.video)
            if isinstance(self.video, bytes)
            else f"file:{os.fspath(self.video)}"
        )
        return self.av.open(
            source,
            options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"},
            metadata_errors="replace",  # texts of damaged files, or of another encoding
        )

    def stream(self, container):
        """Returns the best video stream, set up for decoding. VideoError if there is none."""
        streams = [
            stream
            for stream in container.streams.video
            if "attached_pic" not in str(stream.disposition)
        ]
        if not streams:
            raise VideoError(
                "has no video stream" + (", only a cover image" if container.streams.video else "")
            )
        best = container.streams.best("video")
        stream = next(
            (stream for stream in streams if best is not None and stream.index == best.index),
            streams[0],
        )
        if stream.codec_context is None:
            raise VideoError("is of a codec that FFmpeg does not know, or is damaged")
        check_pixels(
            stream.codec_context.width, stream.codec_context.height, self.max_pixels, self.name
        )
        # Several threads conceal damage in a random order. Samples are read in parallel anyway.
        if not stream.codec_context.is_open:
            stream.codec_context.thread_count = 1
        return stream

    def check_whole(self, container, stream) -> None:
        """Raises VideoError if the index names bytes beyond the end of the file (MP4, MOV).

        FFmpeg ends such a file early without an error.
        """
        size = len(self.video) if isinstance(self.video, bytes) else os.path.getsize(self.video)
        entries = [entry for entry in stream.index_entries if entry.pos >= 0]
        missing = sum(entry.pos + entry.size > size for entry in entries)
        if missing and container.format.name.startswith("mov") and not self.allow_truncated:
            raise VideoError(
                f"the last {missing} of {len(entries)} frames are missing: the file is incomplete; "
                f"{TRUNCATED_REMEDY}"
            )

    def times(self, container, stream) -> tuple[list[int], list[int]]:
        """Returns the times of all frames and of the key frames from the packets, ascending.

        The times are in the stream's unit. Both lists are empty if the packets do not suffice.
        """
        packets = []
        for packet in self.packets(container, stream):
            if is_counted(packet):
                packets.append((packet.pts, packet.is_keyframe, packet.is_corrupt))
            if len(packets) > self.most_frames:
                raise VideoError(f"has more than {self.most_frames:,} frames; cut it into parts")
        times = [time for time, _, _ in packets]
        keys = sorted(time for time, is_key, _ in packets if is_key and time is not None)
        if (
            not keys
            or None in times
            or len(set(times)) != len(times)
            or any(corrupt for _, _, corrupt in packets)
        ):
            return [], []
        # Frames before the first key frame, in the file or when shown, may lack the frames that
        # they refer to.
        if not packets[0][1] or min(times) < packets[0][0]:
            return [], []
        # AVI numbers its packets in the order of decoding, which differs from the order of showing
        # if frames refer to later ones.
        if stream.codec_context.has_b_frames and times == sorted(times):
            return [], []
        return sorted(times), keys

    def by_time(
        self, wanted: Sequence[int], times: Sequence[int], keys: Sequence[int]
    ) -> dict[int, Image.Image]:
        """Decodes the frames at the times `wanted`, ascending; the others are those of `times`."""
        groups = FrameGroups(self, times, keys)
        images = {}
        for time, frame in groups.decode(wanted):
            if frame is None:
                raise VideoError("holds no frame that can be decoded; the file is damaged")
            images[time] = self._image(frame)
        if groups.replaced:
            logging.getLogger(__name__).warning(
                "%s: %d of %d frames cannot be decoded and are replaced by the frame before; "
                "the file is damaged",
                one_line(self.name),
                groups.replaced,
                len(wanted),
            )
        return images

    def numbers(self, wanted: dict[int, Image.Image | None]) -> list[int]:
        """Decodes all frames; returns their numbers and sets the images of those in `wanted`."""
        numbers = []
        with self.open() as container:
            for number, frame in enumerate(self._frames(container, self.stream(container))):
                if number >= self.most_frames:
                    raise VideoError(
                        f"has more than {self.most_frames:,} frames; cut it into parts"
                    )
                numbers.append(number)
                if number in wanted:
                    wanted[number] = self._image(frame)
        return numbers

    def packets(self, container, stream) -> Iterator:
        """Yields the packets of the stream from where the container is."""
        try:
            yield from container.demux(stream)
        except self.av.FFmpegError:
            if not self.allow_truncated:
                raise

    def seek(self, container, time: int) -> bool:
        """Seeks to a key frame at or near `time`; returns whether FFmpeg could."""
        try:
            container.seek(time, stream=self.stream(container))
        except self.av.FFmpegError:
            return False
        return True

    def decode(self, packet, flush: bool = False) -> Sequence:
        """Returns the frames that a packet completes, or with `flush` all that remain."""
        try:
            return packet.stream.decode(None) if flush else packet.decode()
        except self.av.FFmpegError:
            return ()

    def _frames(self, container, stream) -> Iterator:
        """Yields the frames that can be decoded."""
        for packet in self.packets(container, stream):
            yield from self.decode(packet)

    def _image(self, frame) -> Image.Image:
        check_pixels(frame.width, frame.height, self.max_pixels, self.name)
        # Side data are read of a copy, since reading them keeps a frame in memory for a while.
        # Damaged frames show the memory that a decoder reuses, which must not depend on that.
        frame = frame.reformat(format="rgb24")
        pixels = frame.to_ndarray()
        for item in frame.side_data:
            if item.type.name == "DISPLAYMATRIX":
                pixels = upright(pixels, np.frombuffer(item, np.int32).reshape(3, 3))
        return Image.fromarray(np.ascontiguousarray(pixels))


def upright(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Turns a frame [H, W, 3] by a multiple of 90 degrees, and mirrors it, by its display matrix.

    The matrix i32[3, 3] maps (x, y), y downwards, to (a x + c y, b x + d y); its first two rows
    begin with a, b and c, d. At other angles the frame is returned as it is.
    """
    (a, b), (c, d) = matrix[:2, :2].astype(float)
    degree = np.tan(np.radians(1))  # ffmpeg's tolerance
    if max(abs(b), abs(c)) <= degree * min(abs(a), abs(d)):
        return pixels[:: 1 if d >= 0 else -1, :: 1 if a >= 0 else -1]
    if max(abs(a), abs(d)) <= degree * min(abs(b), abs(c)):
        return pixels.swapaxes(0, 1)[:: 1 if b >= 0 else -1, :: 1 if c >= 0 else -1]
    return pixels
