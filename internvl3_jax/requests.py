"""Requests in a JSONL file, and which of them a file of answers has: what infer.py --requests reads and goes on from."""

import json
import os
import pathlib


def read_requests(path: pathlib.Path) -> list[dict]:
    """Questions with the fields prompt, image (list of paths) and id (by default the line number)."""
    requests = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            request = json.loads(line)
            prompt, images = request["prompt"], request.get("image") or []
            images = [str(path.parent / image) for image in ([images] if isinstance(images, str) else images)]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{path} line {number} is no {{"prompt": ..., "image": ..., "id": ...}}: {error!r}') from error
        missing = [image for image in images if not os.path.isfile(image)]
        if missing:
            raise ValueError(f"{path} line {number}: {missing[0]} does not exist")
        requests.append({"prompt": prompt, "image": images, "id": request.get("id", number)})
    return requests


def count_answers(output: pathlib.Path, requests: list[dict]) -> int:
    """How many requests the output file has answered; a last line that was cut off is removed."""
    if not output.exists():
        return 0
    text = output.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        output.write_text(whole, encoding="utf-8")
    answered = []
    for number, line in enumerate(whole.split("\n")[:-1], 1):
        try:
            row = json.loads(line)
            answered.append((row["id"], row["prompt"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{output} line {number} is no answer of infer.py; name another --output") from error
    if answered != [(request["id"], request["prompt"]) for request in requests[: len(answered)]]:
        raise ValueError(f"{output} holds answers to other questions than were asked; move it away or name another --output")
    return len(answered)
