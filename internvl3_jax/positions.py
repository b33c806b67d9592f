"""V2PE: positions of text and visual tokens, exact integers in units of 1 / 256 (InternVL3 paper,
section 2.1; V2PE paper).

A text token moves one position forward, a visual token moves `delta` forward, 1/256 <= delta <= 1.
delta is one number per picture and its run covers all tiles of the picture and the thumbnail
without a restart. Video frames are pictures of their own.

Worked example, two context tokens with delta 1/4 (64 units), positions in units of 1/256 and as
numbers:

    token      "a"  <img>  <IMG_CONTEXT>  <IMG_CONTEXT>  </img>  "b"
    units        0    256            320            384     768  1024
    number       0      1           1.25            1.5       3     4

The first token is at 0. With p the position of <img>, the k-th context token (from 1) is at p + k *
delta, and the token after the run (</img>) is at ceil(p + n * delta) + 1, so text is always at
whole positions. delta 1 gives 0, 1, 2, ... exactly.
Integers keep every position exact up to 8,388,607; float32 merges neighbours at delta 1/256 beyond
65,536, bfloat16 at once.
"""

import numbers
from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np

from internvl3_jax.config import UNITS, LanguageConfig

# in units: 1/256, 1/128 ... 1, the set that training draws from
DELTAS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LARGEST = np.iinfo(np.int32).max


def parse_delta(value: str | float | Fraction) -> int:
    """Units of a delta given as "1/4", "0.25", 0.25, 1 or a Fraction. ValueError unless it is k/256
    with k in 1..256.
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
            f"delta {value!r} is not a multiple of 1/{UNITS} from 1/{UNITS} to 1; use for example 1, 1/4 or 1/{UNITS}"
        )
    return int(units)


def rope_scaling(language: LanguageConfig, deltas: Iterable[int | str]) -> str:
    """Returns the rope scaling to use: V2PE, any delta below 1, switches the model's dynamic NTK
    scaling off (V2PE code).

    deltas: Units, or texts such as "1/4".
    """
    units = [delta if isinstance(delta, int) else parse_delta(delta) for delta in deltas]
    return language.rope_scaling if all(value == UNITS for value in units) else "none"


def draw_deltas(n: int, rng: np.random.Generator, among: Sequence[int] = DELTAS) -> list[int]:
    """Units for n pictures, each drawn on its own and uniformly from `among`, as V2PE training
    does.
    """
    return [among[i] for i in rng.integers(len(among), size=n)]


def build_positions(
    length: int, runs: Sequence[tuple[int, int]], deltas: Sequence[int]
) -> np.ndarray:
    """Positions i32[length] of a sequence, in units of 1/256.

    Args:
      length: number of tokens.
      runs: (index of the first context token, number of context tokens) of each picture, in order
          and with at least one other
        token (</img>) between two runs. <img> and </img> belong to the text.
      deltas: units of each picture, 1..256, as `parse_delta` and `draw_deltas` return them.

    Raises:
      ValueError: naming the picture, if a run or a delta is out of range, or if a position does not
      fit in int32.
    """
    starts, counts, deltas = _checked_runs(length, runs, deltas)
    steps = np.full(length, UNITS, np.int64)
    skipped = np.cumsum(counts) - counts  # context tokens of the pictures before
    visual = np.arange(counts.sum()) + np.repeat(starts - skipped, counts)
    steps[visual] = np.repeat(deltas, counts)
    steps[:1] = 0  # whatever the first token is, it is at 0
    # A run starts at a whole position, so its last position has the fraction of its summed steps;
    # the next token rounds it up, then moves on by one.
    ends = starts + counts
    travelled = (counts - (starts == 0)) * deltas
    followed = ends < length
    steps[ends[followed]] += -travelled[followed] % UNITS
    positions = np.cumsum(steps)
    if length and positions[-1] > LARGEST:
        raise ValueError(
            f"{length:,} tokens reach position {positions[-1] // UNITS:,}, beyond {LARGEST // UNITS:,}, the largest that int32 "
            f"holds in units of 1/{UNITS}; shorten the sequence or use a smaller delta"
        )
    return positions.astype(np.int32)


def next_position(positions: np.ndarray) -> int:
    """Units of the token after i32[T] positions: the last one rounded up to a whole position, plus
    one (0 if there is none).
    """
    if len(positions) == 0:
        return 0
    following = (-(-int(positions[-1]) // UNITS) + 1) * UNITS
    if following > LARGEST:
        raise ValueError(
            f"position {following // UNITS:,} lies beyond {LARGEST // UNITS:,}, the largest that int32 holds"
        )
    return following


def _checked_runs(length, runs, deltas) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Starts, counts and deltas i64[pictures] each, or ValueError naming the picture at fault."""
    if length < 0:
        raise ValueError(f"a sequence cannot have {length} tokens")
    if len(runs) != len(deltas):
        raise ValueError(
            f"{len(runs)} pictures but {len(deltas)} deltas; give one delta per picture"
        )
    free = 0  # first index that the next run may use
    for picture, ((start, count), delta) in enumerate(zip(runs, deltas, strict=True)):
        where = f"picture {picture} (tokens {start} to {start + count - 1})"
        if (
            isinstance(delta, bool)
            or not isinstance(delta, numbers.Integral)
            or not 1 <= delta <= UNITS
        ):
            raise ValueError(
                f"{where}: delta {delta!r} is not an integer in 1..{UNITS}, units of 1/{UNITS}; use parse_delta"
            )
        if count < 1 or start < 0 or start + count > length:
            raise ValueError(
                f"{where} has {count} context tokens and must lie inside the {length} tokens of the sequence"
            )
        if start < free:
            raise ValueError(
                f"{where} overlaps or touches the picture before it; runs are in order with </img> between them"
            )
        free = start + count + 1
    starts, counts = np.array(runs, np.int64).reshape(-1, 2).T
    return starts, counts, np.array(deltas, np.int64)
