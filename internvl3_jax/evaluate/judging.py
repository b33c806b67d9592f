"""Marks of a judge: any server with OpenAI's chat interface.

The instructions are this package's, not those of the benchmarks' own programs, and so is the choice
of the judge: the marks show a tendency and are not the card's number. The predictions that every
run writes are for the programs that make that.
"""

import base64
import dataclasses
import json
import os
import pathlib
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence

from internvl3_jax.evaluate.scorers.judged import VERDICTS, mmhal_reply, wildvision_verdict
from internvl3_jax.evaluate.task import Loaded, Row
from internvl3_jax.io import jsonl
from internvl3_jax.io.terminal import excerpt

_TRIES = 3
_SECONDS = 120  # of one request
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule by which a benchmark's answers are judged.

    Attributes:
      ask: what the judge is asked for.
      read: returns the mark of a reply; None asks again.
      scale: what the mean of the marks is multiplied by.
      images: whether the judge sees the images.
      other: column with the answer that ours is compared with, in place of a reference.
    """

    ask: str
    read: Callable[[str], float | None]
    scale: float = 100.0
    images: bool = False
    other: str = ""


def _last_number(highest: float) -> Callable[[str], float | None]:
    def read(reply: str) -> float | None:
        found = [float(number) for number in _NUMBER.findall(reply)]
        return found[-1] if found and found[-1] <= highest else None

    return read


def _won(reply: str) -> float | None:
    """Returns 1.0 if B, our answer, is better, and 0.0 if not."""
    verdict, again = wildvision_verdict(reply)
    return None if again or verdict not in VERDICTS else float(verdict in ("B>A", "B>>A"))


_CORRECT = "Compare the answer with the reference. End with the line Score: 1 if it says the same, "
RULES = {
    "charxiv_reasoning": Rule(f"{_CORRECT}or Score: 0 if not.", _last_number(1)),
    "charxiv_descriptive": Rule(f"{_CORRECT}or Score: 0 if not.", _last_number(1)),
    "mmvet": Rule(
        "Grade the answer by the reference, where <AND> joins parts that must all be there, and "
        "<OR> alternatives. End with the line Score: X, from 0.0 (wrong) to 1.0 (right).",
        _last_number(1),
    ),
    "mmbench_video": Rule(
        "Grade how well the answer agrees with the reference. End with the line Score: N, from 0 "
        "(not at all) to 3 (fully).",
        _last_number(3),
        scale=1.0,
    ),
    "mmhal": Rule(
        "Grade the answer for being informative and free of hallucination, by the reference and "
        "the description of the image. End with the line Rating: N, from 0 (wrong and invented) to "
        "6 (very informative, nothing invented).",
        lambda reply: float(mmhal_reply(reply)),
        scale=1.0,
    ),
    "wildvision": Rule(
        "Which answer to the question about the image is better? End with one of [[A>>B]], "
        "[[A>B]], [[A=B]], [[B>A]], [[B>>A]].",
        _won,
        images=True,
        other="claude3_sonnet",
    ),
}


@dataclasses.dataclass(frozen=True)
class Judge:
    """A server. url: up to and with /v1. The key is the environment's OPENAI_API_KEY, if any."""

    url: str
    model: str

    def reply(self, content: list[dict]) -> str:
        """Returns the reply to a user message.

        Raises:
          ValueError: the server refuses, cannot be reached, or answers with something else.
        """
        message = {"role": "user", "content": content}
        body = {"model": self.model, "messages": [message], "temperature": 0}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
        )
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS) as response:
                found = json.load(response)
            return found["choices"][0]["message"]["content"] or ""
        except (urllib.error.URLError, OSError, ValueError, KeyError, IndexError, TypeError) as e:
            raise ValueError(
                f"--judge {self.url}: {excerpt(str(e))[1:-1]}; check the address and --judge_model"
            ) from e

    def settled(self, content: list[dict]) -> str:
        """Returns `reply`, after up to three tries."""
        for number in range(_TRIES - 1):
            try:
                return self.reply(content)
            except ValueError:
                time.sleep(2**number)
        return self.reply(content)


def judged(
    judge: Judge, name: str, loaded: Loaded, answers: Sequence[dict], path: pathlib.Path
) -> tuple[float, float]:
    """Returns the score of a task by a judge, and the share of its replies that give no mark.
    Replies are kept in a file; what it has is not asked again.

    Args:
      name: of the task, of RULES.
      path: of the replies.

    Raises:
      ValueError: the judge does not answer, or the file has replies to other answers.
    """
    rule = RULES[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = jsonl.whole_lines(path) if path.is_file() else []
    rows = [line.values for line in jsonl.parse(kept, path)]
    for row, answer in zip(rows, answers, strict=False):
        if (row.get("id"), row.get("answer")) != (answer["id"], answer["text"]):
            raise ValueError(f"{path} has replies to other answers; move it away")
        if row.get("judge") != judge.model:
            raise ValueError(f"{path} has replies of {row.get('judge')}; move it away")
    with jsonl.Appender(path, sum(map(len, kept))) as file:
        for row, answer in list(zip(loaded.rows, answers, strict=False))[len(rows) :]:
            found = _mark(judge, rule, row, answer["text"])
            found |= {"answer": answer["text"], "judge": judge.model}
            file.write([jsonl.dumps({"id": answer["id"]} | found)])
            rows.append(found)
    marks = [row["mark"] for row in rows]
    unreadable = sum(not row["readable"] for row in rows)
    return rule.scale * sum(marks) / len(marks), unreadable / len(rows)


def _mark(judge: Judge, rule: Rule, row: Row, answer: str) -> dict:
    if rule.other:
        shown = f"Answer A: {row.values[rule.other]}\n\nAnswer B: {answer}"
    elif not row.answer:
        raise ValueError(f"{row.where}: has no reference answer to judge by")
    else:
        described = row.values.get("image_content")
        shown = f"Image: {described}\n\n" if described else ""
        shown += f"Reference: {row.answer}\n\nAnswer: {answer}"
    text = f"{rule.ask}\n\nQuestion: {row.question}\n\n{shown}"
    content: list[dict] = [{"type": "text", "text": text}]
    for image in row.load_images() if rule.images else []:
        data = image if isinstance(image, bytes) else pathlib.Path(image).read_bytes()
        address = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
        content.append({"type": "image_url", "image_url": {"url": address}})
    for _ in range(_TRIES):
        reply = judge.settled(content)
        mark = rule.read(reply)
        if mark is not None:
            break
    # As in the reference's programs, what cannot be read is worth nothing.
    return {"mark": mark or 0.0, "readable": mark is not None, "reply": reply}
