"""Training data for a critic: solutions with + or - after every step, by whether the right answer
can still be reached from there.

    python -m internvl3_jax.reward.make_process_labels --checkpoint DIR --questions questions.jsonl --output labels.jsonl

A line of --questions is {"question": TEXT, "image": PATH or [PATHS], "answer": TEXT, "id": ANY};
image and id may be missing. The question asks for steps with blank lines between them and for a
stated answer ("Answer: ..." or a box; see verify.py). For each question some solutions are drawn;
from the end of each step, the last one too, several continuations are drawn; the share of them that
states the right answer is the step's score, and a step above --threshold is a +. A continuation
begins right behind the step's last letter, so that it may also continue the step. As the data of
VisualPRM was made, but that steps behind one with score 0 are continued as well (its scripts give
them 0).

Each line of --output is a conversation for train.py (list it in a meta JSON whose root is the
questions' folder); it also holds the scores, how many lines there are of its question, and how many
answers could not be read ("silent"). Started again, it resumes behind the last question that is
whole. The status is 1 if no answer could be read.
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence

from internvl3_jax.checkpoints.checkpoint import load
from internvl3_jax.checkpoints.param_hash import tree_hash
from internvl3_jax.checkpoints.storage import by_path
from internvl3_jax.data.critic_format import (
    BAD,
    GOOD,
    SEPARATOR,
    SYSTEM,
    SYSTEMS,
    critic_messages,
    split_steps,
)
from internvl3_jax.data.text.chat_template import OFFICIAL_ROLES
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

OFFICIAL = {role: name for name, role in OFFICIAL_ROLES.items()}


@dataclasses.dataclass
class Settings:
    """The defaults are those of the scripts that made VisualPRM400K-v1.1."""

    solutions: int = 4  # of each question; equal ones are labelled once
    continuations: int = 16  # from each step
    temperature: float = 1.0
    top_k: int = 50
    max_new_tokens: int = 4096
    max_steps: int | None = 16
    threshold: float = 0.0
    system: str | None = SYSTEM
    batch_size: int = 64  # answers drawn together
    seed: int = 0

    def __post_init__(self):
        for name in ("solutions", "continuations", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        split_steps("", self.max_steps)


def label(
    chat: Chat, questions: Sequence[Question], settings: Settings, first: int = 1
) -> list[dict]:
    """Rows of all questions: one for each different solution, in the order of the questions. first:
    number of the first, for errors.
    """
    drawing = {
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "max_new_tokens": settings.max_new_tokens,
    }
    requests = [(question.question, question.images) for question in questions]
    drawn = chat.candidates(
        requests, settings.solutions, seed=settings.seed, first=first, **drawing
    )
    solutions = [
        (question, split_steps(text, settings.max_steps))
        for question, answers in zip(questions, drawn, strict=True)
        for text in dict.fromkeys(answer.text for answer in answers)
    ]
    # What solutions of one question have in common is continued once. Short ones first: neighbours
    # share a bucket.
    scores = [[0.0] * len(steps) for _, steps in solutions]
    silent = [int(extract_answer(SEPARATOR.join(steps)) is None) for _, steps in solutions]
    # (question, the solution up to the end of a step) -> [(solution, step), ...]
    places = collections.defaultdict(list)
    for number, (question, steps) in enumerate(solutions):
        for step in range(len(steps)):
            begun = SEPARATOR.join(steps[: step + 1])
            places[questions.index(question), begun].append((number, step))
    order = sorted(places, key=lambda place: len(place[1]))
    size = max(1, settings.batch_size // settings.continuations)
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        texts = [text for _, text in batch]
        seed = settings.seed + settings.solutions
        rest = chat.candidates(
            [requests[number] for number, _ in batch],
            settings.continuations,
            begun=texts,
            seed=seed,
            **drawing,
        )
        for (asked, text), answers in zip(batch, rest, strict=True):
            whole = [text + answer.text for answer in answers]
            hits = sum(is_correct(solution, questions[asked].answer) for solution in whole)
            unread = sum(extract_answer(solution) is None for solution in whole)
            for number, step in places[asked, text]:
                scores[number][step] = hits / settings.continuations
                silent[number] += unread
    rows = [
        _row(question, steps, found, settings) | {"silent": unread}
        for (question, steps), found, unread in zip(solutions, scores, silent, strict=True)
    ]
    of = collections.Counter(json.dumps(row["id"]) for row in rows)
    return [row | {"solutions": of[json.dumps(row["id"])]} for row in rows]


def _row(question: Question, steps: list[str], scores: list[float], settings: Settings) -> dict:
    labels = [GOOD if score > settings.threshold else BAD for score in scores]
    messages = critic_messages(question.question, steps, labels, settings.system)
    turns = [
        {"from": OFFICIAL[message["role"]], "value": message["content"]} for message in messages
    ]
    image = {} if question.image is None else {"image": question.image}
    return {
        "id": question.id,
        **image,
        "conversations": turns,
        "scores": scores,
        "mark": question.mark,
    }


def keep_whole(output: pathlib.Path, questions: Sequence[Question]) -> int:
    """How many questions the file has all rows of. Nothing is changed. ValueError if it is not
    ours, or of other questions.
    """
    return _whole(output, questions)[0]


def _whole(output: pathlib.Path, questions: Sequence[Question]) -> tuple[int, int]:
    """(questions that the file has all rows of, bytes of these rows)"""
    if not output.exists():
        return 0, 0
    try:
        lines = jsonl.whole_lines(output)
        rows = [row.values for row in jsonl.parse(lines, output)]
        places = [(json.dumps(row["id"]), row["solutions"]) for row in rows]
        marks = {json.dumps(row["id"]): row["mark"] for row in rows}
        ours = all("conversations" in row for row in rows)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{output} holds other lines than this program writes ({error}); name another --output"
        ) from error
    found = collections.Counter(id for id, _ in places)
    whole = [id for id in dict.fromkeys(id for id, _ in places) if (id, found[id]) in places]
    # the first line of all may be torn, too; it is known by its question
    following = questions[0] if questions else None
    if not ours or not may_be_torn(jsonl.torn(output), None if rows else following):
        raise ValueError(
            f"{output} holds other lines than this program writes; name another --output"
        )
    if [(id, marks[id]) for id in whole] != [
        (json.dumps(question.id), question.mark) for question in questions[: len(whole)]
    ]:
        raise ValueError(
            f"{output} holds labels of other questions, or of another --checkpoint or other settings; move it away or name another --output"
        )
    kept = set(whole)
    return len(whole), sum(
        len(line) for line, (id, _) in zip(lines, places, strict=True) if id in kept
    )


def run(
    chat: Chat,
    questions: Sequence[Question],
    output: pathlib.Path,
    settings: Settings,
    checkpoint: str = "",
) -> None:
    """Labels the questions that the output does not hold yet; after each batch of them it is
    written. checkpoint: what tells the chat's parameters from others.
    """
    from rich.progress import track

    questions = with_fingerprint(questions, settings, checkpoint)
    done, kept = _whole(output, questions)
    if done:
        print(
            f"{output} holds {done} of {len(questions)} questions; resuming with the rest",
            file=sys.stderr,
        )
    size = max(1, settings.batch_size // settings.solutions)
    with jsonl.Appender(output, kept) as file:
        starts = range(done, len(questions), size)
        for start in track(starts, description="labelling", disable=not sys.stderr.isatty()):
            rows = label(chat, questions[start : start + size], settings, start + 1)
            file.write([jsonl.dumps(row) for row in rows])


def summary(output: pathlib.Path) -> str:
    """What was labelled. ValueError if no answer could be read, so that every step is a -."""
    rows = [row.values for row in jsonl.parse(jsonl.whole_lines(output), output)]
    scores = [score for row in rows for score in row["scores"]]
    silent = sum(row.get("silent", 0) for row in rows)
    good = sum(score > 0 for score in scores)
    text = f"{len(rows):,} solutions with {len(scores):,} steps; from {good:,} of them the right answer was reached"
    if silent and not good:
        raise ValueError(
            f"{output}: {text}; {silent:,} answers could not be read: wanted is {WANTED}"
        )
    return text + (f"; {silent:,} answers could not be read: wanted is {WANTED}" if silent else "")


HELP = {
    "solutions": "drawn for each question; equal ones are labelled once",
    "continuations": "drawn from the end of each step",
    "temperature": "of the draws",
    "top_k": "draw from this many likeliest tokens; 0 is all",
    "max_new_tokens": "longest solution or continuation",
    "max_steps": "steps are merged to at most so many",
    "threshold": "a step with a higher score is a +",
    "batch_size": "answers drawn together",
    "seed": "of the draws",
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.Parser("make_process_labels", description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, help="of the model whose solutions are labelled"
    )
    parser.add_argument("--questions", type=command_line.expanded, required=True, help="JSONL file")
    parser.add_argument(
        "--output",
        type=command_line.expanded,
        required=True,
        help="JSONL file; it is resumed if it is there",
    )
    for field in dataclasses.fields(Settings):
        if field.name != "system":
            kind = float if isinstance(field.default, float) else int
            text = f"{HELP[field.name]} (default: {field.default})"
            parser.add_argument(f"--{field.name}", type=kind, default=field.default, help=text)
    parser.add_argument(
        "--system",
        default="visualprm",
        help="system message of the rows: visualprm (its data's; the default), visualprm_trained (as its public trainer shows it to the "
        "model, with a literal <image> line before it), none, or a text",
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
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)}
    values["system"] = (SYSTEMS | {"none": None}).get(options.system, options.system)
    settings = Settings(**values)
    Options(
        temperature=settings.temperature,
        top_k=settings.top_k,
        max_new_tokens=settings.max_new_tokens,
        seed=settings.seed,
    )
    questions = read_questions(options.questions)
    inputs = [options.questions, *(file for question in questions for file in question.images)]
    check_place(options.output, inputs, "--output")
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
