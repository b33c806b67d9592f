"""A process reward model (critic): how likely each step of a solution is right, in one forward pass
for each solution.

critic = Critic(load("checkpoints/visualprm-8b"))
best = max(critic.score("How many?", ["shapes.png"], solutions), key=lambda scores: scores.score)

The model is an ordinary checkpoint that was trained to answer + or - after every step
(data/steps.py). Its + and - are compared where the answer to each step would begin. The question,
its pictures included, is run once for all solutions; each goes on from a copy of the cache.

B solutions, S steps, V vocabulary.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from internvl3_jax.config import UNITS
from internvl3_jax.data.batch import Prompt, cut_images
from internvl3_jax.data.critic_format import BAD, GOOD, critic_messages, split_steps
from internvl3_jax.data.text.chat_template import ChatError, encode_chat, insert_missing_tags
from internvl3_jax.inference.generator import GenerationConfig, Generator, NotFiniteError, bucket
from internvl3_jax.inference.given_images import open_images
from internvl3_jax.inference.options import Options, whole
from internvl3_jax.inference.sampling import Sampling
from internvl3_jax.io.strict_json import suggestion
from internvl3_jax.model import lora
from internvl3_jax.model.internvl import InternVL
from internvl3_jax.parallel.collectives import constrain
from internvl3_jax.positions import build_positions, rope_scaling

AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": lambda scores: sum(scores) / len(scores),
    "min": min,
    "max": max,
    "product": math.prod,
}
AMONG = ("labels", "vocabulary")


@dataclasses.dataclass(frozen=True)
class StepScores:
    """What a critic thinks of a solution."""

    steps: list[str]  # after merging
    scores: list[float]  # probability that each is right
    score: float  # of the whole


IMAGE_OPTIONS = ("max_tiles", "tiles", "max_total_tiles", "max_image_pixels", "allow_truncated")


@dataclasses.dataclass
class CriticOptions:
    """How solutions are judged. The defaults are the reference's (`select_best_response` of
    VisualPRM, version soft_v2).
    """

    # neighbouring steps are merged to at most so many; VisualPRM's paper has 12
    max_steps: int | None = None
    aggregate: str = "mean"  # of the steps; or "min", "max", "product"
    among: str = "labels"  # + against -; "vocabulary": + against all tokens
    # in place of the checkpoint's system message; data/steps.py has SYSTEM, that of VisualPRM's
    # training
    system: str | None = None
    max_tiles: int | None = None  # this and the next four as of `Chat`
    tiles: str | None = None
    max_total_tiles: int | None = None
    max_image_pixels: int | None = None
    allow_truncated: bool = False
    batch_size: int = 8  # solutions run together

    def __post_init__(self):
        choices = (("aggregate", self.aggregate, tuple(AGGREGATES)), ("among", self.among, AMONG))
        for name, value, known in choices:
            if value not in known:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
        self.batch_size = whole("batch_size", self.batch_size, 1)
        images = {name: getattr(self, name) for name in IMAGE_OPTIONS}
        Options(system=self.system, **images)  # checks them
        split_steps("", self.max_steps)


class Critic:
    """Keyword arguments are those of `CriticOptions`.

    Args:
      checkpoint: of `internvl3_jax.load`.
      generator: that holds the checkpoint's parameters already (`chat.generator`), if the critic is
          the model that answers.
    """

    def __init__(self, checkpoint, generator: Generator | None = None, **options):
        known = [field.name for field in dataclasses.fields(CriticOptions)]
        for name in options:
            if name not in known:
                raise TypeError(f"Critic has no option {name!r}{suggestion(name, known)}")
        self.options = CriticOptions(**options)
        self.tokenizer, self.processor = checkpoint.tokenizer, checkpoint.processor
        self.tokenizer.require(GOOD, BAD)
        self.labels = tuple(map(self.tokenizer.token_id, (GOOD, BAD)))
        self.generator = generator or Generator(
            checkpoint.config, checkpoint.params, checkpoint.model.dtype
        )

    def score(
        self, question: str, images, solutions: Sequence[str], where: str = ""
    ) -> list[StepScores]:
        """Judges solutions of one question. `images` as for `Chat`; where the question has no
        <image> they come before it.

        Raises:
          ChatError, ContextError: the question, or a solution, cannot be read by this model;
          `where` names it.
        """
        if isinstance(solutions, (str, bytes)):
            raise ChatError(f"solutions must be a list, such as [{solutions[:40]!r}]")
        options = self.options
        pictures = open_images(images, self.processor, options)
        limits = {"tiles": options.tiles, "max_total_tiles": options.max_total_tiles}
        tiles = cut_images(pictures, self.processor, options.max_tiles, **limits)
        (turn,) = insert_missing_tags([{"role": "user", "content": question}], len(tiles), where)
        distinct = list(dict.fromkeys(solutions))  # sampled solutions repeat
        steps = {solution: split_steps(solution, self.options.max_steps) for solution in distinct}
        prompts = {
            solution: self._prompt(turn["content"], steps[solution], tiles, where)
            for solution in distinct
        }
        by_length = sorted(distinct, key=lambda solution: len(prompts[solution][0].tokens))
        found = {}
        for start in range(0, len(by_length), self.options.batch_size):
            batch = by_length[start : start + self.options.batch_size]
            for solution, scores in zip(
                batch, self._judge([prompts[solution] for solution in batch]), strict=True
            ):
                found[solution] = StepScores(
                    steps[solution], scores, AGGREGATES[self.options.aggregate](scores)
                )
        return [found[solution] for solution in solutions]

    def _prompt(
        self, question: str, steps: list[str], tiles: list[np.ndarray], where: str
    ) -> tuple[Prompt, list[int]]:
        """The conversation about one solution, and the indices of the tokens after which its labels
        come.
        """
        messages = critic_messages(question, steps, system=self.options.system)
        counts = [len(part) for part in tiles]
        encoded = encode_chat(
            messages,
            counts,
            self.tokenizer,
            self.processor,
            add_generation_prompt=False,
            where=where,
        )
        positions = build_positions(
            len(encoded.tokens), encoded.runs, [self.processor.delta] * len(tiles)
        )
        prompt = Prompt(encoded.tokens, positions, encoded.runs, tiles)
        reader = f"{where}, read by the critic" if where else "the critic"
        self.generator.check_room(
            prompt, GenerationConfig(0, Sampling(), (), self._scaling()), reader
        )
        starts = np.flatnonzero(np.diff(encoded.loss_mask.astype(int), prepend=0) == 1)
        if (encoded.tokens[starts] != self.labels[0]).any():
            raise ValueError(
                f"the tokenizer joins {GOOD} with what stands before it; this model cannot be a critic"
            )
        return prompt, (starts - 1).tolist()

    def _scaling(self) -> str:
        return rope_scaling(self.generator.config.language, [self.processor.delta])

    def _judge(self, batch: list[tuple[Prompt, list[int]]]) -> list[list[float]]:
        """Scores of the steps of a batch of solutions of one question."""
        prompts, places = zip(*batch, strict=True)
        logs = label_log_probabilities(
            self.generator, prompts, places, self.labels, self._scaling()
        )
        if not all(np.isfinite(row).all() for row in logs):
            raise NotFiniteError(
                "the critic gives NaN or infinite logits; its weights are damaged, or its dtype is too narrow: try float32"
            )
        if self.options.among == "labels":
            return [np.exp(row[:, 0] - np.logaddexp(*row.T)).tolist() for row in logs]
        return [np.exp(row[:, 0]).tolist() for row in logs]


def label_log_probabilities(
    generator: Generator,
    prompts: Sequence[Prompt],
    places: Sequence[Sequence[int]],
    ids: Sequence[int],
    scaling: str,
) -> list[np.ndarray]:
    """f32[S,len(ids)] of each prompt: log-probability, over the vocabulary, of each of `ids` after
    the token at each place.

    Tokens that all prompts begin with are run once.
    """
    keep = _shared(prompts, min(map(min, places)))
    if (
        scaling == "dynamic"
        and max(prompt.positions[-1] for prompt in prompts) // UNITS
        >= generator.config.language.max_position
    ):
        keep = 0  # the frequencies depend on the length of each
    rows = 1 << (len(prompts) - 1).bit_length()  # 1, 2, 4 ...: few compiled programs
    prompts = [*prompts, *[prompts[-1]] * (rows - len(prompts))]
    length = bucket(max(len(prompt.tokens) for prompt in prompts) - keep)
    slots = bucket(max(keep + length, bucket(keep) if keep else 0))
    if keep:
        cache = generator.empty_cache(1, slots)
        shared = [
            dataclasses.replace(
                prompts[0], tokens=prompts[0].tokens[:keep], positions=prompts[0].positions[:keep]
            )
        ]
        _, cache = _run(generator, shared, bucket(keep), 0, cache, scaling)
        cache = generator.repeat(cache, rows)
    else:
        cache = generator.empty_cache(rows, slots)
    hidden, _ = _run(generator, prompts, length, keep, cache, scaling)
    most = max(map(len, places))
    table = np.zeros((rows, 1 << (most - 1).bit_length()), np.int32)
    for row, found in enumerate(places):
        table[row, : len(found)] = np.asarray(found) - keep
    with generator.on_mesh():
        logs = np.asarray(
            _log_probabilities(
                generator.model, generator.params, hidden, table, np.asarray(ids, np.int32)
            )
        )
    return [row[: len(found)] for row, found in zip(logs, places, strict=False)]


def _shared(prompts: Sequence[Prompt], limit: int) -> int:
    """How many tokens all prompts begin with, at most `limit`; none if that would cut a picture
    off.
    """
    length = min(limit, *(len(prompt.tokens) for prompt in prompts))
    same = np.ones(length, bool)
    for prompt in prompts[1:]:
        same &= (prompt.tokens[:length] == prompts[0].tokens[:length]) & (
            prompt.positions[:length] == prompts[0].positions[:length]
        )
    keep = length if same.all() else int(np.argmin(same))
    return keep if all(start + count <= keep for start, count in prompts[0].runs) else 0


def _run(
    generator: Generator, prompts: Sequence[Prompt], length: int, keep: int, cache, scaling: str
):
    """Runs the prompts from token `keep` on, padded to `length`, into the cache: (hidden
    [B,length,D], cache).
    """
    tokens, positions = np.zeros((2, len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        count = len(prompt.tokens) - keep
        tokens[row, :count], positions[row, :count] = prompt.tokens[keep:], prompt.positions[keep:]
        positions[row, count:] = prompt.positions[-1]
    slots = np.broadcast_to(keep + np.arange(length, dtype=np.int32), tokens.shape)
    visual = generator.features(prompts, length, keep)
    with generator.on_mesh():
        return _step(
            generator.model, generator.params, tokens, visual, positions, slots, cache, scaling
        )


@functools.partial(jax.jit, static_argnums=(0, 7), donate_argnums=6)
def _step(model, params, tokens, visual, positions, slots, cache, scaling):
    return model.apply(
        lora.variables(params),
        tokens,
        visual,
        positions,
        slots,
        cache,
        scaling,
        method=InternVL.step,
    )


@functools.partial(jax.jit, static_argnums=0)
def _log_probabilities(model, params, hidden, places, ids):
    """hidden [B,T,D], places i32[B,S], ids i32[n] -> f32[B,S,n]. The head runs at the places alone."""
    hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)
    logits = model.apply(lora.variables(params), hidden, method=InternVL.logits)
    return constrain(
        jax.nn.log_softmax(logits, axis=-1)[..., ids], None, None, None
    )  # whole, so that every process can read it
