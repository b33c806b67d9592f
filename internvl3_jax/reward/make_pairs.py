"""Makes pairs for preference optimization from a model's own answers, as MMPR was made (Wang et al.
2024).

    python -m internvl3_jax.reward.make_pairs --checkpoint DIR --questions questions.jsonl \\
        --output pairs.jsonl

A line of --questions is {"question": TEXT, "image": PATH or [PATHS], "answer": TEXT, "id": ANY};
image and id may be missing.

With an answer: several answers are sampled and compared with it (answer_matching.py). Each right
one with each wrong one is a pair, at most --max_pairs of them, chosen at random. Questions answered
always right or always wrong give none. Pairs whose rejected stated answer contains the chosen one
(30 and 3, dark red and red) are left out, as in InternVL's scripts. Answers that state nothing are
rejected ones only with --format_negatives, in up to --max_pairs further pairs.

Without an answer, but with an image (Dropout NTP): the sampled answer is chosen; rejected is its
first half, continued without the images.

Each line of --output is a row for train.py (list it in a meta JSON whose root is the questions'
folder). OUTPUT.done has a line per finished question with its counts. Started again with the same
model and settings, the program resumes after the last finished question. A question that cannot be
asked, for a damaged image, say, has its error in OUTPUT.done; --on_error stop ends the run there.

The status is 1 if no answer could be read, or if a question could not be asked.
"""

import argparse
import functools
import pathlib
import sys
from collections.abc import Sequence

from internvl3_jax.inference.chat import Chat
from internvl3_jax.io import command_line
from internvl3_jax.reward.pairs import PairSettings, batches, find_pairs
from internvl3_jax.reward.question_output import QuestionOutput, make_rows, read_done
from internvl3_jax.reward.question_program import make_parser, report, run_program, settings_of
from internvl3_jax.reward.questions import STATED_ANSWER, Question, fingerprint

ROW_KEYS = ("id", "question", "chosen", "rejected")
HELP = {
    "samples": "answers sampled for each question that has a known answer",
    "temperature": "of the sampling",
    "top_k": "sample from this many likeliest tokens; 0 is all",
    "max_new_tokens": "longest answer, in tokens",
    "max_pairs": "largest number of pairs of a question",
    "format_negatives": "answers that state nothing are rejected ones, too",
    "batch_size": "answers generated together",
    "matcher": "rules, or math_verify, which also simplifies formulas (extra: verify)",
    "seed": "of the sampling",
}


def run(
    chat: Chat,
    questions: Sequence[Question],
    output: pathlib.Path,
    settings: PairSettings,
    checkpoint: str = "",
    **options,
) -> None:
    """Makes the pairs of the questions that are not finished.

    Args:
      checkpoint: hash of the parameters.
      options: on_error and retry_errors of `make_rows`.
    """
    key = functools.partial(fingerprint, settings=settings, checkpoint=checkpoint)
    make_rows(
        QuestionOutput(output, questions, key, ROW_KEYS, "make_pairs"),
        questions,
        functools.partial(batches, settings=settings),
        lambda batch: find_pairs(chat, batch, settings),
        description="answering",
        **options,
    )


def summary(output: pathlib.Path) -> str:
    """Returns a line about all pairs of an output.

    Raises:
      ValueError: there are none, since no answer states a final answer.
    """
    lines = [line for line in read_done(output) if "error" not in line]
    usable = sum(line["rows"] > 0 for line in lines)
    dropout = sum(line["rows"] > 0 and not line["right"] for line in lines)
    never = sum(not line["right"] and bool(_not_right(line)) for line in lines)
    always = sum(line["right"] > 0 and not _not_right(line) for line in lines)
    unstated = sum(line["unstated"] for line in lines)
    stated = sum(line["right"] + line["wrong"] for line in lines)
    if unstated and not stated and not usable:
        raise ValueError(
            f"{output}: no pairs: none of the {unstated:,} different answers could be read; wanted "
            f"is {STATED_ANSWER}"
        )
    text = (
        f"{sum(line['rows'] for line in lines):,} pairs of {usable:,} of {len(lines):,} questions; "
        f"{always:,} were always answered right, {never:,} never"
    )
    if dropout:
        text += f"; {dropout:,} had no known answer (Dropout NTP)"
    if unstated:
        text += (
            f"; {unstated:,} of {unstated + stated:,} different answers could not be read; wanted "
            f"is {STATED_ANSWER}"
        )
    return text


def _not_right(line: dict) -> int:
    return line["wrong"] + line["unstated"]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    return make_parser("make_pairs", __doc__, PairSettings, HELP).parse_args(arguments)


def make(options: argparse.Namespace) -> None:
    settings = settings_of(options, PairSettings)

    def make_all(chat: Chat, questions: list[Question], checkpoint: str) -> None:
        errors = {"on_error": options.on_error, "retry_errors": options.retry_errors}
        run(chat, questions, options.output, settings, checkpoint, **errors)

    run_program(options, settings, ROW_KEYS, make_all, need_answers=False)
    report(options, summary(options.output))


def main(arguments: Sequence[str] | None = None) -> int:
    return command_line.call(lambda: make(parse(arguments)), ImportError)


if __name__ == "__main__":
    sys.exit(main())
