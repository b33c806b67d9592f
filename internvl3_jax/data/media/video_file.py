"""Frames of a video file, by PyAV: counted without decoding where that is safe, upright, and the
same ones whatever else is drawn.

As decord, the reader of the InternVL code, and ffmpeg:

  the stream              the best one, never a cover image
  turned                  as the display matrix says (phones), bit for bit as decord 0.6; by no multiple of 90 degrees: as stored
  mirrored                as the display matrix says, as ffmpeg; decord leaves the mirroring out
  sample aspect ratio     ignored
  hidden frames           not counted: edit lists, VP8 and VP9 frames that are only referred to, leading frames that need an earlier part
  a start between key     counted by decoding: what comes before the first usable key frame is left out
    frames
  a damaged middle        frames that cannot be decoded are replaced by the last one before them that can; the log says so
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
    file = VideoFile(av, video, name, max_pixels, allow_truncated)
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
            found = file.by_time(distinct, times, keys)
        else:
            found = dict.fromkeys(distinct)
            file.numbers(found)
    except av.FFmpegError as error:
        raise VideoError(
            f"cannot be decoded ({error.strerror}); the file is damaged, incomplete or no video"
        ) from error
    return [found[times[index]] for index in wanted]


class VideoFile:
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
        # Several threads conceal damage in an order of chance. Samples have threads of their own.
        if not stream.codec_context.is_open:
            stream.codec_context.thread_count = 1
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
        packets = []
        for packet in self.packets(container, stream):
            if is_counted(packet):
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

    def by_time(
        self, wanted: Sequence[int], times: Sequence[int], keys: Sequence[int]
    ) -> dict[int, Image.Image]:
        """Decodes the frames at the times `wanted`, ascending; `times` returned the others."""
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

    def packets(self, container, stream) -> Iterator:
        """Yields the packets of the stream from where the container is."""
        try:
            yield from container.demux(stream)
        except self.av.FFmpegError:
            if not self.allow_truncated:
                raise

    def seek(self, container, time: int) -> bool:
        """Moves to the last key frame up to `time`, or thereabouts. False if that fails."""
        try:
            container.seek(time, stream=self.stream(container))
        except self.av.FFmpegError:
            return False
        return True

    def decode(self, packet, flush: bool = False) -> Sequence:
        """Returns the frames that a packet completes; with flush those that the decoder holds."""
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
        # Of a copy: reading side data keeps a frame in memory for a while, and of damaged frames
        # some decoders leave pixels as they are in the memory that they reuse.
        frame = frame.reformat(format="rgb24")
        pixels = frame.to_ndarray()
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
