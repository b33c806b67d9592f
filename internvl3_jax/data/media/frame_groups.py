"""Decodes single frames of a video file, one group of images at a time.

A group of images is a key frame with the frames that are decoded after it and shown before the
next key frame. Every group is decoded from its own key frame and from no other packets. So the
pixels of a frame do not depend on which other frames are wanted, even if the file is damaged.
"""

import bisect
import itertools
from collections.abc import Iterator, Sequence


class FrameGroups:
    """The frames of one file by the times at which they are shown.

    Attributes:
      replaced: Number of wanted frames so far that could not be decoded.
    """

    def __init__(self, file, times: Sequence[int], keys: Sequence[int]):
        """Prepares the groups without opening the file.

        Args:
          file: A `VideoFile`.
          times: When each frame is shown, ascending, in units of the stream.
          keys: The times of the key frames.
        """
        self.file, self.times, self.keys = file, times, keys
        self.edges = [bisect.bisect_left(times, key) for key in keys] + [len(times)]
        self.replaced = 0

    def decode(self, wanted: Sequence[int]) -> Iterator[tuple[int, object]]:
        """Yields (time, frame) for the times `wanted`, ascending.

        A frame that cannot be decoded is replaced by the last one before it that can, or by the
        first one of the file; by None if the file has none.
        """
        groups: dict[int, list[int]] = {}  # number of the group -> wanted times
        for time in wanted:
            groups.setdefault(max(0, bisect.bisect_right(self.keys, time) - 1), []).append(time)
        last_before: dict[int, object] = {}  # number of the group -> the last frame before it
        for group, times in groups.items():
            for time, frame, is_exact in self._decode_group(group, times):
                self.replaced += not is_exact
                if frame is None:
                    if group not in last_before:
                        last_before[group] = self._last_before(group, last_before)
                    frame = last_before[group]
                yield time, frame

    def _decode_group(
        self, group: int, wanted: Sequence[int]
    ) -> Iterator[tuple[int, object, bool]]:
        """Yields (time, frame or the last one before it in the group, whether it is the frame)."""
        frames = self._frames(group)
        before, frame = None, next(frames, None)
        for time in wanted:
            while frame is not None and frame.pts < time:
                before, frame = frame, next(frames, None)
            is_exact = frame is not None and frame.pts == time
            yield time, frame if is_exact else before, is_exact

    def _last_before(self, group: int, known: dict[int, object]):
        """Returns the last frame of the groups before `group`, or else the file's first frame."""
        for earlier in range(group - 1, -1, -1):
            last = self.times[self.edges[earlier + 1] - 1]
            ((_, frame, _),) = self._decode_group(earlier, [last])
            if frame is not None:
                return frame
            if earlier in known:
                return known[earlier]
        groups = range(len(self.keys))
        return next((frame for number in groups for frame in self._frames(number)), None)

    def _frames(self, group: int) -> Iterator:
        """Decodes the packets of a group, without the frames that are shown before it."""
        key = self.keys[group]
        end = self.keys[group + 1] if group + 1 < len(self.keys) else None
        remaining = self.edges[group + 1] - self.edges[group]
        packet = None
        for packet in self._packets(key):
            yield from _shown_from(key, self.file.decode(packet))
            if is_shown(packet) and packet.pts >= key and (end is None or packet.pts < end):
                remaining -= 1
                if not remaining:
                    break
        if packet is not None and packet.size:  # the last packet of a file flushes by itself
            yield from _shown_from(key, self.file.decode(packet, flush=True))

    def _packets(self, key: int) -> Iterator:
        """Yields the packets from a key frame on: by seeking or, if that misses it, by reading.

        The file is opened anew: a decoder that seeks keeps some of its state, which shows in
        damaged frames.
        """
        for seeks in (True, False):
            with self.file.open() as container:
                if seeks and not self.file.seek(container, key):
                    continue
                stream = self.file.stream(container)
                packets = _skip_to(key, self.file.packets(container, stream))
                if packets is not None:
                    yield from packets
                    return


def _shown_from(key: int, frames) -> Iterator:
    return (frame for frame in frames if frame.pts is not None and frame.pts >= key)


def _skip_to(key: int, packets: Iterator) -> Iterator | None:
    """Returns the packets from the key frame at time `key` on; None if it is not among them."""
    for packet in packets:
        if is_shown(packet) and packet.is_keyframe and packet.pts >= key:
            return itertools.chain([packet], packets) if packet.pts == key else None
    return None


def is_shown(packet) -> bool:
    """Returns whether a packet has a time and holds a frame that players show.

    Edit lists cut frames off, and VP8 and VP9 have packets whose frame is only referred to.
    """
    return bool(packet.size) and packet.pts is not None and is_counted(packet)


def is_counted(packet) -> bool:
    """Returns what `is_shown` returns, also for a packet without a time."""
    if not packet.size or packet.is_discard:
        return False
    codec, data = packet.stream.codec_context.name, memoryview(packet)
    if codec in ("vp8", "libvpx"):
        return bool(data[0] >> 4 & 1)
    # A superframe of VP9 ends with a frame that is shown.
    if codec not in ("vp9", "libvpx-vp9") or data[-1] >> 5 == 0b110:
        return True
    header = data[0] if data[0] >> 4 & 3 != 3 else data[0] << 1  # profile 3 has one bit more
    return bool(header >> 3 & 1 or header >> 1 & 1)
