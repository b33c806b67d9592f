"""How to answer: the options of `Chat`, typed and checked when they are given."""

import dataclasses
import math
import numbers
from collections.abc import Sequence

from internvl3_jax.config import check_tile_rule
from internvl3_jax.inference.generator import GenerationConfig
from internvl3_jax.inference.sampling import Sampling
from internvl3_jax.io.strict_json import suggestion
from internvl3_jax.io.terminal import excerpt
from internvl3_jax.positions import parse_delta

MOST_TILES = 10_000  # as of a checkpoint's processor
# Of candidates for best of N, where the caller does not give them.
CANDIDATE_SAMPLING = {"temperature": 0.7, "top_p": 0.95}


@dataclasses.dataclass
class Options:
    """How to answer. `delta` is the V2PE step: one value or one per picture, such as "1/4"; None is
    the checkpoint's own.

    ValueError, at once, for a value of a wrong type or out of its range.
    """

    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: str | Sequence[str] = ()  # text or texts that end an answer and are not part of it
    delta: str | float | Sequence | None = None
    max_tiles: int | None = None  # in place of the checkpoint's, as are the next two
    # "per image": each image has its own max_tiles; "shared": all images of a turn together
    tiles: str | None = None
    max_total_tiles: int | None = None  # of all images of a turn; 0 is no limit
    # larger images are refused; 0 is no limit; None: PIL.Image.MAX_IMAGE_PIXELS
    max_image_pixels: int | None = None
    allow_truncated: bool = False  # use images whose end is missing; the missing part is gray
    system: str | None = None  # in place of the checkpoint's system message

    def __post_init__(self):
        self.max_new_tokens = whole("max_new_tokens", self.max_new_tokens, 1)
        self.top_k = whole("top_k", self.top_k, 0)
        self.seed = whole("seed", self.seed, 0, 2**32)
        self.temperature, self.top_p = (
            _number("temperature", self.temperature),
            _number("top_p", self.top_p),
        )
        if self.max_tiles is not None:
            self.max_tiles = whole("max_tiles", self.max_tiles, 1, MOST_TILES + 1)
        for name in ("max_total_tiles", "max_image_pixels"):
            if getattr(self, name) is not None:
                setattr(self, name, whole(name, getattr(self, name), 0))
        if not isinstance(self.allow_truncated, bool):
            raise ValueError(
                f"allow_truncated is {excerpt(self.allow_truncated)}; it must be True or False"
            )
        if self.tiles is not None:
            check_tile_rule(self.tiles, "tiles")
        if self.system is not None and not isinstance(self.system, str):
            raise ValueError(f"system is {excerpt(self.system)}; it must be a text or None")
        if self.stop is None or isinstance(self.stop, str):
            self.stop = (self.stop,) if self.stop else ()
        if not isinstance(self.stop, Sequence) or not all(
            isinstance(text, str) for text in self.stop
        ):
            raise ValueError(f"stop is {excerpt(self.stop)}; it must be a text or a list of texts")
        if self.delta is not None:
            units(self.delta)
        self.run(1, "none")

    def with_changes(self, changes: dict, owner: str = "Chat") -> "Options":
        """A copy with some options changed. TypeError for a name that is no option."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                near = suggestion(name, known) or f"; there are {', '.join(known)}"
                raise TypeError(f"{owner} has no option {name!r}{near}")
        return dataclasses.replace(self, **changes)

    def run(self, rows: int, scaling: str) -> GenerationConfig:
        return GenerationConfig(
            self.max_new_tokens,
            Sampling(self.temperature, self.top_k, self.top_p),
            (self.seed,) * rows,
            scaling,
        )


def whole(name: str, value, low: int, below: float = math.inf) -> int:
    """`value` as an int, if it is a whole number within the bounds."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} is {excerpt(value)}; it must be a whole number")
    if not low <= value < below:
        raise ValueError(
            f"{name} is {value}; it must be at least {low}{f' and below {below:,}' if below < math.inf else ''}"
        )
    return int(value)


def _number(name: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} is {excerpt(value)}; it must be a number")
    return float(value)


def units(delta) -> list[int]:
    """V2PE units of one delta or a list of them."""
    return [
        parse_delta(value) for value in (delta if isinstance(delta, (list, tuple)) else [delta])
    ]
