"""V2PE positions: exact integers in units of 1/256 (InternVL3 paper, section 2.1; V2PE paper).

A text token advances the position by one, a visual token by `delta`, 1/256 <= delta <= 1. Each
image has one delta, for all of its tiles and its thumbnail without a restart. Video frames are
images of their own.

Worked example, two context tokens with delta 1/4 (64 units), positions in units and as numbers:

    token      "a"  <img>  <IMG_CONTEXT>  <IMG_CONTEXT>  </img>  "b"
    units        0    256            320            384     768  1024
    number       0      1           1.25            1.5       3     4

The first token is at 0. Let p be the position of <img>. The k-th context token (from 1) is at
p + k * delta. The token after the n context tokens (</img>) is at ceil(p + n * delta) + 1, so text
is always at integer positions. Delta 1 gives exactly 0, 1, 2, ...

Integers keep every position exact up to 8,388,607. float32 merges neighbors at delta 1/256 beyond
65,536, bfloat16 from the start.
"""

import numbers
from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np

from internvl3_jax.config import UNITS, LanguageConfig

# Deltas that training samples from, in units: 1/256, 1/128, ... 1.
DELTAS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_MAX_UNITS = np.iinfo(np.int32).max


def parse_delta(value: str | float | Fraction) -> int:
    """Returns the units of a delta such as "1/4", "0.25", 0.25, 1 or a Fraction.

    Raises:
      ValueError: The delta is not k/256 with k in 1..256.
    """
    try:
        if isinstance(value, bool) or not isinstance(value, (str, numbers.Real)):
            raise TypeError
        delta = Fraction(value) if isinstance(value, (str, Fraction)) else Fraction(float(value))
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise ValueError(f"delta {value!r} is not a number; write it as 1/4 or 0.25") from error
    units = delta * UNITS
    if units.denominator != 1 or not 1 <= units <= UNITS:
        raise ValueError(
            f"delta {value!r} is not a multiple of 1/{UNITS} from 1/{UNITS} to 1; use for example "
            f"1, 1/4 or 1/{UNITS}"
        )
    return int(units)


def rope_scaling(language: LanguageConfig, deltas: Iterable[int | str]) -> str:
    """Returns the RoPE scaling to use with these deltas.

    V2PE, any delta below 1, switches the model's dynamic NTK scaling off (as the V2PE code does).

    Args:
      deltas: Units, or text such as "1/4".
    """
    units = [delta if isinstance(delta, int) else parse_delta(delta) for delta in deltas]
    return language.rope_scaling if all(value == UNITS for value in units) else "none"


def sample_deltas(n: int, rng: np.random.Generator, among: Sequence[int] = DELTAS) -> list[int]:
    """Samples the units of n images, independently and uniformly, as V2PE training does."""
    return [among[i] for i in rng.integers(len(among), size=n)]


def build_positions(
    length: int, runs: Sequence[tuple[int, int]], deltas: Sequence[int]
) -> np.ndarray:
    """Returns the positions i32[length] of a sequence, in units of 1/256.

    Args:
      length: Number of tokens.
      runs: For each image the index of its first context token and their number. Runs are in order,
          with at least one other token (</img>) between two of them. <img> and </img> are text.
      deltas: Units of each image, 1..256, as returned by `parse_delta` and `sample_deltas`.

    Raises:
      ValueError: A run or a delta is out of range (names the image), or a position does not fit in
          int32.
    """
    starts, counts, deltas = _check_runs(length, runs, deltas)

    # The step to each token: 1 for text, delta for context tokens, 0 for the first token.
    steps = np.full(length, UNITS, np.int64)
    earlier = np.cumsum(counts) - counts  # context tokens of earlier images
    visual = np.arange(counts.sum()) + np.repeat(starts - earlier, counts)
    steps[visual] = np.repeat(deltas, counts)
    steps[:1] = 0

    # A run starts at an integer position, so its last position has the fraction of its summed
    # steps. The next token rounds it up, then advances by one.
    ends = starts + counts
    advanced = (counts - (starts == 0)) * deltas
    has_next = ends < length
    steps[ends[has_next]] += -advanced[has_next] % UNITS

    positions = np.cumsum(steps)
    if length and positions[-1] > _MAX_UNITS:
        raise ValueError(
            f"{length:,} tokens reach position {positions[-1] // UNITS:,}, beyond "
            f"{_MAX_UNITS // UNITS:,}, the largest that int32 holds in units of 1/{UNITS}; shorten "
            "the sequence or use a smaller delta"
        )
    return positions.astype(np.int32)


def next_position(positions: np.ndarray) -> int:
    """Returns the units of the token after positions i32[T].

    The last position is rounded up to an integer, plus one; 0 if there are no positions.

    Raises:
      ValueError: The position does not fit in int32.
    """
    if len(positions) == 0:
        return 0
    following = (-(-int(positions[-1]) // UNITS) + 1) * UNITS
    if following > _MAX_UNITS:
        raise ValueError(
            f"position {following // UNITS:,} is beyond {_MAX_UNITS // UNITS:,}, the largest that "
            "int32 holds; shorten the sequence"
        )
    return following


def _check_runs(length, runs, deltas) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the starts, counts and deltas, i64[images], or raises ValueError naming an image."""
    if length < 0:
        raise ValueError(f"a sequence cannot have {length} tokens; the length must be 0 or more")
    if len(runs) != len(deltas):
        raise ValueError(f"{len(runs)} images but {len(deltas)} deltas; give one delta per image")
    # Runs must be inside the sequence, in order, with text between them.
    first_free = 0  # index at which the next run may start
    for image, ((start, count), delta) in enumerate(zip(runs, deltas, strict=True)):
        name = f"image {image} (tokens {start} to {start + count - 1})"
        is_integer = isinstance(delta, numbers.Integral) and not isinstance(delta, bool)
        if not is_integer or not 1 <= delta <= UNITS:
            raise ValueError(
                f"{name}: delta {delta!r} is not an integer in 1..{UNITS}, units of 1/{UNITS}; use "
                "parse_delta"
            )
        if count < 1 or start < 0 or start + count > length:
            raise ValueError(
                f"{name} has {count} context tokens; it must have one or more, inside the {length} "
                "tokens of the sequence"
            )
        if start < first_free:
            raise ValueError(
                f"{name} overlaps or touches the image before it; runs must be in order, with "
                "</img> between them"
            )
        first_free = start + count + 1
    starts, counts = np.array(runs, np.int64).reshape(-1, 2).T
    return starts, counts, np.array(deltas, np.int64)
