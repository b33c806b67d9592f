"""Questions with known answers, which a model answers many times: for preference pairs
(make_pairs.py) and for a critic's labels (make_process_labels.py).
"""

import dataclasses
import hashlib
import json
import os
import pathlib

from internvl3_jax.data.text.chat_template import IMAGE_TAG, insert_missing_tags
from internvl3_jax.inference.requests import KEPT, image_hashes, refuse_data, refuse_unknown
from internvl3_jax.io import jsonl, strict_json
from internvl3_jax.io.terminal import excerpt, one_line, short_name
from internvl3_jax.reward.answer_matching import extract_answer, same_answer
from internvl3_jax.reward.matchers import Matcher

# Text that messages ask for when no answer could be read.
STATED_ANSWER = r'a stated answer ("Answer: ..." or \boxed{...}); ask for it in the questions'


@dataclasses.dataclass
class Question:
    """A line of a file of questions.

    Attributes:
      id: any JSON value; by default the line number.
      question: the text, with an <image> for each image.
      images: the image files.
      answer: the right answer; None if it is not known.
      image: the images as the line has them, for the rows that are written.
      where: "FILE line N (id X)", for messages.
    """

    id: object
    question: str
    images: list[str]
    answer: str | None
    image: object
    where: str = ""


def fingerprint(question: Question, settings, checkpoint: str) -> str:
    """Returns 12 hexadecimal digits of a hash of all that the rows of a question depend on.

    It covers the question with the content of its images, the parameters of the model, and the
    settings but for `batch_size`, which changes no answer.

    Args:
      settings: a dataclass.
      checkpoint: hash of the parameters.
    """
    values = dataclasses.asdict(settings)
    values.pop("batch_size", None)
    images = image_hashes(question.images)
    content = [question.question, question.image, images, question.answer, values, checkpoint]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def read_questions(path: pathlib.Path, need_answers: bool = True) -> list[Question]:
    """Reads the questions of a JSONL file.

    Args:
      need_answers: whether each needs an answer; otherwise it needs an answer or an image.

    Raises:
      ValueError: naming file and line, for a line that is not a question, has unknown keys, missing
        images, fewer tags than images, or the id of another line.
    """
    path = pathlib.Path(os.path.expanduser(path))
    questions, lines_of_ids = [], {}
    for row in jsonl.read_objects(path):
        question = _read_question(row, path.parent, need_answers)
        key = json.dumps(question.id, sort_keys=True)
        if (first := lines_of_ids.setdefault(key, row.where)) != row.where:
            raise ValueError(
                f"{row.where}: the id {excerpt(question.id)} is also that of {first}; a run that "
                "was stopped is resumed by ids"
            )
        questions.append(question)
    if not questions:
        raise ValueError(f"{one_line(str(path))}: has no questions")
    return questions


def _read_question(row: strict_json.Object, folder: pathlib.Path, need_answer: bool) -> Question:
    """Reads one line; relative paths start at `folder`. Raises ValueError as `read_questions`."""
    where = row.where
    refuse_unknown(row, ("question", "id", "image", *KEPT))
    text = row.get("question", str)
    image = row.get("image", (str, list), None)
    answer = row.get("answer", (str, int, float), None)
    names = [image] if isinstance(image, str) else image or []
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{where}: image is {excerpt(image)}; expected a path or a list of paths")
    refuse_data(row, names)
    files = [folder / os.path.expanduser(name) for name in names]
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        raise ValueError(
            f"{where}: {short_name(str(missing[0]))} does not exist; relative paths start at the "
            "folder of the questions"
        )
    if answer is None and (need_answer or not files):
        raise ValueError(
            f"{where} has no answer{'' if need_answer else ' and no image'}: what is right is not "
            "known"
        )
    (turn,) = insert_missing_tags([{"role": "user", "content": text}], len(files), where)
    if (tags := turn["content"].count(IMAGE_TAG)) < len(files):
        raise ValueError(f"{where}: {len(files)} images, but {tags} {IMAGE_TAG} tags")
    question_id = row.values.get("id", int(where.rpartition(" ")[2]))
    return Question(
        id=question_id,
        question=turn["content"],
        images=list(map(str, files)),
        answer=None if answer is None else str(answer),
        image=image,
        where=f"{where} (id {excerpt(question_id)})",
    )


def is_correct(solution: str, answer: str, matches: Matcher = same_answer) -> bool:
    """Returns whether a solution states the answer; one that states none is not correct.

    matches: compares the stated answer with the right one (see matchers.py).
    """
    stated = extract_answer(solution)
    return stated is not None and matches(stated, answer)
