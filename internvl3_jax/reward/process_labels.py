"""Labels of the steps of solutions by Monte Carlo estimation, as the data of VisualPRM (Wang et al.
2025).

From the end of each step several continuations are sampled; the share of them that states the right
answer is the score of the step.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence

from internvl3_jax.data.critic_format import (
    BAD,
    GOOD,
    SEPARATOR,
    SYSTEM,
    critic_messages,
    split_steps,
)
from internvl3_jax.data.text.chat_template import OFFICIAL_ROLES
from internvl3_jax.inference.chat import Chat
from internvl3_jax.reward.answer_matching import extract_answer
from internvl3_jax.reward.matchers import get_matcher
from internvl3_jax.reward.question_output import Result
from internvl3_jax.reward.questions import Question, is_correct

OFFICIAL_NAMES = {role: name for name, role in OFFICIAL_ROLES.items()}


@dataclasses.dataclass
class LabelSettings:
    """Settings by which solutions are labeled, by default as in the scripts of VisualPRM400K-v1.1.

    Attributes:
      solutions: of each question; equal ones are labeled once.
      continuations: from the end of each step.
      temperature, top_k, max_new_tokens: of solutions and continuations.
      max_steps: steps are merged to at most this number.
      threshold: a step with a higher score is a +.
      system: system message of the rows; None writes none.
      batch_size: answers that are generated together.
      matcher: how stated answers are compared with the right one, a name of `MATCHERS`.
      seed: of the sampling.

    Raises:
      ValueError: a value is out of range.
      ImportError: the matcher's package is not installed.
    """

    solutions: int = 4
    continuations: int = 16
    temperature: float = 1.0
    top_k: int = 50
    max_new_tokens: int = 4096
    max_steps: int = 16
    threshold: float = 0.0
    system: str | None = SYSTEM
    batch_size: int = 64
    matcher: str = "rules"
    seed: int = 0

    def __post_init__(self):
        for name in ("solutions", "continuations", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not (math.isfinite(self.threshold) and 0 <= self.threshold < 1):
            raise ValueError(
                f"threshold is {self.threshold}; it must be at least 0 and below 1, since scores "
                "are shares"
            )
        split_steps("", self.max_steps)
        get_matcher(self.matcher)

    def sampling(self) -> dict:
        """Returns the options of `Chat.candidates`."""
        names = ("temperature", "top_k", "max_new_tokens")
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass
class Solution:
    """A solution and the scores of its steps.

    Attributes:
      question: index of the question in its batch.
      steps: texts.
      scores: of the steps, 0.0 until they are estimated.
      unstated: number of texts without a final answer, of the solution and its continuations.
    """

    question: int
    steps: list[str]
    scores: list[float]
    unstated: int

    def text_until(self, step: int) -> str:
        """Returns the text up to the end of a step."""
        return SEPARATOR.join(self.steps[: step + 1])


def batches(questions: Sequence[Question], settings: LabelSettings) -> list[list[Question]]:
    """Cuts questions into batches."""
    size = max(1, settings.batch_size // settings.solutions)
    return [list(questions[start : start + size]) for start in range(0, len(questions), size)]


def label(chat: Chat, questions: Sequence[Question], settings: LabelSettings) -> list[Result]:
    """Samples solutions of questions and labels their steps.

    Returns:
      a result per question, with a row per different solution.
    """
    # 1) Solutions.
    answers = chat.candidates(
        [(question.question, question.images) for question in questions],
        settings.solutions,
        seed=settings.seed,
        names=[question.where for question in questions],
        **settings.sampling(),
    )
    solutions = []
    for index, candidates in enumerate(answers):
        for text in dict.fromkeys(answer.text for answer in candidates):
            steps = split_steps(text, settings.max_steps)
            unstated = int(extract_answer(SEPARATOR.join(steps)) is None)
            solutions.append(Solution(index, steps, [0.0] * len(steps), unstated))
    # 2) Continuations and scores.
    _estimate_scores(chat, questions, solutions, settings)
    # 3) Rows.
    rows = [[] for _ in questions]
    for solution in solutions:
        rows[solution.question].append(_row(questions[solution.question], solution, settings))
    return [Result(question, rows[index], {}) for index, question in enumerate(questions)]


def _estimate_scores(
    chat: Chat,
    questions: Sequence[Question],
    solutions: Sequence[Solution],
    settings: LabelSettings,
) -> None:
    """Sets the scores of the steps, and adds to `unstated`."""
    # A beginning that solutions of one question share is continued once.
    matches = get_matcher(settings.matcher)
    steps_of = collections.defaultdict(list)  # (question, beginning) -> [(solution, step), ...]
    for solution in solutions:
        for step in range(len(solution.steps)):
            steps_of[solution.question, solution.text_until(step)].append((solution, step))
    # Short ones first: neighbors share a bucket.
    beginnings = sorted(steps_of, key=lambda key: len(key[1]))
    size = max(1, settings.batch_size // settings.continuations)
    for start in range(0, len(beginnings), size):
        batch = beginnings[start : start + size]
        asked = [questions[index] for index, _ in batch]
        continued = chat.candidates(
            [(question.question, question.images) for question in asked],
            settings.continuations,
            answer_prefixes=[text for _, text in batch],
            seed=settings.seed + settings.solutions,
            names=[question.where for question in asked],
            **settings.sampling(),
        )
        for (index, text), candidates in zip(batch, continued, strict=True):
            complete = [text + answer.text for answer in candidates]
            answer = questions[index].answer
            hits = sum(is_correct(candidate, answer, matches) for candidate in complete)
            unstated = sum(extract_answer(candidate) is None for candidate in complete)
            for solution, step in steps_of[index, text]:
                solution.scores[step] = hits / settings.continuations
                solution.unstated += unstated


def _row(question: Question, solution: Solution, settings: LabelSettings) -> dict:
    """Returns a conversation for train.py in which the critic answers + or - after each step."""
    labels = [GOOD if score > settings.threshold else BAD for score in solution.scores]
    messages = critic_messages(question.question, solution.steps, labels, settings.system)
    turns = [
        {"from": OFFICIAL_NAMES[message["role"]], "value": message["content"]}
        for message in messages
    ]
    image = {} if question.image is None else {"image": question.image}
    return {
        "id": question.id,
        **image,
        "conversations": turns,
        "scores": solution.scores,
        "unstated": solution.unstated,
    }
