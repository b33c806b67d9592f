"""The part of the command line that make_pairs and make_process_labels share: a model, a file of
questions, and a resumable output.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

from internvl3_jax.checkpoints.checkpoint import load
from internvl3_jax.checkpoints.param_hash import tree_hash
from internvl3_jax.checkpoints.storage import by_path
from internvl3_jax.inference.answering import ON_ERROR
from internvl3_jax.inference.chat import Chat
from internvl3_jax.inference.options import Options
from internvl3_jax.inference.output_path import check_output_path, path_beside
from internvl3_jax.io import command_line, safe_files
from internvl3_jax.io.checkpoint_paths import check_exists
from internvl3_jax.reward.question_output import check_own, done_path, failures
from internvl3_jax.reward.questions import Question, read_questions

DTYPES = ("float32", "bfloat16", "float16")


def make_parser(
    name: str, description: str, settings: type, help_texts: Mapping[str, str]
) -> command_line.Parser:
    """Returns a parser with a flag per field of the dataclass `settings` that has a help text."""
    parser = command_line.Parser(name, description=description)
    parser.set_defaults(program=name)
    model = parser.add_argument_group("Model")
    model.add_argument("--checkpoint", required=True, help="directory, training run or hub id")
    model.add_argument(
        "--dtype",
        choices=DTYPES,
        default=None,
        help="of parameters and computation (default: as stored)",
    )
    files = parser.add_argument_group("Questions and output")
    files.add_argument("--questions", type=command_line.expanded, required=True, help="JSONL file")
    files.add_argument(
        "--output",
        type=command_line.expanded,
        required=True,
        help="JSONL file; if it exists, the run is resumed",
    )
    files.add_argument(
        "--on_error",
        choices=ON_ERROR,
        default="note",
        help="a question that cannot be asked: note the error in OUTPUT.done and continue, or stop "
        "(default: note)",
    )
    files.add_argument(
        "--retry_errors",
        action="store_true",
        help="ask the questions again that have an error in OUTPUT.done",
    )
    _add_settings(parser.add_argument_group("Answers"), settings, help_texts)
    images = parser.add_argument_group("Images")
    images.add_argument(
        "--max_image_pixels",
        type=int,
        default=None,
        help="larger images are refused; 0: no limit (default: 89 million)",
    )
    images.add_argument(
        "--allow_truncated",
        action="store_true",
        help="accept truncated images; the missing part is gray",
    )
    return parser


def _add_settings(group, settings: type, help_texts: Mapping[str, str]) -> None:
    for field in dataclasses.fields(settings):
        if field.name not in help_texts:
            continue
        text = help_texts[field.name]
        if isinstance(field.default, bool):
            group.add_argument(f"--{field.name}", action="store_true", help=text)
        else:
            group.add_argument(
                f"--{field.name}",
                type=type(field.default),
                default=field.default,
                help=f"{text} (default: {field.default})",
            )


def settings_of(options: argparse.Namespace, settings: type, **changes):
    """Returns the dataclass `settings` with the values of the command line, and `changes`."""
    names = [field.name for field in dataclasses.fields(settings) if field.name not in changes]
    return settings(**{name: getattr(options, name) for name in names}, **changes)


def run_program(
    options: argparse.Namespace,
    settings,
    row_keys: Sequence[str],
    make: Callable[[Chat, list[Question], str], None],
    *,
    need_answers: bool,
) -> None:
    """Checks the command line, loads the model, and calls `make`.

    Args:
      settings: dataclass with temperature, top_k, max_new_tokens and seed.
      row_keys: keys that each row of the output has.
      make: takes the chat, the questions and a hash of the parameters.
      need_answers: whether every question needs an answer.

    Raises:
      ValueError: at the end, if a question could not be asked; or before the model is loaded, for
        whatever can be seen without it.
    """
    images = {
        "max_image_pixels": options.max_image_pixels,
        "allow_truncated": options.allow_truncated,
    }
    # 1) All that can be checked before the model is loaded.
    names = ("temperature", "top_k", "max_new_tokens", "seed")
    Options(**{name: getattr(settings, name) for name in names}, **images)
    check_exists(options.checkpoint)
    questions = read_questions(options.questions, need_answers)
    inputs: list[str | pathlib.Path] = [options.questions]
    inputs += [file for question in questions for file in question.images]
    for path in (options.output, done_path(options.output)):
        check_output_path(path, inputs)
    check_own(options.output, row_keys, options.program)
    # 2) The model, and the rows.
    with safe_files.Lock(path_beside(options.output, "lock"), str(options.output)):
        checkpoint = load(options.checkpoint, dtype=options.dtype)
        weights = tree_hash(by_path(checkpoint.params))
        make(Chat(checkpoint, donate=True, **images), questions, weights)


def report(options: argparse.Namespace, summary: str) -> None:
    """Prints the summary. Raises ValueError, for status 1, if a question could not be asked."""
    print(summary)
    if failed := failures(options.output):
        raise ValueError(f"{options.output}: {failed}")
