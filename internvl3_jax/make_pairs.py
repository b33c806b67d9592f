"""Pairs for preference optimisation from a model's own answers, as MMPR was made (Wang et al. 2024).

    python -m internvl3_jax.make_pairs --checkpoint DIR --questions questions.jsonl --output pairs.jsonl

A line of --questions is {"question": TEXT, "image": PATH or [PATHS], "answer": TEXT, "id": ANY}; image and id may be missing.

With an answer: several answers are drawn and compared with it (verify.py); each right one with each wrong one is a pair, at most
--most_pairs of them, drawn at random. Of no use are questions answered always right or always wrong, equal pairs, and pairs whose
rejected answer holds the chosen one. Answers that state nothing are wrong only with --format_negatives.

Without one, but with a picture (Dropout NTP): the drawn answer is chosen; rejected is its first half, continued without the pictures.

Each line of --output is a row for train.py (list it in a meta JSON whose root is the questions' folder). OUTPUT.done has a line for each
finished question, what was drawn and how many pairs it gave; started again with the same model and settings, it goes on behind the last.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from internvl3_jax.chat import Chat
from internvl3_jax.checkpoint import load
from internvl3_jax.data.chat import PICTURE_TAG
from internvl3_jax.questions import Question, marked, read_questions, states, whole_lines
from internvl3_jax.verify import extract_answer


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
        return {"temperature": self.temperature, "top_k": self.top_k, "max_new_tokens": self.max_new_tokens}


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
        return [common | {"chosen": chosen, "rejected": rejected} for chosen, rejected in self.pairs]

    def done(self) -> dict:
        return {
            "id": self.question.id,
            "mark": self.question.mark,
            "pairs": len(self.pairs),
            "right": self.right,
            "wrong": self.wrong,
            "silent": self.silent,
        }


def find_pairs(chat: Chat, questions: Sequence[Question], settings: Settings, first: int = 1) -> list[Found]:
    """Of questions that all have an answer, or all have none. first: number of the first one, for errors."""
    return (_checked if questions[0].answer is not None else _dropped)(chat, questions, settings, first)


def _checked(chat: Chat, questions: Sequence[Question], settings: Settings, first: int) -> list[Found]:
    requests = [(question.question, question.images) for question in questions]
    drawn = chat.candidates(requests, settings.samples, seed=settings.seed, first=first, **settings.drawing())
    found = []
    for question, answers in zip(questions, drawn, strict=True):
        texts = list(dict.fromkeys(answer.text for answer in answers if answer.text.strip()))
        silent = [text for text in texts if extract_answer(text) is None]
        right = [text for text in texts if states(text, question.answer)]
        wrong = [text for text in texts if text not in {*silent, *right}]
        negatives = wrong + (silent if settings.format_negatives else [])
        pairs = choose(right, negatives, settings.most_pairs, (settings.seed, *json.dumps(question.id).encode()))
        found.append(Found(question, pairs, len(right), len(wrong), len(silent)))
    return found


def choose(right: Sequence[str], wrong: Sequence[str], most: int, seed) -> list[tuple[str, str]]:
    """At most so many of the pairs of a right and a wrong answer, at random, in the order of the answers."""
    pairs = [(chosen, rejected) for chosen, rejected in itertools.product(right, wrong) if chosen not in rejected]
    if len(pairs) > most:
        kept = np.random.default_rng(seed).choice(len(pairs), most, replace=False)
        pairs = [pairs[index] for index in sorted(kept)]
    return pairs


def _dropped(chat: Chat, questions: Sequence[Question], settings: Settings, first: int) -> list[Found]:
    requests = [(question.question, question.images) for question in questions]
    drawn = chat.candidates(requests, 1, seed=settings.seed, first=first, **settings.drawing())
    chosen = [answer.text for (answer,) in drawn]
    begun = [first_half(text) for text in chosen]
    blind = [(question.question.replace(f"{PICTURE_TAG}\n", "").replace(PICTURE_TAG, ""), []) for question in questions]
    rest = chat.candidates(blind, 1, begun=begun, seed=settings.seed + 1, **settings.drawing())
    pairs = [(text, start + answer.text) for text, start, (answer,) in zip(chosen, begun, rest, strict=True)]
    return [
        Found(question, [pair] if pair[0].strip() and pair[0] not in pair[1] else [])
        for question, pair in zip(questions, pairs, strict=True)
    ]


def first_half(text: str) -> str:
    """The first half of its words, with what stands between them and behind the last."""
    words = [index for index in range(1, len(text)) if text[index - 1].isspace() and not text[index].isspace()]
    return text[: words[(len(words) - 1) // 2]] if words else ""


def go_on(output: pathlib.Path, questions: Sequence[Question]) -> int:
    """How many questions are finished; rows behind theirs are removed. ValueError if the files are of others."""
    done = done_path(output)
    if not output.exists() and not done.exists():
        return 0
    try:
        finished = [json.loads(line) for line in whole_lines(done)]
        pairs = sum(row["pairs"] for row in finished)
        rows = whole_lines(output)[:pairs]
        known = [(row["id"], row["mark"]) for row in finished]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{output} and {done} are not both of this program: {error!r}; name another --output") from error
    if known != [(question.id, question.mark) for question in questions[: len(known)]] or len(rows) < pairs:
        raise ValueError(
            f"{output} holds pairs of other questions, or of another --checkpoint or other settings; move it and {done} away or name "
            f"another --output"
        )
    output.write_text("".join(rows), encoding="utf-8")
    done.write_text("".join(json.dumps(row) + "\n" for row in finished), encoding="utf-8")
    return len(known)


def done_path(output: pathlib.Path) -> pathlib.Path:
    return output.with_name(f"{output.name}.done")


def run(chat: Chat, questions: Sequence[Question], output: pathlib.Path, settings: Settings, checkpoint: str = "") -> None:
    """Makes the pairs of the questions that are not finished; each batch of them is written at once. checkpoint: name of the chat's."""
    from rich.progress import track

    questions = marked(questions, settings, checkpoint)
    start = go_on(output, questions)
    if start:
        print(f"{output}: {start} of {len(questions)} questions are finished; going on with the rest", file=sys.stderr)
    batches = _batches(questions[start:], settings)
    with output.open("a", encoding="utf-8") as rows, done_path(output).open("a", encoding="utf-8") as done:
        for batch in track(batches, description="drawing", disable=not sys.stderr.isatty()):
            found = find_pairs(chat, batch, settings, start + 1)
            start += len(batch)
            rows.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for one in found for row in one.rows()))
            rows.flush()
            done.write("".join(json.dumps(one.done(), ensure_ascii=False) + "\n" for one in found))
            done.flush()


def _batches(questions: Sequence[Question], settings: Settings) -> list[list[Question]]:
    """Questions of one kind, in their order."""
    batches = []
    for is_checked, group in itertools.groupby(questions, lambda question: question.answer is not None):
        size = max(1, settings.batch_size // settings.samples) if is_checked else settings.batch_size
        group = list(group)
        batches += [group[start : start + size] for start in range(0, len(group), size)]
    return batches


def summary(output: pathlib.Path) -> str:
    finished = [json.loads(line) for line in whole_lines(done_path(output))]
    usable = sum(row["pairs"] > 0 for row in finished)
    blind = sum(row["pairs"] > 0 and not row["right"] for row in finished)
    never = sum(row["right"] == 0 and row["wrong"] + row["silent"] > 0 for row in finished)
    always = sum(row["right"] > 0 and row["wrong"] + row["silent"] == 0 for row in finished)
    return (
        f"{sum(row['pairs'] for row in finished):,} pairs of {usable:,} of {len(finished):,} questions; {always:,} were always answered "
        f"right, {never:,} never" + (f"; {blind:,} had no known answer (Dropout NTP)" if blind else "")
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="of the model that answers: the one that will be trained")
    parser.add_argument("--questions", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    for field in dataclasses.fields(Settings):
        if field.type is bool:
            parser.add_argument(f"--{field.name}", action="store_true")
        else:
            parser.add_argument(f"--{field.name}", type=field.type, default=field.default)
    parser.add_argument("--dtype", default=None, help="of parameters and computation")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        settings = Settings(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)})
        questions = read_questions(options.questions, checked=False)
        checkpoint = load(options.checkpoint, dtype=options.dtype)
        run(Chat(checkpoint), questions, options.output, settings, str(checkpoint.directory))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(summary(options.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
