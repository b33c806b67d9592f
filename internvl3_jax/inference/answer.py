"""An answer and the times that it took."""

import dataclasses
import time
from collections.abc import Sequence

from internvl3_jax.data.boxes import Box, ShownImage, parse_boxes
from internvl3_jax.data.plan import Plan
from internvl3_jax.data.text.reasoning import split_reasoning
from internvl3_jax.inference.compile_clock import CompileClock
from internvl3_jax.inference.options import Options
from internvl3_jax.inference.text_stream import TextStreamer


@dataclasses.dataclass
class Answer:
    """An answer, and what it took.

    Attributes:
      text: without stop tokens, stop texts and reasoning.
      token_ids: as generated; the stop id is the last one if it was generated.
      prompt_tokens: number of tokens of the prompt, the earlier turns included.
      tiles: number of tiles of each image of the conversation, thumbnails included.
      seconds: from the question to the last token, compilation included.
      first_token_seconds: from the question to the first token, without compilation.
      reused_tokens: tokens of the prompt that were in the cache from earlier turns.
      finish: "stop" for a stop token or text, "length" if `max_new_tokens` cut the answer off,
        "reasoning" if the reasoning has no end: then there is no answer, and `text` is empty.
      compile_seconds: spent on compiling programs, 0.0 if all had been compiled before.
      model_runs: runs of the model for the tokens after the first; with `prompt_lookup` one run may
        give several.
      reasoning: what came before the answer, between <think> and </think>; None if nothing did.
      plan: frames, tiles and delta that were chosen for videos and documents; None without them.
      compressed_tiles: number of tiles of each image that the router compressed to a quarter of
        their tokens; empty without a router.
      boxes: boxes, quadrangles and points that the text names, malformed ones included.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    tiles: list[int]
    seconds: float
    first_token_seconds: float
    reused_tokens: int = 0
    finish: str = "stop"
    compile_seconds: float = 0.0
    model_runs: int = 0
    reasoning: str | None = None
    plan: Plan | None = None
    compressed_tiles: list[int] = dataclasses.field(default_factory=list)
    boxes: list[Box] = dataclasses.field(default_factory=list)

    @property
    def seconds_per_token(self) -> float:
        """Returns the time per token after the first, without compilation; 0.0 if there is none."""
        following = len(self.token_ids) - 1
        seconds = self.seconds - self.compile_seconds - self.first_token_seconds
        return max(0.0, seconds) / following if following > 0 else 0.0


def text_fields(
    streamer: TextStreamer,
    options: Options,
    stop_ids: Sequence[int],
    keep_start: bool,
    shown: Sequence[ShownImage] = (),
) -> dict:
    """Returns the fields `text`, `reasoning`, `finish` and `boxes` of an `Answer`.

    Args:
      stop_ids: ids of the stop tokens.
      keep_start: keep the space that the text begins with.
      shown: images that the boxes may be on.
    """
    ids = streamer.ids
    stopped = streamer.ended or (ids and ids[-1] in stop_ids)
    finish = "stop" if stopped or len(ids) < options.max_new_tokens else "length"
    text = streamer.text.rstrip() if keep_start else streamer.text.strip()
    parts = split_reasoning(text, options.thinking)
    finish = "reasoning" if parts.is_cut else finish
    boxes = parse_boxes(parts.answer, shown)
    return {"text": parts.answer, "reasoning": parts.reasoning, "finish": finish, "boxes": boxes}


def cut_reasoning(answer: Answer) -> str:
    """Says that an answer ended within its reasoning."""
    return f"the reasoning ended after {len(answer.token_ids)} tokens without an answer"


class Stopwatch:
    """Times an answer. Attributes are set by `first_token` and `stop`."""

    def __init__(self, compile_clock: CompileClock):
        self._clock, self._compiled = compile_clock, compile_clock.seconds
        self._began = time.perf_counter()
        self.seconds = self.first_token_seconds = self.compile_seconds = 0.0

    def first_token(self) -> None:
        if not self.first_token_seconds:
            compiling = self._clock.seconds - self._compiled
            self.first_token_seconds = time.perf_counter() - self._began - compiling

    def stop(self) -> None:
        self.seconds = time.perf_counter() - self._began
        self.compile_seconds = self._clock.seconds - self._compiled
