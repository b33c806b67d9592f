"""Talking to a model: `Chat` keeps a conversation and the cache of its earlier turns; `answer_many`
and `candidates` take independent questions, the latter with several answers to each.

chat = Chat(load("checkpoints/internvl3-1b"))
chat("What is in the picture?", images=["cat.jpg"])
chat("And what colour is it?")                        # the picture is not encoded again
for piece in chat.stream("Tell me more."): print(piece, end="")
"""

import dataclasses
import hashlib
import os
import time
from collections.abc import Iterator, Sequence

import numpy as np

from internvl3_jax.config import UNITS, ProcessorConfig
from internvl3_jax.data.batch import Prompt, cut_images, make_prompt
from internvl3_jax.data.text.chat_template import ChatError, insert_missing_tags
from internvl3_jax.inference.generator import GenerationConfig, Generator, State
from internvl3_jax.inference.given_images import open_images
from internvl3_jax.inference.options import Options, units
from internvl3_jax.inference.sampling import Sampling
from internvl3_jax.inference.text_stream import TextStreamer
from internvl3_jax.io.terminal import excerpt
from internvl3_jax.positions import rope_scaling


@dataclasses.dataclass
class Answer:
    """What was answered, and what it took."""

    text: str
    token_ids: list[int]  # as generated; the stop id is the last one when it was generated
    prompt_tokens: int
    tiles: list[int]  # of each picture of the conversation, thumbnails included
    seconds: float  # from the question to the last token
    first_token_seconds: float
    reused_tokens: int = 0  # of the prompt, already in the cache from earlier turns
    finish: str = "stop"  # "stop": by a stop token or text; "length": cut off by max_new_tokens

    @property
    def seconds_per_token(self) -> float:
        """Of the tokens after the first; 0.0 if there is only one."""
        following = len(self.token_ids) - 1
        return (self.seconds - self.first_token_seconds) / following if following > 0 else 0.0


@dataclasses.dataclass
class _Cached:
    """The cache of a conversation, and the tokens that its slots stand for."""

    state: State
    prompt: Prompt
    tokens: np.ndarray
    positions: np.ndarray
    scaling: str


class Chat:
    """A conversation with a checkpoint from `internvl3_jax.load`. Keyword arguments are those of
    `Options`.

    adapter: of those that `load` was given, the name of the one that is put on; None for the base.
        `use` changes it.
    """

    def __init__(self, checkpoint, adapter: str | None = None, **options):
        if not hasattr(checkpoint, "params"):
            given = (
                excerpt(checkpoint)
                if isinstance(checkpoint, str | os.PathLike)
                else type(checkpoint).__name__
            )
            raise TypeError(
                f"Chat needs what internvl3_jax.load returns, not {given}; write Chat(load(...))"
            )
        self.options = Options().with_changes(options)
        self.tokenizer, self.processor = checkpoint.tokenizer, checkpoint.processor
        stop_ids = [self.tokenizer.token_id(token) for token in self.processor.stop_tokens]
        self.generator = Generator(
            checkpoint.config,
            checkpoint.params,
            checkpoint.model.dtype,
            stop_ids,
            checkpoint.adapters,
        )
        self.use(adapter)

    def use(self, adapter: str | None) -> None:
        """Resumes with another adapter, in a new conversation. ValueError if none has this name."""
        if adapter is not None and not isinstance(adapter, str):
            raise ValueError(
                f"adapter is {excerpt(adapter)}; give the name of one, as `load` was given it"
            )
        self.generator.use(adapter)
        self.reset()

    def reset(self) -> None:
        """Forgets the conversation."""
        self.messages: list[dict] = []
        self.tiles: list[np.ndarray] = []  # of every picture so far
        self.deltas: list[int] = []
        self.last: Answer | None = None
        self._cached: _Cached | None = None

    def __call__(self, question: str, images=(), **options) -> str:
        """The answer as text.

        Args:
          question: a text; `<image>` in it marks the images' places.
          images: one image or a list of them, each a path (a text is one path), bytes, an array
              u8[H,W,3] or a PIL image.
          options: as of `Options`, for this answer alone.
        """
        for _ in self.stream(question, images, **options):
            pass
        return self.last.text

    def stream(self, question: str, images=(), **options) -> Iterator[str]:
        """Yields the answer piece by piece; `self.last` is the whole `Answer` afterwards.

        A turn that fails, or that the caller leaves before its end, does not enter the
        conversation.
        """
        began = time.perf_counter()
        options = self.options.with_changes(options)
        tiles, deltas = _pictures(images, self.processor, options)
        messages = (self.messages or _opening(options)) + insert_missing_tags(
            [_user(question)], len(tiles)
        )
        tiles, deltas = self.tiles + tiles, self.deltas + deltas
        prompt = make_prompt(messages, tiles, self.tokenizer, self.processor, deltas)
        run = options.run(1, self._scaling(options, deltas))
        self.generator.check_room(prompt, run)
        keep = self._reusable(prompt, run.scaling)
        cache = self._cached.state.cache if keep else None
        self._cached = None  # its buffers are given away
        state = self.generator.start([prompt], run, cache, keep)
        reader, first_token = TextStreamer(self.tokenizer, options.stop), 0.0
        for (piece,) in self.generator.stream(state, run):
            first_token = first_token or time.perf_counter() - began
            yield reader.read(piece)
            if reader.ended:
                break
        yield reader.finish()
        seconds = time.perf_counter() - began
        counts = [len(part) for part in tiles]
        finish = self._finish(reader, options)
        self.last = Answer(
            reader.text.strip(),
            reader.ids,
            len(prompt.tokens),
            counts,
            seconds,
            first_token,
            keep,
            finish,
        )
        self.messages = [*messages, {"role": "assistant", "content": self.last.text}]
        self.tiles, self.deltas = tiles, deltas
        self._cached = _remember(state, prompt, reader.ids, run.scaling)

    def prepare(
        self, question: str, images=(), *, where: str = "", begun: str = "", **options
    ) -> Prompt:
        """The prompt of a question as a conversation of its own, for `answer_many` and
        `candidates`.

        Args:
          where: what errors call the question.
          begun: text that its answer starts with.

        Raises:
          ChatError, ImageError, ContextError, OSError: it cannot be asked: its text or tags, an
          image, or its length.
        """
        options = self.options.with_changes(options)
        tiles, deltas = _pictures(images, self.processor, options)
        messages = _opening(options) + insert_missing_tags([_user(question)], len(tiles), where)
        prompt = make_prompt(messages, tiles, self.tokenizer, self.processor, deltas, where)
        if begun:
            prompt = _continued(prompt, self.tokenizer.encode(begun, special=False))
        self.generator.check_room(prompt, options.run(1, self._scaling(options, [])), where)
        return prompt

    def answer_many(
        self, requests: Sequence[tuple[str, Sequence] | Prompt], first: int = 1, **options
    ) -> list[Answer]:
        """Answers (question, images) pairs, or prompts of `prepare`, in one batch, each as a
        conversation of its own; this one stays.

        Every answer is the one that its question alone would get. Seconds are those of the whole
        batch. Errors number the requests from `first`.
        """
        return [answer for (answer,) in self.candidates(requests, 1, first=first, **options)]

    def candidates(
        self,
        requests: Sequence[tuple[str, Sequence] | Prompt],
        n: int,
        *,
        greedy_first: bool = False,
        begun: Sequence[str] = (),
        first: int = 1,
        **options,
    ) -> list[list[Answer]]:
        """n answers to each of the (question, images) pairs, or prompts of `prepare`, in one batch;
        a question is run once for all of its answers.

        Args:
          greedy_first: the first answer takes the likeliest tokens, only the others are drawn.
              Answer k is drawn with seed + k.
          begun: text that each request's answers start with; they are what follows it, with the
              space or line break they begin with.
          first: number of the first request in errors.
        """
        if n < 1:
            raise ValueError(f"n is {n}; it must be at least 1")
        if not requests:
            return []
        began = time.perf_counter()
        given, options = options, self.options.with_changes(options)
        sampling = Sampling(
            options.temperature, options.top_k, options.top_p, greedy_every=n if greedy_first else 0
        )
        seeds = tuple((options.seed + number) % 2**32 for number in range(n)) * len(requests)
        run = GenerationConfig(options.max_new_tokens, sampling, seeds, self._scaling(options, []))
        prompts = []
        for number, request in enumerate(requests, first):
            if not isinstance(request, Prompt):
                start = begun[number - first] if begun else ""
                request = self.prepare(*request, where=f"request {number}", begun=start, **given)
            prompts.append(request)
        readers, first_token = [TextStreamer(self.tokenizer, options.stop) for _ in seeds], 0.0
        for pieces in self.generator.stream(self.generator.start(prompts, run), run):
            first_token = first_token or time.perf_counter() - began
            for reader, piece in zip(readers, pieces, strict=True):
                reader.read(piece)
            if all(reader.ended for reader in readers):
                break
        for reader in readers:
            reader.finish()
        seconds = time.perf_counter() - began
        rows = [prompt for prompt in prompts for _ in range(n)]
        answers = [
            Answer(
                reader.text.rstrip() if begun else reader.text.strip(),
                reader.ids,
                len(row.tokens),
                [len(part) for part in row.tiles],
                seconds,
                first_token,
                finish=self._finish(reader, options),
            )
            for reader, row in zip(readers, rows, strict=True)
        ]
        return [answers[start : start + n] for start in range(0, len(answers), n)]

    def _finish(self, reader: TextStreamer, options: Options) -> str:
        stopped = reader.ended or (reader.ids and reader.ids[-1] in self.generator.stop_ids)
        return "stop" if stopped or len(reader.ids) < options.max_new_tokens else "length"

    def _scaling(self, options: Options, deltas: Sequence[int]) -> str:
        """Returns the rope scaling of a run. deltas: Units of earlier images of the conversation."""
        own = [self.processor.delta] if options.delta is None else units(options.delta)
        return rope_scaling(self.generator.config.language, [*own, *deltas])

    def _reusable(self, prompt: Prompt, scaling: str) -> int:
        """How many leading tokens of the prompt have their keys and values in the cache.

        Tokens, positions and pictures are compared, so that the answer is the one without reuse,
        even where an earlier answer's text is tokenised differently from how it was generated.
        """
        cached, language = self._cached, self.generator.config.language
        if cached is None or cached.scaling != scaling:
            return 0
        if scaling == "dynamic" and prompt.positions[-1] // UNITS >= language.max_position:
            return 0  # the frequencies depend on the length, which has changed
        length = min(len(cached.tokens), len(prompt.tokens) - 1)
        same = (cached.tokens[:length] == prompt.tokens[:length]) & (
            cached.positions[:length] == prompt.positions[:length]
        )
        keep = length if same.all() else int(np.argmin(same))
        for number, (start, count) in enumerate(prompt.runs):
            known = number < len(cached.prompt.tiles) and _digest(
                cached.prompt.tiles[number]
            ) == _digest(prompt.tiles[number])
            if start < keep and (not known or keep < start + count):
                return start
        return keep


def _pictures(
    images, processor: ProcessorConfig, options: Options
) -> tuple[list[np.ndarray], list[int]]:
    """Tiles and V2PE units of the images of one turn."""
    opened = open_images(images, processor, options)
    deltas = [processor.delta] if options.delta is None else units(options.delta)
    if len(deltas) == 1:
        deltas = deltas * len(opened)
    if len(deltas) != len(opened):
        raise ChatError(
            f"{len(deltas)} deltas for {len(opened)} pictures; give one, or one per picture"
        )
    limits = {"tiles": options.tiles, "max_total_tiles": options.max_total_tiles}
    return cut_images(opened, processor, options.max_tiles, **limits), deltas


def _user(text: str) -> dict:
    return {"role": "user", "content": text}


def _opening(options: Options) -> list[dict]:
    return [] if options.system is None else [{"role": "system", "content": options.system}]


def _continued(prompt: Prompt, ids: Sequence[int]) -> Prompt:
    """The prompt with the beginning of its answer."""
    tokens, positions = _followed(prompt, ids)
    return Prompt(tokens, positions, prompt.runs, prompt.tiles)


def _followed(prompt: Prompt, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and positions of a prompt and of text after it."""
    following = prompt.positions[-1] + UNITS * np.arange(1, len(ids) + 1, dtype=np.int32)
    return np.concatenate([prompt.tokens, np.asarray(ids, np.int32)]), np.concatenate(
        [prompt.positions, following]
    )


def _remember(state: State, prompt: Prompt, ids: Sequence[int], scaling: str) -> _Cached:
    # The last id drawn has not been run, so it has no keys and values yet.
    return _Cached(state, prompt, *_followed(prompt, ids[:-1]), scaling)


def _digest(tiles: np.ndarray) -> bytes:
    return hashlib.sha256(tiles.tobytes()).digest()
