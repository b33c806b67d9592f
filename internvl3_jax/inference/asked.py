"""Questions to an engine, whose answers are read as text."""

from collections.abc import Iterator, Sequence

from internvl3_jax.data.batch import Prompt
from internvl3_jax.data.text.tokenizer import Tokenizer
from internvl3_jax.inference.answer import Answer, Stopwatch, text_fields
from internvl3_jax.inference.engine.engine import Engine
from internvl3_jax.inference.engine.request import Piece, Request, RowSampling
from internvl3_jax.inference.generator import Generator
from internvl3_jax.inference.options import Options, resolve_temperature
from internvl3_jax.inference.text_stream import TextStreamer

MAX_ROWS = 64  # answers that decode together


class Asked:
    """A question in an engine.

    Args:
      adapter: name of the LoRA adapter, or None.
      scaling: of the rope.
      seed: of the sampling, in place of that of the options.
      is_greedy: decode greedily, whatever the options say.
      watch: has been running since the question; None starts one.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: Prompt,
        options: Options,
        tokenizer: Tokenizer,
        *,
        adapter: str | None,
        scaling: str,
        seed: int,
        is_greedy: bool = False,
        watch: Stopwatch | None = None,
    ):
        self._engine, self._prompt, self._options = engine, prompt, options
        self._streamer = TextStreamer(tokenizer, options.stop)
        self._watch = watch or Stopwatch(engine.generator.compile_clock)
        self._new = ""
        temperature = resolve_temperature(options.temperature, options.thinking)
        sampling = RowSampling(
            temperature=0.0 if is_greedy else temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=seed,
        )
        request = Request(
            prompt,
            sampling,
            options.max_new_tokens,
            engine.stop_ids,
            scaling,
            adapter,
            flash=options.flash,
        )
        self.ticket = engine.submit(request, self._read)

    def _read(self, piece: Piece) -> None:
        if piece.ids:
            self._watch.first_token()
        self._new += self._streamer.read(piece.ids)
        if piece.finish is not None:
            self._new += self._streamer.finish()
            self._watch.stop()
        elif self._streamer.ended:
            self._engine.cancel(self.ticket)

    def stream(self) -> Iterator[str]:
        """Yields the text as it comes. Nobody else may step the engine. A caller that leaves
        before the end ends the request.
        """
        try:
            while self.ticket.finish is None:
                self._engine.step()
                piece, self._new = self._new, ""
                yield piece
        finally:
            if self.ticket.finish is None:
                self._engine.cancel(self.ticket)
                self._engine.run()

    def answer(self, keep_start: bool = False) -> Answer:
        """Returns the answer of a finished request. keep_start: as of `text_fields`.

        Raises:
          Exception: the error that ended it, such as NotFiniteError.
        """
        if self.ticket.error is not None:
            raise self.ticket.error
        ids, watch = self._streamer.ids, self._watch
        prompt = self.ticket.request.prompt  # as it was run
        return Answer(
            **text_fields(
                self._streamer, self._options, self._engine.stop_ids, keep_start, self._prompt.shown
            ),
            token_ids=ids,
            prompt_tokens=len(prompt.tokens),
            tiles=[len(tiles) for tiles in prompt.tiles],
            compressed_tiles=[int(tiles.sum()) for tiles in prompt.compressed or ()],
            seconds=watch.seconds,
            first_token_seconds=watch.first_token_seconds,
            reused_tokens=self.ticket.reused_tokens,
            compile_seconds=watch.compile_seconds,
            model_runs=len(ids) - 1,
            plan=self._prompt.plan,
        )


class Engines:
    """The engine of a generator, which has more rows where more answers are asked for together."""

    def __init__(self, generator: Generator):
        self._generator = generator
        self._engine: Engine | None = None
        self._rows = 0

    def with_rows(self, answers: int) -> Engine:
        """Returns an engine for this many answers: with a power of two of rows, at most MAX_ROWS."""
        rows = 1
        while rows < min(answers, MAX_ROWS):
            rows *= 2
        if self._engine is None or rows != self._rows or self._engine.failed is not None:
            self._engine = None  # frees its memory first
            self._engine, self._rows = Engine(self._generator, rows), rows
        return self._engine

    def forget(self) -> None:
        """Forgets stored prompts, as `Engine.forget` does."""
        if self._engine is not None:
            self._engine.forget()


def run_all(engine: Engine, asked: Sequence[Asked], keep_start: bool = False) -> list[Answer]:
    """Returns the answers to questions that were asked."""
    engine.run()
    return [one.answer(keep_start) for one in asked]
