"""Questions with known answers, that answers are drawn to: for pairs (make_pairs.py) and for a
critic's labels (make_process_labels.py).
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence

from internvl3_jax.data.text.chat_template import IMAGE_TAG, insert_missing_tags
from internvl3_jax.inference.requests import KEPT, refuse_unknown
from internvl3_jax.io import jsonl
from internvl3_jax.io.terminal import excerpt, one_line, short_name
from internvl3_jax.reward.answer_matching import extract_answer, same_answer


@dataclasses.dataclass
class Question:
    id: object
    question: str  # with a tag for each picture
    images: list[str]  # files
    answer: str | None  # None where none can be checked
    image: object  # as the line has it
    mark: str = ""  # hash of the question and of how it is asked; see `marked`


WANTED = r'a stated answer ("Answer: ..." or \boxed{...}); ask for it in the questions'


def with_fingerprint(questions: Sequence[Question], settings, checkpoint: str) -> list[Question]:
    """Each with its mark, by which a program that goes on knows its own earlier work: of the same
    question, model and settings but for settings.batch_size, which changes no answer. checkpoint:
    what tells the model's parameters from others.
    """
    how = {
        name: value for name, value in dataclasses.asdict(settings).items() if name != "batch_size"
    }

    def mark(question: Question) -> str:
        asked = [question.question, question.image, question.answer, how, checkpoint]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]

    return [dataclasses.replace(question, mark=mark(question)) for question in questions]


def read_questions(path: pathlib.Path, checked: bool = True) -> list[Question]:
    """The lines of a JSONL file; with `checked` each has an answer, otherwise an answer or an
    image.

    Raises:
      ValueError: naming file and line of one that is no question, has keys of another meaning,
      whose images are missing or more than its
        tags, or whose id occurs twice.
    """
    path, questions, ids = pathlib.Path(os.path.expanduser(path)), [], {}
    for row in jsonl.read_objects(path):
        where, number = row.where, int(row.where.rpartition(" ")[2])
        text = row.get("question", str)
        image, answer = (
            row.get("image", (str, list), None),
            row.get("answer", (str, int, float), None),
        )
        names = [image] if isinstance(image, str) else image or []
        if not all(isinstance(name, str) and name for name in names):
            raise ValueError(
                f"{where}: image is {excerpt(image)}; expected a path or a list of paths"
            )
        refuse_unknown(row, ("question", "id", "image", *KEPT))
        files = [path.parent / os.path.expanduser(name) for name in names]
        missing = [file for file in files if not os.path.isfile(file)]
        if missing:
            raise ValueError(
                f"{where}: {short_name(str(missing[0]))} does not exist; relative paths start at the folder of the questions"
            )
        if answer is None and (checked or not files):
            raise ValueError(
                f"{where} has no answer{'' if checked else ' and no image'}: what is right is not known"
            )
        (turn,) = insert_missing_tags([{"role": "user", "content": text}], len(files), where)
        if (tags := turn["content"].count(IMAGE_TAG)) < len(files):
            raise ValueError(f"{where}: {len(files)} pictures, but {tags} {IMAGE_TAG} tags")
        known = row.values.get("id", number)
        if (first := ids.setdefault(json.dumps(known, sort_keys=True), where)) != where:
            raise ValueError(
                f"{where}: the id {excerpt(known)} is also that of {first}; a run that was stopped is resumed by ids"
            )
        answer = None if answer is None else str(answer)
        questions.append(Question(known, turn["content"], list(map(str, files)), answer, image))
    if not questions:
        raise ValueError(f"{one_line(str(path))}: has no questions")
    return questions


def is_correct(solution: str, answer: str) -> bool:
    """Whether a solution states the answer. What it does not state it does not answer."""
    stated = extract_answer(solution)
    return stated is not None and same_answer(stated, answer)


def may_be_torn(torn: bytes, question: Question | None) -> bool:
    """Whether what follows the last line break of an output may be the beginning of a row about
    this question.
    """
    start = b'{"id": ' + (
        b""
        if question is None
        else json.dumps(question.id, ensure_ascii=False).encode("utf-8", "replace")
    )
    return torn.startswith(start) or start.startswith(torn)
