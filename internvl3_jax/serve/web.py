"""The page (`--web`): its files, and what it asks besides chat completions.

    GET  /                     the page
    GET  /page/NAME            its scripts, style and examples
    GET  /page/settings.json   models, limits, deltas
    POST /v1/internvl/count    tiles, tokens and positions of a request, which is not answered
    POST /v1/internvl/best_of  n answers to one question, with the critic's scores (--critic)

The bodies are those of /v1/chat/completions. Nothing is loaded from other hosts.
"""

import contextlib
import dataclasses
import fractions
import importlib.resources
import mimetypes
import pathlib
from collections.abc import Sequence

import numpy as np
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse

from internvl3_jax.config import UNITS
from internvl3_jax.data.media.tiles import grid_tiles
from internvl3_jax.data.text.chat_template import IMAGE_TAG
from internvl3_jax.io import strict_json
from internvl3_jax.positions import build_positions, next_position
from internvl3_jax.serve import critic_scores
from internvl3_jax.serve.chat_endpoint import LEFT, ChatCall
from internvl3_jax.serve.errors import ApiError
from internvl3_jax.serve.service import Service

FILES = ("index.html", "style.css", "app.js", "api.js", "attachments.js", "drawing.js")
DELTAS = ("1", "1/2", "1/4", "1/8", "1/16", "1/64", "1/256")
MOST_EXAMPLES = 8
# Scripts and styles of this server alone; images of examples, and those that a person attaches.
_POLICY = "default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; frame-ancestors 'none'"


@dataclasses.dataclass(frozen=True)
class Example:
    """A question that the page offers, with its image."""

    question: str
    image: pathlib.Path


def read_examples(path: pathlib.Path) -> list[Example]:
    """Reads the first questions with one image of a JSONL file: {"prompt", "image"} in each line.

    Raises:
      ValueError: the file has none, or an image does not exist.
    """
    examples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        row = strict_json.loads(line, f"{path} line {number}") if line.strip() else {}
        images = row.get("image", [])
        images = [images] if isinstance(images, str) else images
        if not isinstance(row.get("prompt"), str) or len(images) != 1:
            continue
        image = path.parent / images[0]
        if not image.is_file():
            raise ValueError(f"{path} line {number}: {image} does not exist")
        question = row["prompt"].replace(IMAGE_TAG, "").strip()
        if question not in {example.question for example in examples}:
            examples.append(Example(question, image))
    if not examples:
        raise ValueError(f"{path} has no line with a prompt and one image; name another file")
    return examples[:MOST_EXAMPLES]


@dataclasses.dataclass(frozen=True)
class Page:
    """Contents of the page.

    Attributes:
      examples: questions.
    """

    examples: Sequence[Example] = ()


def add_page(app: FastAPI, v1: APIRouter, service: Service, page: Page) -> None:
    """Adds the page to the application, and its calls to the part that asks for the key."""
    examples = page.examples
    folder = importlib.resources.files("internvl3_jax.serve") / "page"

    @app.get("/")
    async def index() -> Response:
        return _file(folder / "index.html")

    @app.get("/page/settings.json")
    async def settings() -> Response:
        values = _settings(service, examples)
        return JSONResponse(values, headers={"Cache-Control": "no-store"})

    @app.get("/page/examples/{number}")
    async def example(number: int) -> Response:
        if not 0 <= number < len(examples):
            raise ApiError(f"there are {len(examples)} examples", 404)
        return _file(examples[number].image)

    @app.get("/page/{name}")
    async def file(name: str) -> Response:
        if name not in FILES:
            raise ApiError(f"the page has no such file; it has {', '.join(FILES)}", 404)
        return _file(folder / name)

    @v1.post("/internvl/count")
    async def count(request: Request) -> Response:
        return await CountCall(service, request).respond()

    @v1.post("/internvl/best_of")
    async def best_of(request: Request) -> Response:
        if service.critic is None:
            raise ApiError("this server has no critic; start it with --critic DIR", 404)
        return await BestOfCall(service, request).respond()


def _file(path) -> Response:
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}
    return Response(path.read_bytes(), media_type=kind, headers=headers)


def _settings(service: Service, examples: Sequence[Example]) -> dict:
    processor, limits = service.processor, service.limits
    return {
        "models": service.models,
        "max_tiles": service.options.max_tiles or processor.max_tiles,
        "max_new_tokens": min(512, limits.new_tokens),
        "max_n": min(8, limits.answers),
        "delta": str(fractions.Fraction(processor.delta, UNITS)),
        "deltas": list(DELTAS),
        "has_critic": service.critic is not None,
        "examples": [
            {"image": f"page/examples/{number}", "question": example.question}
            for number, example in enumerate(examples)
        ],
    }


class CountCall(ChatCall):
    """One call of /v1/internvl/count."""

    async def respond(self) -> Response:
        """Returns the response; raises ApiError for a refusal."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._note_end)
            try:
                await self._receive(stack)
                return JSONResponse(self._counts())
            except Exception as error:
                refusal = self._refusal(error)
                if refusal is None:
                    return Response(status_code=LEFT)
                raise refusal from error

    def _counts(self) -> dict:
        processor, prepared = self._service.processor, self._prepared
        prompt = prepared.requests[0].prompt
        chosen = next_position(prompt.positions)
        positions = []
        for delta in DELTAS:
            units = UNITS // int(delta.partition("/")[2] or 1)
            last = next_position(
                build_positions(len(prompt.tokens), prompt.runs, [units] * len(prompt.runs))
            )
            entry = {"delta": delta, "last": last // UNITS, "chosen": last == chosen}
            positions.append(entry)
        return {
            "prompt_tokens": len(prompt.tokens),
            "tiles": sum(map(len, prompt.tiles)),
            "images": [
                {"columns": columns, "rows": rows, "tiles": grid_tiles(columns, rows, processor)}
                for columns, rows in prepared.grids
            ],
            "positions": positions,
        }


class BestOfCall(ChatCall):
    """One call of /v1/internvl/best_of."""

    async def _whole(self, reply) -> dict:
        critic_scores.the_question(self._asked)
        await self._wait()
        scored = await self._score()
        return {
            "best": int(np.argmax([scores["score"] for scores in scored])),
            "candidates": [
                {"text": choice.text.content} | scores
                for choice, scores in zip(self._choices, scored, strict=True)
            ],
            "usage": self._usage(),
        }
