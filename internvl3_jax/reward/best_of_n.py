"""Best of N: several answers to a question, and the one that a critic, or the majority, prefers.

chat, critic = Chat(load("checkpoints/internvl3-8b")), Critic(load("checkpoints/visualprm-8b"))
choice = best_of_n(chat, critic, "How many cubes are there? Think step by step.", ["cubes.png"])
choice.text, choice.candidates[choice.best].scores

The first candidate is the greedy answer, so that with one candidate this is ordinary answering; the
others are drawn at temperature 0.7 and top_p 0.95, as the authors of InternVL did in VLMEvalKit in
March 2025 (today's VLMEvalKit has temperature 0.6). The question is run once for all candidates.
"""

import dataclasses
from collections.abc import Sequence

from internvl3_jax.inference.chat import Answer, Chat
from internvl3_jax.inference.options import CANDIDATE_SAMPLING
from internvl3_jax.reward.answer_matching import final_answer, same_answer
from internvl3_jax.reward.critic import Critic


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One answer. `steps`, `scores` and `score` are the critic's; without a critic there are none."""

    text: str
    final: str | None  # what it answers; see verify.final_answer
    votes: int  # candidates with the same final answer, itself included; 0 without one
    steps: list[str] | None = None
    scores: list[float] | None = None
    score: float | None = None


@dataclasses.dataclass(frozen=True)
class Choice:
    """All candidates, the greedy one first, and which was chosen: by score if there is a critic,
    else by votes; of equals the first.
    """

    candidates: list[Candidate]
    best: int
    prompt_tokens: int
    tiles: list[int]
    new_tokens: int  # of all candidates
    seconds: float  # of the whole batch, without the critic's

    @property
    def text(self) -> str:
        return self.candidates[self.best].text

    def as_json(self) -> dict:
        fields = dataclasses.asdict(self)
        names = ("best", "candidates", "prompt_tokens", "new_tokens", "tiles", "seconds")
        return {"text": self.text} | {name: fields[name] for name in names}

    def table(self) -> str:
        """What each candidate answers and what is thought of it, a line each; a star at the chosen
        one.
        """
        lines = []
        for number, candidate in enumerate(self.candidates):
            score = (
                ""
                if candidate.score is None
                else f"score {candidate.score:.3f} of {len(candidate.scores)} steps, "
            )
            star = "*" if number == self.best else " "
            lines.append(f"{star} {number}: {score}{candidate.votes} votes for {candidate.final!r}")
        return "\n".join(lines)


def best_of_n(
    chat: Chat, critic: Critic | None, question: str, images: Sequence = (), n: int = 8, **options
) -> Choice:
    """See `best_of_many`. The conversation of `chat` is left as it is."""
    return best_of_many(chat, critic, [(question, images)], n, **options)[0]


def best_of_many(
    chat: Chat,
    critic: Critic | None,
    requests: Sequence[tuple[str, Sequence]],
    n: int = 8,
    first: int = 1,
    **options,
) -> list[Choice]:
    """n candidates for each of the (question, images) pairs in one batch, and the best of each.

    Args:
      critic: that scores the candidates; None leaves the choice to the majority (self-consistency).
      first: number of the first request, for errors.
      options: of the chat; CANDIDATE_SAMPLING in place of its own temperature and top_p where they
          are not given.
    """
    answers = chat.candidates(
        requests, n, greedy_first=True, first=first, **(CANDIDATE_SAMPLING | options)
    )
    return [
        _choose(critic, question, images, found, f"request {number}")
        for number, ((question, images), found) in enumerate(
            zip(requests, answers, strict=True), first
        )
    ]


def _choose(
    critic: Critic | None, question: str, images: Sequence, answers: list[Answer], where: str
) -> Choice:
    texts = [answer.text for answer in answers]
    finals = [final_answer(text) for text in texts]
    votes = count_votes(finals)
    if critic is None:
        candidates = [Candidate(*fields) for fields in zip(texts, finals, votes, strict=True)]
        ranks = votes
    else:
        judged = critic.score(question, images, texts, where)
        candidates = [
            Candidate(text, final, vote, scores.steps, scores.scores, scores.score)
            for text, final, vote, scores in zip(texts, finals, votes, judged, strict=True)
        ]
        ranks = [scores.score for scores in judged]
    new_tokens = sum(len(answer.token_ids) for answer in answers)
    return Choice(
        candidates,
        ranks.index(max(ranks)),
        answers[0].prompt_tokens,
        answers[0].tiles,
        new_tokens,
        answers[0].seconds,
    )


def count_votes(finals: Sequence[str | None]) -> list[int]:
    """How many of the final answers are the same as each, itself included; 0 for None. An answer
    joins the first that it is the same as.
    """
    leaders: list[str] = []  # the first of each kind
    kinds = [None] * len(finals)
    for number, final in enumerate(finals):
        if final is None:
            continue
        kinds[number] = next(
            (kind for kind, leader in enumerate(leaders) if same_answer(leader, final)),
            len(leaders),
        )
        if kinds[number] == len(leaders):
            leaders.append(final)
    return [0 if kind is None else kinds.count(kind) for kind in kinds]
