"""Answers in one batch without an engine: those whose tokens are guessed (`prompt_lookup`)."""

from collections.abc import Iterator, Sequence

from internvl3_jax.data.batch import Prompt
from internvl3_jax.data.text.tokenizer import Tokenizer
from internvl3_jax.inference.answer import Answer, Stopwatch, text_fields
from internvl3_jax.inference.flash import uses_router
from internvl3_jax.inference.generation_config import GenerationConfig
from internvl3_jax.inference.generator import Generator
from internvl3_jax.inference.options import Options
from internvl3_jax.inference.programs import DecodeState
from internvl3_jax.inference.prompt_cache import PromptCache
from internvl3_jax.inference.text_stream import TextStreamer


class DirectRun:
    """One batch of answers.

    Args:
      prompts: each is run once for all of its answers.
      config: with one seed per answer.
      watch: has been running since the question; None starts one.
      cached: of an earlier run of one prompt; its buffers are donated.

    Attributes:
      state: of the decode loop, once it has begun.

    Raises:
      ValueError: the router of the model would decide about the tiles.
    """

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[Prompt],
        config: GenerationConfig,
        options: Options,
        tokenizer: Tokenizer,
        watch: Stopwatch | None = None,
        cached: PromptCache | None = None,
    ):
        if uses_router(options.flash, generator.config):
            raise ValueError(
                "prompt_lookup does not support the router of a Flash model; leave it out, or give "
                "flash 'off'"
            )
        max_position = generator.config.language.max_position
        self._keep, self._cache = 0, None
        if cached is not None:
            self._keep = cached.reusable(prompts[0], config.scaling, max_position)
            self._cache = cached.state.cache if self._keep else None
        self.state: DecodeState | None = None
        self._generator, self._prompts = generator, prompts
        self._config, self._options = config, options
        self._watch = watch or Stopwatch(generator.compile_clock)
        self._streamers = [TextStreamer(tokenizer, options.stop) for _ in config.seeds]

    def stream(self) -> Iterator[list[str]]:
        """Yields the new text of each answer until all have ended, then what was held back."""
        cache, self._cache = self._cache, None
        self.state = self._generator.start(self._prompts, self._config, cache, self._keep)
        streamers = self._streamers
        for pieces in self._generator.stream(self.state, self._config):
            self._watch.first_token()
            yield [streamer.read(piece) for streamer, piece in zip(streamers, pieces, strict=True)]
            if all(streamer.ended for streamer in streamers):
                break
        yield [streamer.finish() for streamer in streamers]
        self._watch.stop()

    def answers(self, keep_start: bool = False) -> list[Answer]:
        """Runs to the end; returns all answers. keep_start: as of `text_fields`."""
        for _ in self.stream():
            pass
        return [self.answer(row, keep_start) for row in range(len(self._streamers))]

    def answer(self, row: int = 0, keep_start: bool = False) -> Answer:
        """Returns one of the answers after the end."""
        streamer, watch = self._streamers[row], self._watch
        prompt = self._prompts[row * len(self._prompts) // len(self._streamers)]
        ids, lookup = streamer.ids, self.state.lookup
        return Answer(
            **text_fields(
                streamer, self._options, self._generator.stop_ids, keep_start, prompt.shown
            ),
            token_ids=ids,
            prompt_tokens=len(prompt.tokens),
            tiles=[len(tiles) for tiles in prompt.tiles],
            seconds=watch.seconds,
            first_token_seconds=watch.first_token_seconds,
            reused_tokens=self._keep,
            compile_seconds=watch.compile_seconds,
            model_runs=len(ids) - 1 if lookup is None else int(lookup.num_runs[row]),
            plan=prompt.plan,
        )

    def cached(self) -> PromptCache:
        """Returns the cache after the answer to one prompt."""
        ids, scaling = self._streamers[0].ids, self._config.scaling
        return PromptCache.after(self.state, self._prompts[0], ids, scaling)
