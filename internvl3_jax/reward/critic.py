"""A process reward model (critic): the probability that each step of a solution is right, in one
forward pass per solution.

    critic = Critic(load("checkpoints/visualprm-8b"))
    best = max(critic.score("How many?", ["a.png"], solutions), key=lambda scores: scores.score)

The model is an ordinary checkpoint that was trained to answer + or - after every step
(data/critic_format.py), as VisualPRM (Wang et al. 2025). Its + and - are compared at the token
where the answer to each step would begin. The question, its images included, runs once for all
solutions; each continues from a copy of the cache.

B solutions, N steps, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from internvl3_jax.config import UNITS
from internvl3_jax.data.batch import Prompt, cut_images
from internvl3_jax.data.critic_format import BAD, GOOD, critic_messages, split_steps
from internvl3_jax.data.text.chat_template import ChatError, encode_chat, insert_missing_tags
from internvl3_jax.data.text.reasoning import split_reasoning
from internvl3_jax.inference import programs
from internvl3_jax.inference.generation_config import GenerationConfig
from internvl3_jax.inference.generator import Generator
from internvl3_jax.inference.given_images import open_images
from internvl3_jax.inference.options import Options, check_int
from internvl3_jax.inference.prompt_batch import bucket
from internvl3_jax.inference.sampling import NotFiniteError, Sampling
from internvl3_jax.positions import build_positions, rope_scaling

AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": lambda scores: sum(scores) / len(scores),
    "min": min,
    "max": max,
    "product": math.prod,
}
AMONG = ("labels", "vocabulary")
IMAGE_OPTIONS = ("max_tiles", "tiles", "max_total_tiles", "max_image_pixels", "allow_truncated")


@dataclasses.dataclass(frozen=True)
class StepScores:
    """The scores of a solution.

    Attributes:
      steps: texts of the steps, after merging.
      scores: probability that each step is right.
      score: of the solution, aggregated from the scores.
    """

    steps: list[str]
    scores: list[float]
    score: float


@dataclasses.dataclass
class CriticOptions:
    """Settings by which solutions are scored, by default as in VisualPRM's `select_best_response`,
    version soft_v2.

    Attributes:
      max_steps: largest number of steps; neighbors are merged. VisualPRM's paper has 12. None: no
        limit.
      aggregate: how the scores of the steps give that of the solution, a key of `AGGREGATES`.
      among: "labels": probability of + against -; "vocabulary": against all tokens.
      system: system message in place of the checkpoint's. data/critic_format.py has SYSTEM, that of
        VisualPRM's training.
      max_tiles, tiles, max_total_tiles, max_image_pixels, allow_truncated: as of `Chat`.
      batch_size: solutions that run together.

    Raises:
      ValueError: a value has a wrong type or is out of range.
    """

    max_steps: int | None = None
    aggregate: str = "mean"
    among: str = "labels"
    system: str | None = None
    max_tiles: int | None = None
    tiles: str | None = None
    max_total_tiles: int | None = None
    max_image_pixels: int | None = None
    allow_truncated: bool = False
    batch_size: int = 8

    def __post_init__(self):
        choices = (("aggregate", self.aggregate, tuple(AGGREGATES)), ("among", self.among, AMONG))
        for name, value, known in choices:
            if value not in known:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
        self.batch_size = check_int("batch_size", self.batch_size, 1)
        images = {name: getattr(self, name) for name in IMAGE_OPTIONS}
        Options(system=self.system, **images)  # checks them
        split_steps("", self.max_steps)


class Critic:
    """Scores solutions.

    Args:
      checkpoint: of `internvl3_jax.load`.
      generator: one that holds the checkpoint's parameters already (`chat.generator`), if the
        critic is the model that answers.
      donate: take the parameters out of the checkpoint, as `Chat` does.
      max_steps ... batch_size: as of `CriticOptions`.

    Raises:
      ValueError: an option has a wrong type or is out of range, or the tokenizer lacks + or -.
    """

    def __init__(
        self,
        checkpoint,
        generator: Generator | None = None,
        *,
        donate: bool = False,
        max_steps: int | None = None,
        aggregate: str = "mean",
        among: str = "labels",
        system: str | None = None,
        max_tiles: int | None = None,
        tiles: str | None = None,
        max_total_tiles: int | None = None,
        max_image_pixels: int | None = None,
        allow_truncated: bool = False,
        batch_size: int = 8,
    ):
        self.options = CriticOptions(
            max_steps=max_steps,
            aggregate=aggregate,
            among=among,
            system=system,
            max_tiles=max_tiles,
            tiles=tiles,
            max_total_tiles=max_total_tiles,
            max_image_pixels=max_image_pixels,
            allow_truncated=allow_truncated,
            batch_size=batch_size,
        )
        self.tokenizer, self.processor = checkpoint.tokenizer, checkpoint.processor
        self.tokenizer.require(GOOD, BAD)
        self.labels = tuple(map(self.tokenizer.token_id, (GOOD, BAD)))
        self.generator = generator or Generator(
            checkpoint.config,
            checkpoint.take_params(donate),
            checkpoint.model.dtype,
            donate=donate,
        )

    def __repr__(self) -> str:
        changed = (
            f"{field.name}={getattr(self.options, field.name)!r}"
            for field in dataclasses.fields(self.options)
            if getattr(self.options, field.name) != field.default
        )
        return f"Critic({', '.join(changed)})"

    def score(
        self, question: str, images, solutions: Sequence[str], where: str = ""
    ) -> list[StepScores]:
        """Scores solutions of one question.

        Args:
          question: if it has no <image>, the images come before it.
          images: as for `Chat`.
          solutions: texts; equal ones run once. Reasoning in <think> and </think> is not read.
          where: what errors call the question.

        Raises:
          ChatError: the question or its tags do not fit.
          ContextError: a solution is too long for the model.
          NotFiniteError: the model gives NaN or infinite logits.
        """
        if isinstance(solutions, (str, bytes)):
            raise ChatError(f"solutions must be a list, such as [{solutions[:40]!r}]")
        # 1) One prompt per distinct solution.
        options = self.options
        limits = {"tiles": options.tiles, "max_total_tiles": options.max_total_tiles}
        opened = open_images(images, self.processor, options)
        tiles = cut_images(opened, self.processor, options.max_tiles, **limits)
        (turn,) = insert_missing_tags([{"role": "user", "content": question}], len(tiles), where)
        distinct = list(dict.fromkeys(solutions))
        steps = {
            solution: split_steps(split_reasoning(solution).answer, options.max_steps)
            for solution in distinct
        }
        prompts = {
            solution: self._prompt(turn["content"], steps[solution], tiles, where)
            for solution in distinct
        }
        # 2) Batches of similar length.
        by_length = sorted(distinct, key=lambda solution: len(prompts[solution][0].tokens))
        scored = {}
        for start in range(0, len(by_length), options.batch_size):
            batch = by_length[start : start + options.batch_size]
            batch_scores = self._step_scores([prompts[solution] for solution in batch])
            for solution, scores in zip(batch, batch_scores, strict=True):
                total = AGGREGATES[options.aggregate](scores)
                scored[solution] = StepScores(steps[solution], scores, total)
        return [scored[solution] for solution in solutions]

    def _prompt(
        self, question: str, steps: list[str], tiles: list[np.ndarray], where: str
    ) -> tuple[Prompt, list[int]]:
        """Returns the conversation about one solution, and the index of the token before each
        label.
        """
        messages = critic_messages(question, steps, system=self.options.system)
        encoded = encode_chat(
            messages,
            [len(image_tiles) for image_tiles in tiles],
            self.tokenizer,
            self.processor,
            add_generation_prompt=False,
            where=where,
        )
        deltas = [self.processor.delta] * len(tiles)
        positions = build_positions(len(encoded.tokens), encoded.runs, deltas)
        prompt = Prompt(encoded.tokens, positions, encoded.runs, tiles)
        self.generator.check_context_length(
            prompt,
            GenerationConfig(0, Sampling(), (), self._scaling()),
            f"{where}, read by the critic" if where else "the critic",
        )
        starts = np.flatnonzero(np.diff(encoded.loss_mask.astype(int), prepend=0) == 1)
        if (encoded.tokens[starts] != self.labels[0]).any():
            raise ValueError(
                f"the tokenizer joins {GOOD} with the text before it; this model cannot be a critic"
            )
        return prompt, (starts - 1).tolist()

    def _scaling(self) -> str:
        return rope_scaling(self.generator.config.language, [self.processor.delta])

    def _step_scores(self, batch: list[tuple[Prompt, list[int]]]) -> list[list[float]]:
        """Returns the scores of the steps of a batch of solutions of one question."""
        prompts, indices = zip(*batch, strict=True)
        logs = label_log_probabilities(
            self.generator, prompts, indices, self.labels, self._scaling()
        )
        if not all(np.isfinite(row).all() for row in logs):
            raise NotFiniteError(
                "the critic gives NaN or infinite logits; its weights are damaged, or its dtype is "
                "too narrow: try float32"
            )
        if self.options.among == "labels":
            return [np.exp(row[:, 0] - np.logaddexp(*row.T)).tolist() for row in logs]
        return [np.exp(row[:, 0]).tolist() for row in logs]


def label_log_probabilities(
    generator: Generator,
    prompts: Sequence[Prompt],
    indices: Sequence[Sequence[int]],
    ids: Sequence[int],
    scaling: str,
) -> list[Float[np.ndarray, "_ k"]]:
    """Returns the log-probability, over the vocabulary, of each of `ids` after some tokens.

    Tokens that all prompts begin with run once.

    Args:
      indices: of each prompt, after which of its tokens.
      ids: k token ids.
      scaling: of the rope.

    Returns:
      f32[N,k] of each prompt, N being its number of indices.
    """
    # 1) The beginning that the prompts share runs once.
    keep = _shared_tokens(prompts, min(map(min, indices)))
    max_position = generator.config.language.max_position
    longest = max(prompt.positions[-1] for prompt in prompts) // UNITS
    if scaling == "dynamic" and longest >= max_position:
        keep = 0  # the rope frequencies depend on the length of each prompt
    rows = 1 << (len(prompts) - 1).bit_length()  # 1, 2, 4 ...: few compiled programs
    padded = [*prompts, *[prompts[-1]] * (rows - len(prompts))]
    length = bucket(max(len(prompt.tokens) for prompt in padded) - keep)
    slots = bucket(max(keep + length, bucket(keep) if keep else 0))
    if keep:
        first = prompts[0]
        shared = dataclasses.replace(
            first, tokens=first.tokens[:keep], positions=first.positions[:keep]
        )
        cache = generator.cache_with_room(1, slots)
        _, cache = generator.hidden_states([shared], 0, cache, scaling)
        cache = generator.repeat_cache(cache, rows)
    else:
        cache = generator.cache_with_room(rows, slots)
    # 2) The rest of each prompt.
    hidden, _ = generator.hidden_states(padded, keep, cache, scaling)
    # 3) The head at the indices; rows are padded with index 0.
    longest = max(map(len, indices))
    table = np.zeros((rows, 1 << (longest - 1).bit_length()), np.int32)
    for row, row_indices in enumerate(indices):
        table[row, : len(row_indices)] = np.asarray(row_indices) - keep
    with generator.mesh_context():
        logs = programs.label_log_probabilities(
            generator.model, generator.params, hidden, table, np.asarray(ids, np.int32)
        )
    logs = np.asarray(logs)
    return [logs[row, : len(row_indices)] for row, row_indices in enumerate(indices)]


def _shared_tokens(prompts: Sequence[Prompt], limit: int) -> int:
    """Returns how many tokens, up to `limit`, all prompts begin with; 0 if that would split an
    image.
    """
    length = min(limit, *(len(prompt.tokens) for prompt in prompts))
    same = np.ones(length, bool)
    for prompt in prompts[1:]:
        same &= (prompt.tokens[:length] == prompts[0].tokens[:length]) & (
            prompt.positions[:length] == prompts[0].positions[:length]
        )
    keep = length if same.all() else int(np.argmin(same))
    return keep if all(start + count <= keep for start, count in prompts[0].runs) else 0
