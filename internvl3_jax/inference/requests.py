"""Requests in a JSONL file: what infer.py --requests reads.

    {"prompt": TEXT, "image": PATH or [PATHS], "id": ANY, "expected": ANY, "task": ANY, "extra": ANY}

All but the prompt may be missing. Relative paths start at the file's folder. The keys in `KEPT` are
not looked at; they are kept in the answer, and "extra" has room for anything else.
"""

import os
import pathlib
from collections.abc import Sequence

from internvl3_jax.io import jsonl, remote_files, strict_json
from internvl3_jax.io.remote_files import as_path, is_remote
from internvl3_jax.io.strict_json import JsonError
from internvl3_jax.io.terminal import excerpt

KEPT = ("expected", "answer", "label", "task", "category", "source", "extra")
# What other programs call it.
ELSEWHERE = {
    "images": "image",
    "picture": "image",
    "image_path": "image",
    "img": "image",
    "question": "prompt",
    "query": "prompt",
    "text": "prompt",
    "instruction": "prompt",
    "question_id": "id",
    "messages": "one prompt",
    "conversations": "one prompt",
    "history": "one prompt",
    "system": "--system",
    "temperature": "--temperature",
    "max_tokens": "--max_new_tokens",
    "max_new_tokens": "--max_new_tokens",
    "stop": "--stop",
    "video": "the frames as image",
    "videos": "the frames as image",
}


def read_requests(path: str | os.PathLike) -> list[dict]:
    """The requests of a file, each with the fields

    prompt: text; image: list of paths, relative ones from the file's folder; id: by default the
        line number;
    where: "FILE line N"; asked: what the answer repeats of the line: id, prompt, image and the keys
        in `KEPT`.

    Raises:
      FileError: naming file and line, if any line is no request. Whether its images can be opened
      is not looked at.
    """
    path, requests = (
        as_path(path) if is_remote(path) else pathlib.Path(os.path.expanduser(path)),
        [],
    )
    for row in jsonl.read_objects(path):
        number = int(row.where.rpartition(" ")[2])
        prompt = row.get("prompt", str)
        images = row.get("image", (str, list), [])
        images = [images] if isinstance(images, str) else images
        for image in images:
            if not isinstance(image, str) or not image:
                raise JsonError(
                    f"{row.where}: image is {excerpt(row.values['image'])}; expected a path or a list of paths"
                )
        refuse_unknown(row, ("prompt", "image", "id", *KEPT))
        asked = {
            name: row.values[name] for name in ("image", *KEPT) if row.values.get(name) is not None
        }
        asked = {"id": row.values.get("id", number), "prompt": prompt} | asked
        files = [
            image if is_remote(image) else str(path.parent / os.path.expanduser(image))
            for image in images
        ]
        requests.append(
            {
                "prompt": prompt,
                "image": files,
                "id": asked["id"],
                "where": row.where,
                "asked": asked,
            }
        )
    if not requests:
        raise JsonError(f"{excerpt(str(path))[1:-1]}: has no requests")
    return requests


def refuse_unknown(row: strict_json.Object, known: Sequence[str]) -> None:
    """JsonError for a key that is not known: an image or a question under another name must not be
    left out without a word.
    """
    for name in row.values:
        if name not in known:
            near = (
                f"; did you mean {ELSEWHERE[name]!r}?"
                if name in ELSEWHERE
                else strict_json.suggestion(name, known)
            )
            raise JsonError(
                f"{row.where}: unknown key {excerpt(name)}{near or '; what is to be kept beside the answer goes into extra'}"
            )


def check_images(requests: Sequence[dict], on_error: str) -> None:
    """ValueError for an image file that is missing, naming its line; with on_error "note" only if
    no request has all of its own.
    """
    missing = []
    for request in requests:
        if absent := [image for image in request["image"] if not _is_there(image)]:
            missing.append(
                f"{request['where']} (id {excerpt(request['id'])}): {excerpt(absent[0])[1:-1]} does not exist"
            )
    with_images = sum(bool(request["image"]) for request in requests)
    if missing and (on_error == "stop" or len(missing) == with_images):
        more = f", and so for {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{missing[0]}{more}; relative paths start at the folder of the requests")


def _is_there(image: str) -> bool:
    return remote_files.exists(image) if is_remote(image) else os.path.exists(image)


def count_answers(
    output: str | os.PathLike, requests: Sequence[dict], run: str | None = None
) -> int:
    """How many requests an output file has answered. Nothing is changed.

    run: settings' hash that the answers must have, where they have one.

    Raises:
      FileError: the file has a line that is no answer of infer.py, or answers other requests; what
      follows the last line break is no
        beginning of an answer.
    """
    return len(read_answers(output, requests, run)[0])


def read_answers(
    output: str | os.PathLike, requests: Sequence[dict], run: str | None = None
) -> tuple[list[dict], int]:
    """(the answers of an output file, their bytes); see `count_answers`. What follows those bytes
    is a torn line, and can be cut off.
    """
    if not (remote_files.exists(output) if is_remote(output) else os.path.lexists(output)):
        return [], 0
    advice = "name another --output"
    lines = jsonl.whole_lines(output)
    size = sum(map(len, lines))
    try:
        rows = [_answer(row, advice).values for row in jsonl.parse(lines, output)]
    except JsonError as error:
        text = (
            str(error)
            if advice in str(error)
            else f"{error}; these are no answers of infer.py: {advice}"
        )
        raise JsonError(text) from error
    torn = jsonl.torn(output)
    if torn and not (rows and _may_be_torn(torn)) and not (run and _may_be_torn(torn)):
        raise JsonError(
            f"{output} line {len(rows) + 1} is no answer of infer.py, nor the beginning of one; {advice}"
        )
    if len(rows) > len(requests):
        raise JsonError(
            f"{output} holds {len(rows)} answers, and {len(requests)} were asked for; move it away or {advice}"
        )
    for number, (row, request) in enumerate(zip(rows, requests, strict=False), 1):
        asked = request.get("asked", {"id": request["id"], "prompt": request["prompt"]})
        same = all(row.get(name) == asked.get(name) for name in ("id", "prompt"))
        if not same or ("run" in row and row.get("image") != asked.get("image")):
            raise JsonError(
                f"{output} holds answers to other questions than were asked (line {number} is of id {excerpt(row['id'])}); move it away "
                f"or {advice}"
            )
        if run and row.get("run", run) != run:
            raise JsonError(
                f"{output} line {number} was answered by another model or with other settings; move it away or {advice}"
            )
    return rows, size


def _answer(row: strict_json.Object, advice: str) -> strict_json.Object:
    values = row.values
    if (
        "id" not in values
        or not isinstance(values.get("prompt"), str)
        or not ("text" in values or "error" in values)
    ):
        raise JsonError(f"{row.where} is no answer of infer.py; {advice}")
    return row


def _may_be_torn(torn: bytes) -> bool:
    """Whether it may be the beginning of one of our lines."""
    start = b'{"id": '
    return torn.startswith(start) or start.startswith(torn)
