"""Best of N: several answers to a question, and the one that a critic, or the majority, prefers.

    chat, critic = Chat(load("checkpoints/internvl3-8b")), Critic(load("checkpoints/visualprm-8b"))
    choice = best_of_n(chat, critic, "How many cubes? Think step by step.", ["cubes.png"])
    choice.text, choice.candidates[choice.best].scores

The first candidate is the greedy answer, so one candidate is ordinary answering. The others are
sampled at temperature 0.7 and top_p 0.95, as the authors of InternVL did in VLMEvalKit in March
2025 (today's VLMEvalKit has temperature 0.6). The question runs once for all candidates.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Unpack

from internvl3_jax.inference.chat import Answer, Chat
from internvl3_jax.inference.options import CANDIDATE_SAMPLING, OptionChanges
from internvl3_jax.reward.answer_matching import final_answer, same_answer
from internvl3_jax.reward.critic import Critic


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One answer.

    Attributes:
      text: of the answer.
      final: its final answer (`answer_matching.final_answer`); None if it has none.
      votes: number of candidates with the same final answer, itself included; 0 without one.
      steps, scores, score: of the critic; None without a critic, or for an answer without text
        after its reasoning.
      reasoning, finish: as of `Answer`. Neither the critic nor the vote reads the reasoning.
    """

    text: str
    final: str | None
    votes: int
    steps: list[str] | None = None
    scores: list[float] | None = None
    score: float | None = None
    reasoning: str | None = None
    finish: str = "stop"


@dataclasses.dataclass(frozen=True)
class Choice:
    """All candidates and the chosen one.

    Attributes:
      candidates: the greedy one first.
      best: index of the first candidate with the highest score, or without a critic the most votes.
      prompt_tokens: number of tokens of the prompt.
      tiles: number of tiles of each image.
      new_tokens: of all candidates.
      seconds: of the whole batch, without the critic.
    """

    candidates: list[Candidate]
    best: int
    prompt_tokens: int
    tiles: list[int]
    new_tokens: int
    seconds: float

    @property
    def text(self) -> str:
        return self.candidates[self.best].text

    def as_json(self) -> dict:
        """Returns the fields that --json and --requests write."""
        fields = dataclasses.asdict(self)
        names = ("best", "candidates", "prompt_tokens", "new_tokens", "tiles", "seconds")
        return {"text": self.text} | {name: fields[name] for name in names}

    def table(self) -> str:
        """Returns a line per candidate: score, votes and final answer; * marks the chosen one."""
        lines = []
        for index, candidate in enumerate(self.candidates):
            score = ""
            if candidate.score is not None:
                score = f"score {candidate.score:.3f} of {len(candidate.scores)} steps, "
            star = "*" if index == self.best else " "
            lines.append(f"{star} {index}: {score}{candidate.votes} votes for {candidate.final!r}")
        return "\n".join(lines)


def best_of_n(
    chat: Chat,
    critic: Critic | None,
    question: str,
    images: Any = (),
    n: int = 8,
    **options: Unpack[OptionChanges],
) -> Choice:
    """Runs `best_of_many` for one question. The conversation of `chat` does not change."""
    return best_of_many(chat, critic, [(question, images)], n, **options)[0]


def best_of_many(
    chat: Chat,
    critic: Critic | None,
    requests: Sequence[tuple[str, Any]],
    n: int = 8,
    names: Sequence[str] = (),
    **options: Unpack[OptionChanges],
) -> list[Choice]:
    """Generates n candidates for each of the (question, images) pairs in one batch, and chooses.

    Args:
      critic: scores the candidates; None leaves the choice to the majority (self-consistency, Wang
        et al. 2022).
      names: what errors call the pairs; by default "request 1" and so on.
      options: of the chat; its temperature and top_p are replaced by CANDIDATE_SAMPLING where they
        are not given.
    """
    names = names or [f"request {number}" for number in range(1, len(requests) + 1)]
    options = CANDIDATE_SAMPLING | options
    answers = chat.candidates(requests, n, greedy_first=True, names=names, **options)
    return [
        _choose(critic, question, images, candidates, name)
        for (question, images), candidates, name in zip(requests, answers, names, strict=True)
    ]


def _choose(
    critic: Critic | None, question: str, images: Any, answers: list[Answer], where: str
) -> Choice:
    texts = [answer.text for answer in answers]
    finals = [final_answer(text) for text in texts]
    votes = count_votes(finals)
    candidates = [
        Candidate(text, final, vote, reasoning=answer.reasoning, finish=answer.finish)
        for text, final, vote, answer in zip(texts, finals, votes, answers, strict=True)
    ]
    ranks = votes
    if critic is not None:
        # Where the reasoning was cut off there is nothing to score, and nothing to choose.
        answered = [index for index, answer in enumerate(answers) if answer.finish != "reasoning"]
        solutions = [texts[index] for index in answered]
        scored = critic.score(question, images, solutions, where) if solutions else []
        ranks = [-math.inf] * len(answers)
        for index, scores in zip(answered, scored, strict=True):
            found = {name: getattr(scores, name) for name in ("steps", "scores", "score")}
            candidates[index] = dataclasses.replace(candidates[index], **found)
            ranks[index] = scores.score
    return Choice(
        candidates,
        best=ranks.index(max(ranks)),
        prompt_tokens=answers[0].prompt_tokens,
        tiles=answers[0].tiles,
        new_tokens=sum(len(answer.token_ids) for answer in answers),
        seconds=answers[0].seconds,
    )


def count_votes(finals: Sequence[str | None]) -> list[int]:
    """Returns how many final answers are the same as each, itself included; 0 for None.

    An answer joins the first group whose first answer is the same.
    """
    leaders: list[str] = []  # the first answer of each group
    groups: list[int | None] = []
    for final in finals:
        if final is None:
            groups.append(None)
            continue
        same = (index for index, leader in enumerate(leaders) if same_answer(leader, final))
        group = next(same, len(leaders))
        if group == len(leaders):
            leaders.append(final)
        groups.append(group)
    return [0 if group is None else groups.count(group) for group in groups]
