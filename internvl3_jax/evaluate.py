"""Held-out accuracy of a model on the digits tasks, through the same prompts and the same generation as in use."""

import jax

from internvl3_jax.config import TrainConfig
from internvl3_jax.data import digits
from internvl3_jax.data.batch import cut_pictures, make_prompt
from internvl3_jax.generate import Generator, Run
from internvl3_jax.sampling import Sampling

_BATCH = 50
_LIMIT = 96  # tokens; the longest answer names five boxes


def evaluate(config: TrainConfig, params, tokenizer, delta: int | None = None) -> dict[str, float]:
    """Share of right answers by task, greedy, and "digit": the share of single digits read right, place by place.

    delta: V2PE units, in place of the processor's.
    """
    stop_ids = [tokenizer.token_id(token) for token in config.processor.stop_tokens]
    generator = Generator(config.model, jax.device_get(params), stop_ids=stop_ids)
    questions = digits.held_out(config.evaluate_per_task)
    answers = []
    for start in range(0, len(questions), _BATCH):
        prompts = [_prompt(question, tokenizer, config.processor, delta) for question in questions[start : start + _BATCH]]
        run = Run(_LIMIT, Sampling(), (0,) * len(prompts), config.model.language.rope_scaling)
        answers += [tokenizer.decode(ids).strip() for ids in generator.generate(prompts, run)]
    return score(questions, answers)


def score(questions: list[digits.Question], answers: list[str]) -> dict[str, float]:
    scores = {}
    for task in digits.TASKS:
        right = [digits.is_right(q.task, q.answer, a) for q, a in zip(questions, answers, strict=True) if q.task == task]
        scores[task] = sum(right) / len(right)
    read = [(q.answer, a) for q, a in zip(questions, answers, strict=True) if q.task == "read"]
    hits = sum(wanted == found for expected, answered in read for wanted, found in zip(expected, answered, strict=False))
    return scores | {"digit": hits / sum(max(len(expected), len(answered)) for expected, answered in read)}


def _prompt(question: digits.Question, tokenizer, processor, delta: int | None):
    units = [processor.delta if delta is None else delta] * len(question.pictures)
    return make_prompt(question.messages[:-1], cut_pictures(question.pictures, processor), tokenizer, processor, units)
