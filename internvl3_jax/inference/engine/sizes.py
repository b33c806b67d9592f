"""The few sizes that the engine's programs are compiled for."""

import dataclasses

from internvl3_jax.inference.prompt_batch import bucket

# A chunk may have this share of padding before two smaller chunks are taken.
_MOST_PADDING = 0.25
_SMALLEST = 128  # slots of the shortest cache
_LARGEST = 4096  # tokens of the largest chunk of rows that grow


class GrowingSizes:
    """Sizes for rows that grow: a prompt is one chunk, and a block reads all slots. So the first
    answers need few programs, whatever their lengths.

    Args:
      capacity: slots of each row.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity

    def chunks_of(self, length: int, start: int = 0) -> list[tuple[int, int]]:
        """Returns (start, size) of the chunks of tokens `start` to `length`."""
        starts = range(start, length, _LARGEST)
        return [(first, min(bucket(length - first), _LARGEST)) for first in starts]

    def for_reading(self, slots: int) -> int:
        """Returns how many slots a block reads."""
        return self.capacity

    def for_prompt(self, length: int, start: int) -> int:
        """Returns the slots of the cache of one prompt."""
        last, size = self.chunks_of(length, start)[-1]
        return bucket(last + size)


@dataclasses.dataclass(frozen=True)
class FixedSizes:
    """Sizes for rows of a fixed length, whose programs are all compiled beforehand.

    Attributes:
      chunks: tokens of a chunk, ascending.
      capacity: slots of each row.
    """

    chunks: tuple[int, ...]
    capacity: int

    def chunk(self, remaining: int, start: int) -> int:
        """Returns the size of the next chunk. start: tokens that were run already."""
        room = self.prompt_slots[-1] - start
        for size in self.chunks:
            if remaining <= size <= min(room, (1 + _MOST_PADDING) * remaining):
                return size
        return max((size for size in self.chunks if size <= remaining), default=self.chunks[0])

    def chunks_of(self, length: int, start: int = 0) -> list[tuple[int, int]]:
        """Returns (start, size) of the chunks of tokens `start` to `length`."""
        chunks = []
        while start < length:
            chunks.append((start, self.chunk(length - start, start)))
            start += chunks[-1][1]
        return chunks

    @property
    def read_slots(self) -> list[int]:
        """Numbers of slots that a block of tokens reads: powers of two, from 256 on also their means,
        and the capacity.
        """
        powers = _powers(self.capacity)
        means = [3 * size // 2 for size in powers if size > _SMALLEST]
        return sorted(size for size in {*powers, *means} if size < self.capacity) + [self.capacity]

    @property
    def prompt_slots(self) -> list[int]:
        """Slots of the cache of one prompt: the last has room for the padding of the last chunk."""
        return [*_powers(self.capacity), self.capacity + self.chunks[0]]

    def for_reading(self, slots: int) -> int:
        """Returns the smallest of `read_slots` that is enough."""
        return next(size for size in self.read_slots if size >= slots)

    def for_prompt(self, length: int, start: int) -> int:
        """Returns the smallest of `prompt_slots` for all chunks of a prompt."""
        last, size = self.chunks_of(length, start)[-1]
        return next(slots for slots in self.prompt_slots if slots >= last + size)

    def programs(self) -> set[tuple[bool, int, int]]:
        """Returns (is the first chunk, tokens of the chunk, slots of the prompt's cache) of all
        programs for prompts.
        """
        starts = {
            (True, self.chunk(length, 0), self.for_prompt(length, 0))
            for length in range(1, self.capacity + 1)
        }
        others = {
            (False, chunk, slots)
            for chunk in self.chunks
            for slots in self.prompt_slots
            if chunk < slots
        }
        return starts | others


def _powers(capacity: int) -> list[int]:
    sizes, size = [], _SMALLEST
    while size < capacity:
        sizes.append(size)
        size *= 2
    return sizes
