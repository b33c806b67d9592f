"""Decides how many frames, how many tiles and which V2PE delta a prompt has room for.

What the caller gave is kept. The rest begins as the official code has it: the checkpoint's delta,
its tiles per image, 32 frames of a video. Where that does not fit, it gives way in this order,
which loses least first:

  1. delta   smaller steps of visual tokens reach fewer positions; all pixels are still seen. The
             InternVL3 paper (table 12) finds 1/4 to 1/256 as good as 1. It saves no memory.
  2. tiles   fewer per image and page, down to one
  3. frames  fewer of each video, down to FEWEST_FRAMES

If that is not enough, the prompt is refused.
"""

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from fractions import Fraction

from internvl3_jax.config import UNITS, LanguageConfig, ProcessorConfig
from internvl3_jax.data.media.inputs import Opened, OpenedDocument, OpenedVideo
from internvl3_jax.data.media.tiles import image_limit
from internvl3_jax.positions import DELTAS, rope_scaling

FEWEST_FRAMES = 8  # as in InternVL's training


class PlanError(ValueError):
    """A prompt that cannot fit. The message says by how much, and what to change."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Frames, pages and tiles of a question, and the tokens that they take.

    Attributes:
      frames: (shown, all) of each video.
      pages: numbers of the pages of each document, from 1.
      max_tiles: largest number of tiles of an image or page, thumbnails not counted; None if there
        are none.
      delta: V2PE step of the images' tokens, such as "1/4"; one per image, video and document
        where the caller gave several.
      tokens: of the prompt, earlier turns included.
      position: that the longest answer ends at.
      max_position: the last one that the model knows at this delta.
      max_tokens: of a prompt whose cache is within its budget; None without one.
      changed: which of "delta", "tiles" and "frames" gave way.
    """

    frames: tuple[tuple[int, int], ...]
    pages: tuple[tuple[int, ...], ...]
    max_tiles: int | None
    delta: str | tuple[str, ...]
    tokens: int
    position: int
    max_position: int
    max_tokens: int | None = None
    changed: tuple[str, ...] = ()

    def line(self) -> str:
        """Returns the plan in words, for one line."""
        parts = _named("video", [f"{shown} of {total} frames" for shown, total in self.frames])
        parts += _named("document", [_counted(len(pages), "page") for pages in self.pages])
        if self.max_tiles is not None:
            parts.append(f"at most {self.max_tiles} tiles an image")
        delta = self.delta if isinstance(self.delta, str) else ", ".join(self.delta)
        parts.append(f"delta {delta}")
        text = (
            f"{', '.join(parts)}: {self.tokens:,} tokens, the answer up to position "
            f"{self.position:,} of {self.max_position:,}"
        )
        if self.max_tokens is not None:
            text += f"; the cache has room for {self.max_tokens:,} tokens"
        return text + (f"; {' and '.join(self.changed)} reduced to fit" if self.changed else "")


def _named(kind: str, shown: Sequence[str]) -> list[str]:
    """Returns "... of video 1" and so on, the number only if there are several."""
    if len(shown) == 1:
        return [f"{shown[0]} of the {kind}"]
    return [f"{text} of {kind} {number}" for number, text in enumerate(shown, 1)]


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


@dataclasses.dataclass(frozen=True)
class Room:
    """Room that a prompt has to fit into.

    Attributes:
      language: with the positions that the model knows.
      max_new_tokens: of the answer.
      max_tokens: of a prompt whose cache is within its budget; None: no budget.
      earlier_deltas: units of the images of earlier turns.
      measure: takes the largest number of frames of a video; returns the tokens of the prompt, and
        the position after it, if each new image has one tile at delta 1.
    """

    language: LanguageConfig
    max_new_tokens: int
    max_tokens: int | None
    earlier_deltas: Sequence[int]
    measure: Callable[[int], tuple[int, int]]

    def limit(self, deltas: Sequence[int]) -> int:
        """Returns the last position that the model knows at these deltas."""
        scaling = rope_scaling(self.language, [*deltas, *self.earlier_deltas])
        factor = self.language.rope_factor if scaling == "dynamic" else 1
        return int(self.language.max_position * factor)


@dataclasses.dataclass(frozen=True)
class Choice:
    """Numbers that `plan_prompt` chose.

    Attributes:
      frames: largest number of frames of a video whose number the caller left open.
      max_tiles: of an image or page.
      deltas: units of each image, video and document.
      plan: the same for people.
    """

    frames: int
    max_tiles: int
    deltas: list[int]
    plan: Plan


def plan_prompt(
    inputs: Sequence[Opened],
    processor: ProcessorConfig,
    room: Room,
    max_tiles: int | None = None,
    deltas: Sequence[int] | None = None,
) -> Choice:
    """Chooses frames, tiles and delta.

    Args:
      inputs: images, videos and documents of the question.
      processor: tile rule, tokens per tile and delta of the checkpoint.
      max_tiles: of an image or page, if the caller gave it.
      deltas: units of each of the inputs, if the caller gave them.

    Raises:
      PlanError: nothing that the caller left open makes it fit.
    """
    search = _Search(inputs, processor, room)
    # 1) What is open, the official values first.
    open_frames = [
        item.frames for item in inputs if isinstance(item, OpenedVideo) and not item.is_fixed
    ]
    most_frames = max(open_frames, default=1)
    fewest = min(FEWEST_FRAMES, most_frames)
    has_tiles = any(not isinstance(item, OpenedVideo) for item in inputs)
    first = image_limit(processor, search.num_tiled, max_tiles)
    limits = [first] if max_tiles or not has_tiles else [first, *range(min(first - 1, 48), 0, -1)]
    steps = [processor.delta, *(d for d in reversed(DELTAS) if d < processor.delta)]
    steps = [[step] * len(inputs) for step in steps] if deltas is None else [list(deltas)]

    # 2) The most frames that fit at all, with them the most tiles, and then the largest delta.
    def fits(frames: int, limit: int) -> bool:
        return any(search.fits(frames, limit, units) for units in steps)

    if not fits(fewest, limits[-1]):
        raise PlanError(search.refusal(fewest, limits[-1], steps, bool(open_frames)))
    counts = range(fewest, most_frames + 1)
    frames = counts[bisect.bisect_left(counts, True, key=lambda n: not fits(n, limits[-1])) - 1]
    limit = next(limit for limit in limits if fits(frames, limit))
    units = next(units for units in steps if search.fits(frames, limit, units))
    changed = {
        "delta": units != steps[0],
        "tiles": limit != limits[0],
        "frames": frames < most_frames,
    }
    plan = search.plan(
        frames,
        limit,
        units,
        has_tiles=has_tiles,
        changed=tuple(name for name, reduced in changed.items() if reduced),
    )
    return Choice(frames, limit, units, plan)


class _Search:
    """Costs of a prompt by what is chosen."""

    def __init__(self, inputs: Sequence[Opened], processor: ProcessorConfig, room: Room):
        self.inputs, self.processor, self.room = inputs, processor, room
        self.num_tiled = sum(
            len(item.tiles(processor, 1, 0)) for item in inputs if not isinstance(item, OpenedVideo)
        )
        self._measured: dict[int, tuple[int, int]] = {}

    def cost(self, frames: int, limit: int, deltas: Sequence[int]) -> tuple[int, int]:
        """Returns the tokens of the prompt, and the position at which the longest answer ends."""
        if frames not in self._measured:
            self._measured[frames] = self.room.measure(frames)
        tokens, positions = self._measured[frames]
        for item, delta in zip(self.inputs, deltas, strict=True):
            for tiles in item.tiles(self.processor, limit, frames):
                visual = tiles * self.processor.tokens_per_tile
                tokens += visual - self.processor.tokens_per_tile
                positions += -(-visual * delta // UNITS) - self.processor.tokens_per_tile
        return tokens, positions + self.room.max_new_tokens

    def fits(self, frames: int, limit: int, deltas: Sequence[int]) -> bool:
        tokens, position = self.cost(frames, limit, deltas)
        most = self.room.max_tokens
        return position <= self.room.limit(deltas) and (most is None or tokens <= most)

    def refusal(
        self, frames: int, limit: int, steps: Sequence[Sequence[int]], has_open_frames: bool
    ) -> str:
        """Returns why a prompt does not fit at any of the steps, and what to do."""

        def excess(deltas: Sequence[int]) -> int:
            return self.cost(frames, limit, deltas)[1] - self.room.limit(deltas)

        deltas = min(steps, key=excess)
        tokens, position = self.cost(frames, limit, deltas)
        known, most = self.room.limit(deltas), self.room.max_tokens
        advice = []
        if any(isinstance(item, OpenedDocument) for item in self.inputs):
            advice.append("fewer pages")
        if any(isinstance(item, OpenedVideo) for item in self.inputs):
            advice.append("fewer frames (num_frames)")
        if self.num_tiled and limit > 1:
            advice.append("fewer tiles (max_tiles)")
        if most is not None and tokens > most:
            advice += ["a larger cache budget (cache_gib)", "cache int8"]
            reason = f"the cache has room for {most:,}"
        else:
            advice += ["a smaller delta"] if min(deltas) > 1 else []
            advice += ["a lower max_new_tokens"]
            reason = f"the model knows {known:,}"
        shown = f" with {frames} frames" if has_open_frames else ""
        return (
            f"the prompt does not fit: at the least{shown} it has {tokens:,} tokens, and its "
            f"longest answer ends at position {position:,}; {reason}. Use "
            f"{', '.join(advice[:-1])}{' or ' if advice[:-1] else ''}{advice[-1]}"
        )

    def plan(
        self,
        frames: int,
        limit: int,
        deltas: Sequence[int],
        *,
        has_tiles: bool,
        changed: tuple[str, ...],
    ) -> Plan:
        tokens, position = self.cost(frames, limit, deltas)
        names = [str(Fraction(delta, UNITS)) for delta in deltas]
        return Plan(
            frames=tuple(
                (item.shown(frames), item.footage.total)
                for item in self.inputs
                if isinstance(item, OpenedVideo)
            ),
            pages=tuple(
                tuple(item.pdf.pages) for item in self.inputs if isinstance(item, OpenedDocument)
            ),
            max_tiles=limit if has_tiles else None,
            delta=names[0] if len(set(names)) == 1 else tuple(names),
            tokens=tokens,
            position=position,
            max_position=self.room.limit(deltas),
            max_tokens=self.room.max_tokens,
            changed=changed,
        )
