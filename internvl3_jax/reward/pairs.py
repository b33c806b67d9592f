"""Preference pairs from a model's own answers, as MMPR was made (Wang et al. 2024).

Questions with a known answer: right answers are chosen, wrong ones rejected. Questions without one
(Dropout NTP): the answer is chosen, and rejected is its first half, continued without the images.
"""

import dataclasses
import itertools
import json
from collections.abc import Sequence

import numpy as np

from internvl3_jax.data.text.chat_template import IMAGE_TAG
from internvl3_jax.inference.chat import Chat
from internvl3_jax.reward.answer_matching import extract_answer
from internvl3_jax.reward.matchers import get_matcher
from internvl3_jax.reward.question_output import Result
from internvl3_jax.reward.questions import Question, is_correct


@dataclasses.dataclass
class PairSettings:
    """Settings by which pairs are made. The defaults are those of InternVL's scripts.

    Attributes:
      samples: answers to each question with a known answer.
      temperature, top_k, max_new_tokens: of the answers.
      max_pairs: largest number of pairs of a question.
      format_negatives: whether answers that state no final answer are rejected ones, too.
      batch_size: answers that are generated together.
      matcher: how stated answers are compared with the right one, a name of `MATCHERS`.
      seed: of the sampling and of the choice of pairs.

    Raises:
      ValueError: a number is below 1, or the matcher is unknown.
      ImportError: the matcher's package is not installed.
    """

    samples: int = 32
    temperature: float = 0.7
    top_k: int = 50
    max_new_tokens: int = 4096
    max_pairs: int = 15
    format_negatives: bool = False
    batch_size: int = 64
    matcher: str = "rules"
    seed: int = 0

    def __post_init__(self):
        for name in ("samples", "max_pairs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        get_matcher(self.matcher)

    def sampling(self) -> dict:
        """Returns the options of `Chat.candidates`."""
        names = ("temperature", "top_k", "max_new_tokens")
        return {name: getattr(self, name) for name in names}


def batches(questions: Sequence[Question], settings: PairSettings) -> list[list[Question]]:
    """Cuts questions into batches; all questions of a batch have an answer, or none has."""
    result = []
    for has_answer, group in itertools.groupby(
        questions, lambda question: question.answer is not None
    ):
        per_question = settings.samples if has_answer else 1
        size = max(1, settings.batch_size // per_question)
        group = list(group)
        result += [group[start : start + size] for start in range(0, len(group), size)]
    return result


def find_pairs(chat: Chat, questions: Sequence[Question], settings: PairSettings) -> list[Result]:
    """Answers questions, which all have a known answer or all have none, and makes pairs.

    Returns:
      a result per question, whose counts are the different answers that are "right", "wrong" and
      "unstated" (without a final answer).
    """
    make = _correctness_pairs if questions[0].answer is not None else _dropout_pairs
    return make(chat, questions, settings)


def _correctness_pairs(
    chat: Chat, questions: Sequence[Question], settings: PairSettings
) -> list[Result]:
    answers = chat.candidates(
        [(question.question, question.images) for question in questions],
        settings.samples,
        seed=settings.seed,
        names=[question.where for question in questions],
        **settings.sampling(),
    )
    matches, results = get_matcher(settings.matcher), []
    for question, candidates in zip(questions, answers, strict=True):
        # Sort the different answers by what they state.
        texts = list(dict.fromkeys(answer.text for answer in candidates if answer.text.strip()))
        unstated = [text for text in texts if extract_answer(text) is None]
        right = [text for text in texts if is_correct(text, question.answer, matches)]
        wrong = [text for text in texts if text not in {*unstated, *right}]
        # Pair them.
        seed = (settings.seed, *json.dumps(question.id).encode())
        pairs = choose_pairs(right, wrong, settings.max_pairs, seed)
        if settings.format_negatives:
            pairs += choose_pairs(right, unstated, settings.max_pairs, seed)
        counts = {"right": len(right), "wrong": len(wrong), "unstated": len(unstated)}
        results.append(Result(question, _rows(question, pairs), counts))
    return results


def choose_pairs(
    right: Sequence[str], wrong: Sequence[str], limit: int, seed
) -> list[tuple[str, str]]:
    """Returns at most `limit` (right, wrong) pairs, chosen at random, in the order of the answers.

    Pairs whose wrong stated answer contains the right one (30 and 3, dark red and red) are left
    out, as by InternVL's build_pairs_based_on_pos_neg.
    """
    stated = {text: (extract_answer(text) or "").lower() for text in (*right, *wrong)}
    pairs = [
        (chosen, rejected)
        for chosen, rejected in itertools.product(right, wrong)
        if not stated[chosen] or stated[chosen] not in stated[rejected]
    ]
    if len(pairs) > limit:
        kept = np.random.default_rng(seed).choice(len(pairs), limit, replace=False)
        pairs = [pairs[index] for index in sorted(kept)]
    return pairs


def _dropout_pairs(
    chat: Chat, questions: Sequence[Question], settings: PairSettings
) -> list[Result]:
    # 1) Answers with the images.
    names = [question.where for question in questions]
    answers = chat.candidates(
        [(question.question, question.images) for question in questions],
        1,
        seed=settings.seed,
        names=names,
        **settings.sampling(),
    )
    chosen = [answer.text for (answer,) in answers]
    # 2) Their first halves, continued without the images.
    prefixes = [first_half(text) for text in chosen]
    blind = [
        (question.question.replace(f"{IMAGE_TAG}\n", "").replace(IMAGE_TAG, ""), [])
        for question in questions
    ]
    continued = chat.candidates(
        blind,
        1,
        answer_prefixes=prefixes,
        seed=settings.seed + 1,
        names=names,
        **settings.sampling(),
    )
    # 3) A pair, unless both say the same.
    results = []
    for question, text, prefix, (answer,) in zip(
        questions, chosen, prefixes, continued, strict=True
    ):
        rejected = prefix + answer.text
        pairs = [(text, rejected)] if text.strip() and text not in rejected else []
        counts = {"right": 0, "wrong": 0, "unstated": 0}
        results.append(Result(question, _rows(question, pairs), counts))
    return results


def first_half(text: str) -> str:
    """Returns the first half of the words, without a space at the end: models have not learned to
    continue after one.
    """
    words = text.split(" ")
    return " ".join(words[: len(words) // 2]).strip()


def _rows(question: Question, pairs: Sequence[tuple[str, str]]) -> list[dict]:
    image = {} if question.image is None else {"image": question.image}
    common = {"id": question.id, **image, "question": question.question}
    return [common | {"chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
