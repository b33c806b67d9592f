"""Questions with known answers, that answers are drawn to: for pairs (make_pairs.py) and for a critic's labels (make_process_labels.py)."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence

from internvl3_jax.data.chat import PICTURE_TAG, insert_missing_tags
from internvl3_jax.verify import extract_answer, same_answer


@dataclasses.dataclass
class Question:
    id: object
    question: str  # with a tag for each picture
    images: list[str]  # files
    answer: str | None  # None where none can be checked
    image: object  # as the line has it
    mark: str = ""  # hash of the question and of how it is asked; see `marked`


def marked(questions: Sequence[Question], settings, checkpoint: str) -> list[Question]:
    """Each with its mark, by which a program that goes on knows its own earlier work: of the same question, model and settings but for
    settings.batch_size, which changes no answer."""
    how = {name: value for name, value in dataclasses.asdict(settings).items() if name != "batch_size"}

    def mark(question: Question) -> str:
        asked = [question.question, question.image, question.answer, how, checkpoint]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]

    return [dataclasses.replace(question, mark=mark(question)) for question in questions]


def whole_lines(path: pathlib.Path) -> list[str]:
    """With their ends; without a last one that was cut off. Lines end where json ends them, not at U+2028 and the like."""
    text = path.read_text(encoding="utf-8")
    return [line + "\n" for line in text.split("\n")[:-1]]


def read_questions(path: pathlib.Path, checked: bool = True) -> list[Question]:
    """The lines of a JSONL file; with `checked` each has an answer, otherwise an answer or a picture.

    ValueError naming the line that is none, whose pictures are missing or not as many as its tags, or whose id stands there twice."""
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            image, text, answer = row.get("image"), row["question"], row.get("answer")
            images = [image] if isinstance(image, str) else list(image or [])
            files = [path.parent / name for name in images]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{path} line {number} is no {{"question": ..., "image": ..., "answer": ..., "id": ...}}: {error!r}'
            ) from error
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"{path} line {number}: {missing[0]} does not exist")
        if answer is None and (checked or not files):
            raise ValueError(
                f"{path} line {number} has no answer{'' if checked else ' and no picture'}: what is right is not known"
            )
        (turn,) = insert_missing_tags([{"role": "user", "content": text}], len(files), f"{path} line {number}")
        if (tags := turn["content"].count(PICTURE_TAG)) != len(files):
            raise ValueError(f"{path} line {number}: {len(files)} pictures, but {tags} {PICTURE_TAG} tags")
        questions.append(
            Question(
                row.get("id", number), turn["content"], list(map(str, files)), None if answer is None else str(answer), image
            )
        )
    ids = [json.dumps(question.id) for question in questions]
    if len(set(ids)) < len(ids):
        twice = next(id for id in ids if ids.count(id) > 1)
        raise ValueError(f"{path}: the id {twice} stands there twice; a run that was stopped goes on by ids")
    return questions


def states(solution: str, answer: str) -> bool:
    """Whether a solution states the answer. What it does not state it does not answer."""
    stated = extract_answer(solution)
    return stated is not None and same_answer(stated, answer)
