"""Makes training data for a critic: solutions with + or - after every step, by whether the right
answer can still be reached from there. Follows the data of VisualPRM (Wang et al. 2025).

    python -m internvl3_jax.reward.make_process_labels --checkpoint DIR \\
        --questions questions.jsonl --output labels.jsonl

A line of --questions is {"question": TEXT, "image": PATH or [PATHS], "answer": TEXT, "id": ANY};
image and id may be missing. The question asks for steps with blank lines between them and for a
stated answer ("Answer: ..." or a box; see answer_matching.py).

For each question some solutions are sampled. From the end of each step, the last one too, several
continuations are sampled. The share of them that states the right answer is the step's score, and a
step above --threshold is a +. A continuation begins right after the last character of the step, so
it may also continue the step. Unlike in VisualPRM's scripts, which give them 0, steps after one
with score 0 are continued as well.

Each line of --output is a conversation for train.py; list the file in a meta JSON whose root is the
questions' folder. A line also has the scores of the steps and the number of texts without a stated
answer ("unstated"). OUTPUT.done has a line per finished question. Started again with the same model
and settings, the program resumes after the last finished question. A question that cannot be asked,
for a damaged image, say, has its error in OUTPUT.done; --on_error stop ends the run there.

The status is 1 if no answer could be read, or if a question could not be asked.
"""

import argparse
import functools
import pathlib
import sys
from collections.abc import Sequence

from internvl3_jax.data.critic_format import SYSTEMS
from internvl3_jax.inference.chat import Chat
from internvl3_jax.inference.resumable import read_rows
from internvl3_jax.io import command_line
from internvl3_jax.reward.process_labels import LabelSettings, batches, label
from internvl3_jax.reward.question_output import QuestionOutput, make_rows
from internvl3_jax.reward.question_program import make_parser, report, run_program, settings_of
from internvl3_jax.reward.questions import STATED_ANSWER, Question, fingerprint

ROW_KEYS = ("id", "conversations", "scores")
HELP = {
    "solutions": "sampled for each question; equal ones are labeled once",
    "continuations": "sampled from the end of each step",
    "temperature": "of the sampling",
    "top_k": "sample from this many likeliest tokens; 0 is all",
    "max_new_tokens": "longest solution or continuation, in tokens",
    "max_steps": "steps are merged to at most this number",
    "threshold": "a step with a higher score is a +",
    "batch_size": "answers generated together",
    "matcher": "rules, or math_verify, which also simplifies formulas (extra: verify)",
    "seed": "of the sampling",
}


def run(
    chat: Chat,
    questions: Sequence[Question],
    output: pathlib.Path,
    settings: LabelSettings,
    checkpoint: str = "",
    **options,
) -> None:
    """Labels solutions of the questions that are not finished.

    Args:
      checkpoint: hash of the parameters.
      options: on_error and retry_errors of `make_rows`.
    """
    key = functools.partial(fingerprint, settings=settings, checkpoint=checkpoint)
    make_rows(
        QuestionOutput(output, questions, key, ROW_KEYS, "make_process_labels"),
        questions,
        functools.partial(batches, settings=settings),
        lambda batch: label(chat, batch, settings),
        description="labeling",
        **options,
    )


def summary(output: pathlib.Path) -> str:
    """Returns a line about all rows of an output.

    Raises:
      ValueError: no answer could be read, so that every step is a -.
    """
    rows = read_rows(output).rows
    scores = [score for row in rows for score in row["scores"]]
    unstated = sum(row["unstated"] for row in rows)
    good = sum(score > 0 for score in scores)
    text = (
        f"{len(rows):,} solutions with {len(scores):,} steps; from {good:,} of them the right "
        "answer was reached"
    )
    if not unstated:
        return text
    text += f"; {unstated:,} answers could not be read: wanted is {STATED_ANSWER}"
    if not good:
        raise ValueError(f"{output}: {text}")
    return text


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("make_process_labels", __doc__, LabelSettings, HELP)
    parser.add_argument(
        "--system",
        default="visualprm",
        help="system message of the rows: visualprm (its data's; the default), visualprm_trained "
        "(as its public trainer shows it to the model, with a literal <image> line before it), "
        "none, or a text",
    )
    return parser.parse_args(arguments)


def make(options: argparse.Namespace) -> None:
    system = (SYSTEMS | {"none": None}).get(options.system, options.system)
    settings = settings_of(options, LabelSettings, system=system)

    def make_all(chat: Chat, questions: list[Question], checkpoint: str) -> None:
        errors = {"on_error": options.on_error, "retry_errors": options.retry_errors}
        run(chat, questions, options.output, settings, checkpoint, **errors)

    run_program(options, settings, ROW_KEYS, make_all, need_answers=True)
    report(options, summary(options.output))


def main(arguments: Sequence[str] | None = None) -> int:
    return command_line.call(lambda: make(parse(arguments)), ImportError)


if __name__ == "__main__":
    sys.exit(main())
