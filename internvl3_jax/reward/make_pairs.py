"""Pairs for preference optimisation from a model's own answers, as MMPR was made (Wang et al.
2024).

    python -m internvl3_jax.reward.make_pairs --checkpoint DIR --questions questions.jsonl --output pairs.jsonl

A line of --questions is {"question": TEXT, "image": PATH or [PATHS], "answer": TEXT, "id": ANY};
image and id may be missing.

With an answer: several answers are drawn and compared with it (verify.py); each right one with each
wrong one is a pair, at most --most_pairs of them, drawn at random. Of no use are questions answered
always right or always wrong, and pairs whose rejected stated answer contains the chosen one (3 and
30, red and dark red), as in InternVL's scripts. Answers that state nothing are rejected ones only
with --format_negatives, and then in --most_pairs pairs of their own.

Without one, but with an image (Dropout NTP): the drawn answer is chosen; rejected is its first
half, continued without the images.

Each line of --output is a row for train.py (list it in a meta JSON whose root is the questions'
folder). OUTPUT.done has a line for each finished question, what was drawn and how many pairs it
gave; started again with the same model and settings, it resumes behind the last.
The status is 1 if no answer could be read.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from internvl3_jax.checkpoints.checkpoint import load
from internvl3_jax.checkpoints.param_hash import tree_hash
from internvl3_jax.checkpoints.storage import by_path
from internvl3_jax.data.text.chat_template import IMAGE_TAG
from internvl3_jax.inference.answer_file import beside, check_place
from internvl3_jax.inference.chat import Chat
from internvl3_jax.inference.options import Options
from internvl3_jax.io import command_line, jsonl, safe_files
from internvl3_jax.reward.answer_matching import extract_answer
from internvl3_jax.reward.questions import (
    WANTED,
    Question,
    is_correct,
    may_be_torn,
    read_questions,
    with_fingerprint,
)


@dataclasses.dataclass
class Settings:
    """The defaults are those of InternVL's scripts."""

    samples: int = 32  # answers to each question that can be checked
    temperature: float = 0.7
    top_k: int = 50
    max_new_tokens: int = 4096
    most_pairs: int = 15  # of a question
    format_negatives: bool = False  # whether answers that state nothing are rejected ones
    batch_size: int = 64  # answers drawn together
    seed: int = 0

    def __post_init__(self):
        for name in ("samples", "most_pairs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def drawing(self) -> dict:
        return {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "max_new_tokens": self.max_new_tokens,
        }


@dataclasses.dataclass(frozen=True)
class Found:
    """What a question gave."""

    question: Question
    pairs: list[tuple[str, str]]  # (chosen, rejected)
    right: int = 0  # different answers of each kind
    wrong: int = 0
    silent: int = 0  # that state nothing

    def rows(self) -> list[dict]:
        image = {} if self.question.image is None else {"image": self.question.image}
        common = {"id": self.question.id, **image, "question": self.question.question}
        return [
            common | {"chosen": chosen, "rejected": rejected} for chosen, rejected in self.pairs
        ]

    def done(self) -> dict:
        return {
            "id": self.question.id,
            "mark": self.question.mark,
            "pairs": len(self.pairs),
            "right": self.right,
            "wrong": self.wrong,
            "silent": self.silent,
        }


def find_pairs(
    chat: Chat, questions: Sequence[Question], settings: Settings, first: int = 1
) -> list[Found]:
    """Of questions that all have an answer, or all have none. first: number of the first one, for
    errors.
    """
    return (_checked if questions[0].answer is not None else _dropped)(
        chat, questions, settings, first
    )


def _checked(
    chat: Chat, questions: Sequence[Question], settings: Settings, first: int
) -> list[Found]:
    requests = [(question.question, question.images) for question in questions]
    drawn = chat.candidates(
        requests, settings.samples, seed=settings.seed, first=first, **settings.drawing()
    )
    found = []
    for question, answers in zip(questions, drawn, strict=True):
        texts = list(dict.fromkeys(answer.text for answer in answers if answer.text.strip()))
        silent = [text for text in texts if extract_answer(text) is None]
        right = [text for text in texts if is_correct(text, question.answer)]
        wrong = [text for text in texts if text not in {*silent, *right}]
        seed = (settings.seed, *json.dumps(question.id).encode())
        pairs = choose(right, wrong, settings.most_pairs, seed)
        if settings.format_negatives:
            pairs += choose(right, silent, settings.most_pairs, seed)
        found.append(Found(question, pairs, len(right), len(wrong), len(silent)))
    return found


def choose(right: Sequence[str], wrong: Sequence[str], most: int, seed) -> list[tuple[str, str]]:
    """At most so many of the pairs of a right and a wrong answer, at random, in the order of the
    answers; without those whose wrong stated answer contains the right one, whatever its case.
    """
    stated = {text: (extract_answer(text) or "").lower() for text in (*right, *wrong)}
    pairs = [
        (chosen, rejected)
        for chosen, rejected in itertools.product(right, wrong)
        if not stated[chosen] or stated[chosen] not in stated[rejected]
    ]
    if len(pairs) > most:
        kept = np.random.default_rng(seed).choice(len(pairs), most, replace=False)
        pairs = [pairs[index] for index in sorted(kept)]
    return pairs


def _dropped(
    chat: Chat, questions: Sequence[Question], settings: Settings, first: int
) -> list[Found]:
    requests = [(question.question, question.images) for question in questions]
    drawn = chat.candidates(requests, 1, seed=settings.seed, first=first, **settings.drawing())
    chosen = [answer.text for (answer,) in drawn]
    begun = [first_half(text) for text in chosen]
    blind = [
        (question.question.replace(f"{IMAGE_TAG}\n", "").replace(IMAGE_TAG, ""), [])
        for question in questions
    ]
    rest = chat.candidates(blind, 1, begun=begun, seed=settings.seed + 1, **settings.drawing())
    pairs = [
        (text, start + answer.text)
        for text, start, (answer,) in zip(chosen, begun, rest, strict=True)
    ]
    return [
        Found(question, [pair] if pair[0].strip() and pair[0] not in pair[1] else [])
        for question, pair in zip(questions, pairs, strict=True)
    ]


def first_half(text: str) -> str:
    """The first half of what spaces separate, without a space at its end, behind which no model has
    learned to resume.
    """
    words = text.split(" ")
    return " ".join(words[: len(words) // 2]).strip()


def go_on(output: pathlib.Path, questions: Sequence[Question]) -> tuple[int, int, int]:
    """(finished questions, bytes of their rows, bytes of their lines in OUTPUT.done). Nothing is
    changed. ValueError if the files are not ours or of others.
    """
    done = done_path(output)
    if not output.exists() and not done.exists():
        return 0, 0, 0
    try:
        ends, lines = jsonl.whole_lines(done), jsonl.whole_lines(output)
        finished = [row.values for row in jsonl.parse(ends, done)]
        known = [(row["id"], row["mark"]) for row in finished]
        pairs = sum(row["pairs"] for row in finished)
        ours = all(
            {"id", "question", "chosen", "rejected"} <= row.values.keys()
            for row in jsonl.parse(lines, output)
        )
        following = questions[len(known)] if len(known) < len(questions) else None
        ours &= may_be_torn(jsonl.torn(done), following) and may_be_torn(jsonl.torn(output), None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{output} and {done} are not both of this program ({error}); name another --output"
        ) from error
    if not ours:
        raise ValueError(f"{output} and {done} are not both of this program; name another --output")
    if (
        known != [(question.id, question.mark) for question in questions[: len(known)]]
        or len(lines) < pairs
    ):
        raise ValueError(
            f"{output} holds pairs of other questions, or of another --checkpoint or other settings; move it and {done} away or name "
            f"another --output"
        )
    return len(known), sum(map(len, lines[:pairs])), sum(map(len, ends))


def done_path(output: pathlib.Path) -> pathlib.Path:
    return output.with_name(f"{output.name}.done")


def run(
    chat: Chat,
    questions: Sequence[Question],
    output: pathlib.Path,
    settings: Settings,
    checkpoint: str = "",
) -> None:
    """Makes the pairs of the questions that are not finished; each batch of them is written at
    once. checkpoint: name of the chat's.
    """
    from rich.progress import track

    questions = with_fingerprint(questions, settings, checkpoint)
    start, kept, ended = go_on(output, questions)
    if start:
        print(
            f"{output}: {start} of {len(questions)} questions are finished; resuming with the rest",
            file=sys.stderr,
        )
    batches = _batches(questions[start:], settings)
    with jsonl.Appender(output, kept) as rows, jsonl.Appender(done_path(output), ended) as done:
        for batch in track(batches, description="drawing", disable=not sys.stderr.isatty()):
            found = find_pairs(chat, batch, settings, start + 1)
            start += len(batch)
            rows.write([jsonl.dumps(row) for one in found for row in one.rows()])
            done.write([jsonl.dumps(one.done()) for one in found])


def _batches(questions: Sequence[Question], settings: Settings) -> list[list[Question]]:
    """Questions of one kind, in their order."""
    batches = []
    for is_checked, group in itertools.groupby(
        questions, lambda question: question.answer is not None
    ):
        size = (
            max(1, settings.batch_size // settings.samples) if is_checked else settings.batch_size
        )
        group = list(group)
        batches += [group[start : start + size] for start in range(0, len(group), size)]
    return batches


def summary(output: pathlib.Path) -> str:
    """What was found. ValueError if no answer could be used because none stated anything."""
    finished = [
        row.values for row in jsonl.parse(jsonl.whole_lines(done_path(output)), done_path(output))
    ]
    usable = sum(row["pairs"] > 0 for row in finished)
    blind = sum(row["pairs"] > 0 and not row["right"] for row in finished)
    never = sum(row["right"] == 0 and row["wrong"] + row["silent"] > 0 for row in finished)
    always = sum(row["right"] > 0 and row["wrong"] + row["silent"] == 0 for row in finished)
    silent, stated = (
        sum(row["silent"] for row in finished),
        sum(row["right"] + row["wrong"] for row in finished),
    )
    if silent and not stated and not usable:
        raise ValueError(
            f"{output}: no pairs: none of the {silent:,} different answers could be read; wanted is {WANTED}"
        )
    return (
        f"{sum(row['pairs'] for row in finished):,} pairs of {usable:,} of {len(finished):,} questions; {always:,} were always answered "
        f"right, {never:,} never"
        + (f"; {blind:,} had no known answer (Dropout NTP)" if blind else "")
        + (
            f"; {silent:,} of {silent + stated:,} different answers could not be read; wanted is {WANTED}"
            if silent
            else ""
        )
    )


HELP = {
    "samples": "answers drawn to each question that has a known answer",
    "temperature": "of the draws",
    "top_k": "draw from this many likeliest tokens; 0 is all",
    "max_new_tokens": "longest answer",
    "most_pairs": "of a question",
    "format_negatives": "answers that state nothing are rejected ones, too",
    "batch_size": "answers drawn together",
    "seed": "of the draws",
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.Parser("make_pairs", description=__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="of the model that answers: the one that will be trained",
    )
    parser.add_argument("--questions", type=command_line.expanded, required=True, help="JSONL file")
    parser.add_argument(
        "--output",
        type=command_line.expanded,
        required=True,
        help="JSONL file; it is resumed if it is there",
    )
    for field in dataclasses.fields(Settings):
        if field.type is bool:
            parser.add_argument(f"--{field.name}", action="store_true", help=HELP[field.name])
        else:
            text = f"{HELP[field.name]} (default: {field.default})"
            parser.add_argument(
                f"--{field.name}", type=field.type, default=field.default, help=text
            )
    parser.add_argument(
        "--max_image_pixels",
        type=int,
        default=None,
        help="larger images are refused; 0: no limit (89 million)",
    )
    parser.add_argument(
        "--allow_truncated",
        action="store_true",
        help="accept truncated images; the missing part is gray",
    )
    parser.add_argument(
        "--dtype", default=None, help="of parameters and computation (default: as stored)"
    )
    return parser.parse_args(arguments)


def make(options: argparse.Namespace) -> None:
    settings = Settings(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)}
    )
    Options(
        temperature=settings.temperature,
        top_k=settings.top_k,
        max_new_tokens=settings.max_new_tokens,
        seed=settings.seed,
    )
    questions = read_questions(options.questions, checked=False)
    for path in (options.output, done_path(options.output)):
        check_place(
            path,
            [options.questions, *(file for question in questions for file in question.images)],
            "--output",
        )
    with safe_files.Lock(beside(options.output, "lock"), str(options.output)):
        checkpoint = load(options.checkpoint, dtype=options.dtype)
        images = {
            "max_image_pixels": options.max_image_pixels,
            "allow_truncated": options.allow_truncated,
        }
        run(
            Chat(checkpoint, **images),
            questions,
            options.output,
            settings,
            tree_hash(by_path(checkpoint.params)),
        )
    print(summary(options.output))


def main(arguments: Sequence[str] | None = None) -> int:
    return command_line.call(lambda: make(parse(arguments)), ImportError)


if __name__ == "__main__":
    sys.exit(main())
