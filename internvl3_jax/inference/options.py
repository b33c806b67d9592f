"""The options of `Chat`, checked when they are given."""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import TypedDict

from internvl3_jax.config import check_tile_rule
from internvl3_jax.data.text.reasoning import THINKING_SYSTEM, THINKING_TEMPERATURE
from internvl3_jax.inference.flash import check_mode
from internvl3_jax.inference.generation_config import GenerationConfig
from internvl3_jax.inference.sampling import Sampling
from internvl3_jax.io.strict_json import suggestion
from internvl3_jax.io.terminal import excerpt
from internvl3_jax.positions import parse_delta

MAX_TILES = 10_000  # as of a checkpoint's processor
# Sampling of the candidates for best of N, where the caller does not give it.
CANDIDATE_SAMPLING = {"temperature": 0.7, "top_p": 0.95}


@dataclasses.dataclass
class Options:
    """Options with which a question is answered.

    Attributes:
      max_new_tokens: longest answer, in tokens.
      temperature: 0 is greedy decoding. None: 0, or with `thinking` THINKING_TEMPERATURE.
      top_p: sample from the likeliest tokens that together reach this probability.
      top_k: sample from the k likeliest tokens; 0 is all.
      seed: of the sampling, below 2**32.
      prompt_lookup: check guesses from the prompt and the answer, several tokens in a run: the same
        greedy answer in less time where it repeats what it read.
      stop: text or texts that end an answer and are not part of it.
      delta: V2PE step of the images' tokens, such as "1/4": one, or one per image. None is the
        checkpoint's own, as for the next three.
      max_tiles: largest number of tiles of an image, thumbnails not counted.
      tiles: "per image": `max_tiles` is for each image; "shared": for all images of a turn.
      max_total_tiles: largest number of tiles of all images of a turn; 0 is no limit.
      max_image_pixels: larger images are refused; 0 is no limit. None: PIL.Image.MAX_IMAGE_PIXELS.
      allow_truncated: use images whose end is missing; the missing part is gray.
      cache_gib: GiB that the cache of the prompt and its answer may have; tiles, and frames of
        videos, that do not fit are left out. None is no limit.
      system: system message in place of the checkpoint's; None keeps that, or with `thinking` takes
        THINKING_SYSTEM.
      thinking: ask the model to reason before it answers (InternVL3.5).
      flash: "auto": the router decides which tiles get a quarter of the tokens (InternVL3.5-Flash);
        "off": none. None: "auto" where the model has a router.

    Raises:
      ValueError: a value has a wrong type or is out of range.
    """

    max_new_tokens: int = 1024
    temperature: float | None = None
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    prompt_lookup: bool = False
    stop: str | Sequence[str] = ()
    delta: str | float | Sequence | None = None
    max_tiles: int | None = None
    tiles: str | None = None
    max_total_tiles: int | None = None
    max_image_pixels: int | None = None
    allow_truncated: bool = False
    cache_gib: float | None = None
    system: str | None = None
    thinking: bool = False
    flash: str | None = None

    def __post_init__(self):
        self.max_new_tokens = check_int("max_new_tokens", self.max_new_tokens, 1)
        self.top_k = check_int("top_k", self.top_k, 0)
        self.seed = check_int("seed", self.seed, 0, 2**32)
        if self.temperature is not None:
            self.temperature = _check_float("temperature", self.temperature)
        self.top_p = _check_float("top_p", self.top_p)
        if self.max_tiles is not None:
            self.max_tiles = check_int("max_tiles", self.max_tiles, 1, MAX_TILES + 1)
        for name in ("max_total_tiles", "max_image_pixels"):
            if getattr(self, name) is not None:
                setattr(self, name, check_int(name, getattr(self, name), 0))
        if self.cache_gib is not None:
            self.cache_gib = _check_float("cache_gib", self.cache_gib)
            if not 0 < self.cache_gib < math.inf:
                raise ValueError(f"cache_gib is {self.cache_gib}; it must be above 0, in GiB")
        for name in ("prompt_lookup", "allow_truncated", "thinking"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"{name} is {excerpt(getattr(self, name))}; it must be True or False"
                )
        if self.tiles is not None:
            check_tile_rule(self.tiles, "tiles")
        if self.system is not None and not isinstance(self.system, str):
            raise ValueError(f"system is {excerpt(self.system)}; it must be a text or None")
        check_mode(self.flash)
        self.stop = _check_stop(self.stop)
        if self.delta is not None:
            units(self.delta)
        self.generation_config((self.seed,), "none")  # checks the ranges of the sampling

    def with_changes(self, changes: dict, owner: str = "Chat") -> "Options":
        """Returns a copy with some options changed.

        Raises:
          TypeError: a name is not an option. owner: whose option it is, for the message.
          ValueError: as of the constructor.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                near = suggestion(name, known) or f"; there are {', '.join(known)}"
                raise TypeError(f"{owner} has no option {name!r}{near}")
        return dataclasses.replace(self, **changes)

    def generation_config(
        self, seeds: tuple[int, ...], scaling: str, greedy_every: int = 0
    ) -> GenerationConfig:
        """Returns the settings of a batch with one row per seed. scaling: of the rope."""
        temperature = resolve_temperature(self.temperature, self.thinking)
        sampling = Sampling(temperature, self.top_k, self.top_p, greedy_every)
        return GenerationConfig(self.max_new_tokens, sampling, seeds, scaling, self.prompt_lookup)


class OptionChanges(TypedDict, total=False):
    """The fields of `Options`, as keyword arguments for one answer."""

    max_new_tokens: int
    temperature: float | None
    top_p: float
    top_k: int
    seed: int
    prompt_lookup: bool
    stop: str | Sequence[str]
    delta: str | float | Sequence | None
    max_tiles: int | None
    tiles: str | None
    max_total_tiles: int | None
    max_image_pixels: int | None
    allow_truncated: bool
    cache_gib: float | None
    system: str | None
    thinking: bool
    flash: str | None


def resolve_temperature(temperature: float | None, thinking: bool) -> float:
    """Returns the temperature, by default that of the mode."""
    if temperature is not None:
        return temperature
    return THINKING_TEMPERATURE if thinking else 0.0


def resolve_system(system: str | None, thinking: bool) -> str | None:
    """Returns the system message, by default that of thinking mode; None: the checkpoint's."""
    return THINKING_SYSTEM if system is None and thinking else system


def check_int(name: str, value, low: int, below: float | int = math.inf) -> int:
    """Returns `value` as an int. ValueError unless it is an integer with low <= value < below."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} is {excerpt(value)}; it must be a whole number")
    if not low <= value < below:
        bound = f" and below {below:,}" if below < math.inf else ""
        raise ValueError(f"{name} is {value}; it must be at least {low}{bound}")
    return int(value)


def _check_float(name: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} is {excerpt(value)}; it must be a number")
    return float(value)


def _check_stop(stop) -> tuple[str, ...]:
    texts = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"stop is {excerpt(stop)}; it must be a text or a list of texts")
    if "" in texts:
        raise ValueError(
            f"stop is {excerpt(stop)}: an empty text would end every answer at once; leave it out"
        )
    return tuple(texts)


def units(delta: str | float | Sequence) -> list[int]:
    """Returns the V2PE units (1/256) of one delta or of a list of them."""
    deltas = delta if isinstance(delta, list | tuple) else [delta]
    if not deltas:
        raise ValueError(f"delta is {delta}; give one, or one for each image")
    return [parse_delta(value) for value in deltas]
