"""Questions of one's own: the file of infer.py --requests, with the expected answers."""

import json
import os
import pathlib

from internvl3_jax.evaluate.loaders.places import find_files
from internvl3_jax.evaluate.task import Loaded, Row, Task
from internvl3_jax.inference.requests import read_requests
from internvl3_jax.io.safe_files import FileError
from internvl3_jax.io.strict_json import JsonError
from internvl3_jax.io.terminal import excerpt, one_line

# Options that a line may have; the others are the command's, and the same for all questions.
_CHANGES = ("max_tiles", "max_total_tiles", "system")


def load(task: Task, data: pathlib.Path) -> Loaded:
    """Reads lines of infer.py's requests: prompt, image, task and the expected answer.

    Raises:
      FileError: a line is not a request about images, or its answer is missing.
    """
    (path,) = find_files(data, task.files)
    return Loaded([_row(request) for request in read_requests(path)], (str(path),))


def _row(request: dict) -> Row:
    where, asked = request["where"], request["asked"]
    expected, part = asked.get("expected"), asked.get("task", "")
    for kind in ("video", "document"):
        if request[kind]:
            raise JsonError(
                f"{where}: has a {kind}, and this task asks about images alone; infer.py "
                "--requests answers it"
            )
    for name in request["options"]:
        if name not in _CHANGES:
            raise JsonError(
                f"{where}: {name} cannot differ between questions that are compared; leave it out "
                f"(a line may have {', '.join(_CHANGES)})"
            )
    if not isinstance(expected, str):
        problem = "is missing" if expected is None else f"is {excerpt(expected)}, not a text"
        raise JsonError(f"{where}: expected {problem}; write the right answer there")
    if not isinstance(part, str):
        raise JsonError(f"{where}: task is {excerpt(part)}; expected a text")

    def load_images() -> list[str]:
        for image in request["image"]:
            if not os.path.isfile(image):
                raise FileError(f"{where}: image: there is no {one_line(image)}")
        return request["image"]

    return Row(
        id=json.dumps(request["id"]),
        where=where,
        question=request["prompt"],
        answer=expected,
        values={"task": part},
        load_images=load_images,
        check=load_images,
        changes=request["options"],
    )
