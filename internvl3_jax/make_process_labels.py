"""Training data for a critic: solutions with + or - after every step, by whether the right answer can still be reached from there.

    python -m internvl3_jax.make_process_labels --checkpoint DIR --questions questions.jsonl --output labels.jsonl

A line of --questions is {"question": TEXT, "image": PATH or [PATHS], "answer": TEXT, "id": ANY}; image and id may be missing. The question
asks for steps with blank lines between them and for a stated answer ("Answer: ..." or a box; see verify.py). For each question some
solutions are drawn; from the end of each step several continuations are drawn; the share of them that states the right answer is the
step's score, and a step above --threshold is a +. A last step is judged by the answer itself. As the data of VisualPRM was made.

Each line of --output is a conversation for train.py (list it in a meta JSON whose root is the questions' folder); it also holds the scores,
and how many lines there are of its question. Started again, it goes on behind the last question that is whole.
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence

from internvl3_jax.chat import Chat
from internvl3_jax.checkpoint import load
from internvl3_jax.data.chat import OFFICIAL_ROLES
from internvl3_jax.data.steps import BAD, GOOD, SEPARATOR, SYSTEM, critic_messages, split_steps
from internvl3_jax.questions import Question, marked, read_questions, states, whole_lines

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


def label(chat: Chat, questions: Sequence[Question], settings: Settings, first: int = 1) -> list[dict]:
    """Rows of all questions: one for each different solution, in the order of the questions. first: number of the first, for errors."""
    drawing = {"temperature": settings.temperature, "top_k": settings.top_k, "max_new_tokens": settings.max_new_tokens}
    requests = [(question.question, question.images) for question in questions]
    drawn = chat.candidates(requests, settings.solutions, seed=settings.seed, first=first, **drawing)
    solutions = [
        (question, split_steps(text, settings.max_steps))
        for question, answers in zip(questions, drawn, strict=True)
        for text in dict.fromkeys(answer.text for answer in answers)
    ]
    # What solutions of one question have in common is continued once. Short ones first: neighbours share a bucket.
    scores = [[0.0] * (len(steps) - 1) + [float(states(SEPARATOR.join(steps), q.answer))] for q, steps in solutions]
    places = collections.defaultdict(list)  # (question, the solution up to the end of a step) -> [(solution, step), ...]
    for number, (question, steps) in enumerate(solutions):
        for step in range(len(steps) - 1):
            begun = "".join(part + SEPARATOR for part in steps[: step + 1])
            places[questions.index(question), begun].append((number, step))
    order = sorted(places, key=lambda place: len(place[1]))
    size = max(1, settings.batch_size // settings.continuations)
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        texts = [text for _, text in batch]
        seed = settings.seed + settings.solutions
        rest = chat.candidates(
            [requests[number] for number, _ in batch], settings.continuations, begun=texts, seed=seed, **drawing
        )
        for (asked, text), answers in zip(batch, rest, strict=True):
            hits = sum(states(text + answer.text, questions[asked].answer) for answer in answers)
            for number, step in places[asked, text]:
                scores[number][step] = hits / settings.continuations
    rows = [_row(question, steps, found, settings) for (question, steps), found in zip(solutions, scores, strict=True)]
    of = collections.Counter(json.dumps(row["id"]) for row in rows)
    return [row | {"solutions": of[json.dumps(row["id"])]} for row in rows]


def _row(question: Question, steps: list[str], scores: list[float], settings: Settings) -> dict:
    labels = [GOOD if score > settings.threshold else BAD for score in scores]
    messages = critic_messages(question.question, steps, labels, settings.system)
    turns = [{"from": OFFICIAL[message["role"]], "value": message["content"]} for message in messages]
    image = {} if question.image is None else {"image": question.image}
    return {"id": question.id, **image, "conversations": turns, "scores": scores, "mark": question.mark}


def keep_whole(output: pathlib.Path, questions: Sequence[Question]) -> int:
    """How many questions the file has all rows of; what follows them is removed."""
    if not output.exists():
        return 0
    lines = whole_lines(output)
    try:
        rows = [json.loads(line) for line in lines]
        places = [(json.dumps(row["id"]), row["solutions"]) for row in rows]
        marks = {json.dumps(row["id"]): row["mark"] for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{output} holds other lines than this program writes; name another --output") from error
    found = collections.Counter(id for id, _ in places)
    whole = [id for id in dict.fromkeys(id for id, _ in places) if (id, found[id]) in places]
    if [(id, marks[id]) for id in whole] != [(json.dumps(question.id), question.mark) for question in questions[: len(whole)]]:
        raise ValueError(
            f"{output} holds labels of other questions, or of another --checkpoint or other settings; move it away or name another --output"
        )
    kept = [line for line, (id, _) in zip(lines, places, strict=True) if id in set(whole)]
    output.write_text("".join(kept), encoding="utf-8")
    return len(whole)


def run(chat: Chat, questions: Sequence[Question], output: pathlib.Path, settings: Settings, checkpoint: str = "") -> None:
    """Labels the questions that the output does not hold yet; after each batch of them it is written. checkpoint: name of the chat's."""
    from rich.progress import track

    questions = marked(questions, settings, checkpoint)
    done = keep_whole(output, questions)
    if done:
        print(f"{output} holds {done} of {len(questions)} questions; going on with the rest", file=sys.stderr)
    size = max(1, settings.batch_size // settings.solutions)
    with output.open("a", encoding="utf-8") as file:
        starts = range(done, len(questions), size)
        for start in track(starts, description="labelling", disable=not sys.stderr.isatty()):
            rows = label(chat, questions[start : start + size], settings, start + 1)
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            file.flush()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="of the model whose solutions are labelled")
    parser.add_argument("--questions", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    for field in dataclasses.fields(Settings):
        if field.name != "system":
            kind = float if isinstance(field.default, float) else int
            parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    parser.add_argument("--system", default="visualprm", help="system message of the rows: visualprm's own, none, or a text")
    parser.add_argument("--dtype", default=None, help="of parameters and computation")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)}
    values["system"] = {"visualprm": SYSTEM, "none": None}.get(options.system, options.system)
    try:
        settings = Settings(**values)
        questions = read_questions(options.questions)
        checkpoint = load(options.checkpoint, dtype=options.dtype)
        run(Chat(checkpoint), questions, options.output, settings, str(checkpoint.directory))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
