"""Questions with known answers, that answers are drawn to: for pairs (make_pairs.py) and for a critic's labels (make_process_labels.py)."""

import dataclasses
import json
import pathlib

from internvl3_jax.data.chat import insert_missing_tags
from internvl3_jax.verify import extract_answer, same_answer


@dataclasses.dataclass
class Question:
    id: object
    question: str  # with a tag for each picture
    images: list[str]  # files
    answer: str | None  # None where none can be checked
    image: object  # as the line has it


def read_questions(path: pathlib.Path, checked: bool = True) -> list[Question]:
    """The lines of a JSONL file; with `checked` each has an answer.

    ValueError naming the line that is none, whose picture is missing, or whose id stands there twice."""
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            image, text, answer = row.get("image"), row["question"], row["answer"] if checked else row.get("answer")
            images = [image] if isinstance(image, str) else list(image or [])
            files = [path.parent / name for name in images]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{path} line {number} is no {{"question": ..., "image": ..., "answer": ..., "id": ...}}: {error!r}'
            ) from error
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"{path} line {number}: {missing[0]} does not exist")
        (turn,) = insert_missing_tags([{"role": "user", "content": text}], len(files), f"{path} line {number}")
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
