"""Conversations with a model.

    chat = Chat(load("checkpoints/internvl3-1b"))
    chat("What is in the image?", images=["cat.jpg"])
    chat("And what color is it?")                      # the image is not encoded again
    for piece in chat.stream("Tell me more."): print(piece, end="")

`answer_many` and `candidates` answer independent questions in one batch, the latter with several
answers to each.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Unpack

import numpy as np

from internvl3_jax.data.batch import Prompt, make_prompt
from internvl3_jax.data.boxes import ShownImage
from internvl3_jax.inference.answer import Answer, Stopwatch, cut_reasoning
from internvl3_jax.inference.asked import Asked, Engines, run_all
from internvl3_jax.inference.direct_run import DirectRun
from internvl3_jax.inference.engine.engine import Engine
from internvl3_jax.inference.flash import uses_router
from internvl3_jax.inference.generator import Generator
from internvl3_jax.inference.options import OptionChanges, Options
from internvl3_jax.inference.prompt_cache import PromptCache, extend_prompt
from internvl3_jax.inference.turn import Turn, TurnReader
from internvl3_jax.io.terminal import excerpt


class Chat:
    """A conversation with a checkpoint.

    Args:
      checkpoint: of `internvl3_jax.load`.
      adapter: name of the LoRA adapter, of those given to `load`, that is put on; None for the
        base. `use` changes it.
      cache: "int8" keeps keys and values in 8 bits; None: in the dtype of the computation.
      donate: take the parameters out of the checkpoint, which can then do nothing else with them.
        Otherwise accelerators hold the layers twice, there and in the layout of generation.
      max_new_tokens ... flash: as of `Options`, for all answers; a call can change them for one.

    Attributes:
      last: the last `Answer`; None before the first.
      on_turn: called with the `Turn` of a question, its images and its plan, before its answer.

    Raises:
      TypeError: `checkpoint` is a path, for example.
      ValueError: an option has a wrong type or is out of range, the adapter does not exist, or the
        checkpoint has no stop tokens.
    """

    def __init__(
        self,
        checkpoint,
        adapter: str | None = None,
        *,
        cache: str | None = None,
        donate: bool = False,
        max_new_tokens: int = 1024,
        temperature: float | None = None,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        prompt_lookup: bool = False,
        stop: str | Sequence[str] = (),
        delta: str | float | Sequence | None = None,
        max_tiles: int | None = None,
        tiles: str | None = None,
        max_total_tiles: int | None = None,
        max_image_pixels: int | None = None,
        allow_truncated: bool = False,
        cache_gib: float | None = None,
        system: str | None = None,
        thinking: bool = False,
        flash: str | None = None,
    ):
        arguments = locals()
        if not hasattr(checkpoint, "params"):
            is_path = isinstance(checkpoint, str | os.PathLike)
            given = excerpt(checkpoint) if is_path else type(checkpoint).__name__
            raise TypeError(
                f"Chat needs what internvl3_jax.load returns, not {given}; write Chat(load(...))"
            )
        self.options = Options(**{name: arguments[name] for name in OptionChanges.__annotations__})
        uses_router(flash, checkpoint.config)
        if cache not in (None, "int8"):
            raise ValueError(f"cache is {excerpt(cache)}; it must be int8, or None")
        self.tokenizer, self.processor = checkpoint.tokenizer, checkpoint.processor
        self.generator = Generator(
            checkpoint.config,
            checkpoint.take_params(donate),
            checkpoint.model.dtype,
            [self.tokenizer.token_id(token) for token in self.processor.stop_tokens],
            checkpoint.adapters,
            cache,
            donate,
        )
        self.engines, self._own = Engines(self.generator), Engines(self.generator)
        self._reader = TurnReader(checkpoint, self.generator.cache_dtype)
        self.on_turn: Callable[[Turn], None] | None = None
        self.use(adapter)

    def __repr__(self) -> str:
        adapter = "" if self._adapter is None else f", adapter={self._adapter!r}"
        changed = "".join(
            f", {field.name}={getattr(self.options, field.name)!r}"
            for field in dataclasses.fields(self.options)
            if getattr(self.options, field.name) != field.default
        )
        return f"Chat(<{len(self._turns)} turns, {len(self.tiles)} images>{adapter}{changed})"

    def use(self, adapter: str | None) -> None:
        """Puts another adapter on, or none, and begins a new conversation.

        Raises:
          ValueError: there is no adapter of this name.
        """
        if adapter is not None and not isinstance(adapter, str):
            raise ValueError(
                f"adapter is {excerpt(adapter)}; give its name, as it was given to `load`"
            )
        self.generator.use(adapter)
        self._adapter = adapter
        self.reset()

    def reset(self) -> None:
        """Begins a new conversation."""
        self.messages: list[dict] = []
        self.tiles: list[np.ndarray] = []  # of each image so far
        self.deltas: list[int] = []
        self.shown: list[list[ShownImage]] = []  # what boxes of each turn's answer are about
        self.last: Answer | None = None
        self._turns: list[tuple[int, int]] = []  # messages and images before each turn
        self._forget()

    def _forget(self) -> None:
        """Makes nothing of what was run so far usable for the next answer."""
        self._cached: PromptCache | None = None
        self._own.forget()

    def undo(self) -> None:
        """Takes back the last question, its images and its answer.

        Raises:
          ValueError: the conversation is empty.
        """
        if not self._turns:
            raise ValueError("the conversation is empty: there is no question to take back")
        messages, images = self._turns.pop()
        del self.messages[messages:], self.tiles[images:], self.deltas[images:], self.shown[-1:]
        self.last = None

    def __call__(
        self, question: str, images=(), videos=(), documents=(), **options: Unpack[OptionChanges]
    ) -> str:
        """Returns the answer as text.

        Args:
          question: a text; `<image>`, `<video>` and `<document>` in it mark the places.
          images: one image or a list of them, each a path (a str is one path), bytes, an array
            u8[H,W,3] or a PIL image.
          videos: one or a list, each a path, bytes or a `Video` with its settings.
          documents: one PDF or a list, each a path, bytes or a `Document` with its settings.
          options: as of `Options`, for this answer alone.

        Raises:
          ValueError: the reasoning was cut off, so that there is no answer.
        """
        for _ in self.stream(question, images, videos, documents, **options):
            pass
        if self.last.finish == "reasoning":
            raise ValueError(f"{cut_reasoning(self.last)}; raise max_new_tokens")
        return self.last.text

    def stream(
        self, question: str, images=(), videos=(), documents=(), **options: Unpack[OptionChanges]
    ) -> Iterator[str]:
        """Yields the answer piece by piece; `self.last` is the whole `Answer` afterwards.

        A turn that fails, that has no answer after its reasoning, or that the caller leaves before
        its end does not enter the conversation. Of the others the answer enters, no reasoning.
        """
        watch = Stopwatch(self.generator.compile_clock)
        options = self.options.with_changes(options)
        # 1) The conversation so far and the question, as one prompt.
        earlier = self.messages, self.tiles, self.deltas
        turn = self._reader.read(question, (images, videos, documents), options, earlier)
        tiles, deltas = self.tiles + turn.tiles, self.deltas + turn.deltas
        prompt = self._prompt(turn, tiles, deltas)
        config = options.generation_config((options.seed,), self._reader.scaling(options, deltas))
        self.generator.check_context_length(prompt, config)
        # 2) Answer, from where the cache of the conversation ends.
        if options.prompt_lookup:
            cached, self._cached = self._cached, None
            run = DirectRun(
                self.generator, [prompt], config, options, self.tokenizer, watch, cached
            )
            for (piece,) in run.stream():
                yield piece
            self.last, self._cached = run.answer(), run.cached()
        else:
            engine = self._own.with_rows(1)
            asked = self.ask(engine, prompt, options, scaling=config.scaling, watch=watch)
            yield from asked.stream()
            self.last = asked.answer()
        # 3) The turn is complete: it enters the conversation.
        if self.last.finish == "reasoning":
            return
        self._turns.append((len(self.messages), len(self.tiles)))
        self.messages = [*turn.messages, {"role": "assistant", "content": self.last.text}]
        self.tiles, self.deltas = tiles, deltas
        self.shown.append(prompt.shown)

    def prepare(
        self,
        question: str,
        images=(),
        videos=(),
        documents=(),
        *,
        where: str = "",
        answer_prefix: str = "",
        **options: Unpack[OptionChanges],
    ) -> Prompt:
        """Returns the prompt of a question as a conversation of its own, for `answer_many` and
        `candidates`.

        Args:
          question, images, videos, documents: as of a call.
          where: what errors call the question.
          answer_prefix: text that its answer begins with.

        Raises:
          ChatError: the text or its tags do not fit.
          ImageError, VideoError, DocumentError: an input cannot be read.
          ContextError, PlanError: the prompt is too long.
        """
        options = self.options.with_changes(options)
        turn = self._reader.read(question, (images, videos, documents), options, where=where)
        prompt = self._prompt(turn, turn.tiles, turn.deltas, where=where)
        if answer_prefix:
            prompt = extend_prompt(prompt, self.tokenizer.encode(answer_prefix, special=False))
        scaling = self._reader.scaling(options, turn.deltas)
        config = options.generation_config((options.seed,), scaling)
        self.generator.check_context_length(prompt, config, where)
        return prompt

    def _prompt(self, turn: Turn, tiles, deltas, where: str = "") -> Prompt:
        """Makes the prompt of a turn. tiles, deltas: of the conversation with it."""
        if self.on_turn:
            self.on_turn(turn)
        prompt = make_prompt(turn.messages, tiles, self.tokenizer, self.processor, deltas, where)
        shown = turn.shown or (self.shown[-1] if tiles and self.shown else [])
        return dataclasses.replace(prompt, shown=shown, plan=turn.plan)

    def answer_many(
        self, requests: Sequence[tuple[str, Any] | Prompt], **options: Unpack[OptionChanges]
    ) -> list[Answer]:
        """Answers (question, images) pairs, or prompts of `prepare`, in one batch.

        Each is a conversation of its own, and gets the answer that it would get alone; the
        conversation of this object does not change. Seconds are those of the whole batch.
        """
        return [answer for (answer,) in self.candidates(requests, 1, **options)]

    def candidates(
        self,
        requests: Sequence[tuple[str, Any] | Prompt],
        n: int,
        *,
        greedy_first: bool = False,
        answer_prefixes: Sequence[str] = (),
        names: Sequence[str] = (),
        **options: Unpack[OptionChanges],
    ) -> list[list[Answer]]:
        """Returns n answers to each of the (question, images) pairs, or prompts of `prepare`.

        All run in one batch, each question once for all of its answers. Answer k is sampled with
        the seed `seed + k`.

        Args:
          greedy_first: decode the first answer to each question greedily; sample the others.
          answer_prefixes: text that the answers to each pair begin with. The answers do not repeat
            it; they keep the space or line break that they begin with.
          names: what errors call the pairs; by default "request 1" and so on.
        """
        if n < 1:
            raise ValueError(f"n is {n}; it must be at least 1")
        if not requests:
            return []
        # 1) Prompts.
        names = names or [f"request {number}" for number in range(1, len(requests) + 1)]
        prefixes = answer_prefixes or [""] * len(requests)
        prompts = [
            request
            if isinstance(request, Prompt)
            else self.prepare(*request, where=name, answer_prefix=prefix, **options)
            for request, name, prefix in zip(requests, names, prefixes, strict=True)
        ]
        # 2) One request to the engine per answer.
        options = self.options.with_changes(options)
        if options.prompt_lookup:
            seeds = tuple((options.seed + k) % 2**32 for k in range(n)) * len(prompts)
            scaling = self._reader.batch_scaling(options, prompts)
            config = options.generation_config(seeds, scaling, n if greedy_first else 0)
            run = DirectRun(self.generator, prompts, config, options, self.tokenizer)
            answers = run.answers(bool(answer_prefixes))
            return [answers[start : start + n] for start in range(0, len(answers), n)]
        engine = self.engines.with_rows(n * len(prompts))
        asked = [
            self.ask(engine, prompt, options, k, is_greedy=greedy_first and k == 0)
            for prompt in prompts
            for k in range(n)
        ]
        # 3) n answers per prompt.
        answers = run_all(engine, asked, keep_start=bool(answer_prefixes))
        return [answers[start : start + n] for start in range(0, len(answers), n)]

    def ask(
        self,
        engine: Engine,
        prompt: Prompt,
        options: Options,
        k: int = 0,
        *,
        is_greedy: bool = False,
        scaling: str | None = None,
        watch: Stopwatch | None = None,
    ) -> Asked:
        """Gives a prompt to an engine, with the adapter that is on.

        Args:
          k: number of its answer, which is added to the seed.
          scaling: of the rope; None: that of a prompt of `prepare`.
          is_greedy, watch: as of `Asked`.
        """
        return Asked(
            engine,
            prompt,
            options,
            self.tokenizer,
            adapter=self._adapter,
            scaling=scaling or self._reader.batch_scaling(options, [prompt]),
            seed=(options.seed + k) % 2**32,
            is_greedy=is_greedy,
            watch=watch,
        )
