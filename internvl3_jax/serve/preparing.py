"""Makes requests to the engine of a checked request: images, prompt, room, grammar. Runs in worker
threads.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from internvl3_jax.config import UNITS
from internvl3_jax.data.batch import Prompt, make_prompt
from internvl3_jax.data.media.images import ImageError, open_image
from internvl3_jax.data.media.tiles import count_tiles, cut_tiles, image_grid, image_limit
from internvl3_jax.data.text.chat_template import ChatError
from internvl3_jax.data.text.tokenizer_files import TokenizerError
from internvl3_jax.inference.engine.request import Request
from internvl3_jax.inference.options import resolve_system, units
from internvl3_jax.positions import next_position, rope_scaling
from internvl3_jax.serve.chat_request import ChatRequest
from internvl3_jax.serve.errors import ApiError
from internvl3_jax.serve.limits import Hold
from internvl3_jax.serve.messages import Turn
from internvl3_jax.serve.parts import ImagePart
from internvl3_jax.serve.planned import planned_turn


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Requests to the engine, prepared.

    Attributes:
      requests: one per answer.
      stop_ids: of the requests.
      grids: columns and rows of the tiles of each image.
    """

    requests: Sequence[Request]
    stop_ids: tuple[int, ...]
    grids: Sequence[tuple[int, int]]


def prepare(asked: ChatRequest, adapter: str | None, service, hold: Hold) -> Prepared:
    """Reads and cuts the images, and makes one request per answer.

    Args:
      adapter: that is put on.
      service: of `Service`.
      hold: takes the bytes of the tiles.

    Raises:
      ApiError: an image, the conversation or the grammar cannot be used.
    """
    grids: list[tuple[int, int]] = []
    prompt, scaling = _prompt(asked, service, hold, grids)
    max_new_tokens = _max_new_tokens(asked, prompt, scaling, service)
    stop_ids = tuple(dict.fromkeys((*service.engine.stop_ids, *asked.stop_ids)))
    grammar = asked.grammar and service.vocabulary.constraint(asked.grammar)
    requests = []
    for number in range(asked.n):
        seed = (asked.sampling.seed + number) % 2**32
        requests.append(
            Request(
                prompt=prompt,
                sampling=dataclasses.replace(asked.sampling, seed=seed),
                max_new_tokens=max_new_tokens,
                stop_ids=stop_ids,
                scaling=scaling,
                adapter=adapter,
                top_logprobs=asked.top_logprobs,
                constraint=grammar and grammar.copy(),
                flash=asked.options.flash,
            )
        )
    return Prepared(requests, stop_ids, grids)


def _prompt(
    asked: ChatRequest, service, hold: Hold, grids: list[tuple[int, int]]
) -> tuple[Prompt, str]:
    """Returns the prompt and its rope scaling; adds the grid of each image to `grids`, but for
    those with a video or document.
    """
    given = _deltas(asked, service)
    system = resolve_system(asked.options.system, asked.options.thinking)
    messages, tiles, deltas = [], [], []
    if asked.turns[0].message["role"] != "system" and system is not None:
        messages.append({"role": "system", "content": system})
    left = service.limits.tiles
    for number, turn in enumerate(asked.turns):
        own, given = given[: len(turn.media)], given[len(turn.media) :]
        if turn.has_images_alone:
            messages.append(turn.message)
            new = _turn_tiles(turn, asked, service, hold, left, grids)
            deltas += own
        else:
            earlier = messages, tiles, deltas
            name = f"messages[{number}].content"
            read = planned_turn(turn, asked, service, earlier, own if asked.deltas else None, name)
            _check_tiles(sum(map(len, read.tiles)), left, name, service)
            hold.add(sum(part.nbytes for part in read.tiles))
            messages, new, deltas = read.messages, read.tiles, deltas + read.deltas
        tiles, left = tiles + new, left - sum(map(len, new))
    try:
        prompt = make_prompt(messages, tiles, service.tokenizer, service.processor, deltas)
    except (ChatError, TokenizerError) as error:
        raise ApiError(f"messages: {error}", param="messages") from error
    current = [service.processor.delta] if asked.deltas is None else units(list(asked.deltas))
    return prompt, rope_scaling(service.language, [*current, *deltas])


def _deltas(asked: ChatRequest, service) -> list[int]:
    """Returns the V2PE units of each image, video and document."""
    count = sum(len(turn.media) for turn in asked.turns)
    if asked.deltas is None:
        return [service.processor.delta] * count
    deltas = units(list(asked.deltas))
    if len(deltas) == 1:
        return deltas * count
    if len(deltas) != count:
        raise ApiError(
            f"{len(deltas)} deltas for {count} images; give one, or one per image (a video or "
            "file counts as one)",
            param="delta",
        )
    return deltas


def _turn_tiles(
    turn: Turn,
    asked: ChatRequest,
    service,
    hold: Hold,
    left: int,
    grids: list[tuple[int, int]],
) -> list[np.ndarray]:
    """Returns the tiles u8[n,S,S,3] of each image of a message.

    Each image is cut before the next one is opened, since opened ones are large.

    Args:
      left: how many tiles the request may still have.
    """
    processor, options = service.processor, asked.options
    changes = {"tiles": options.tiles, "max_total_tiles": options.max_total_tiles}
    changes = {name: value for name, value in changes.items() if value is not None}
    shared = dataclasses.replace(processor, **changes)
    limit = image_limit(shared, len(turn.images), options.max_tiles)
    cut = []
    for image in turn.images:
        most = min(limit, image.max_tiles or limit)
        tiles = _tiles(image, most, shared, service, left, hold, grids)
        left -= len(tiles)
        cut.append(tiles)
    return cut


def _tiles(
    part: ImagePart,
    limit: int,
    processor,
    service,
    left: int,
    hold: Hold,
    grids: list[tuple[int, int]],
) -> np.ndarray:
    data = service.sources.read(part.url, part.name)
    try:
        image = open_image(
            data,
            apply_exif=processor.apply_exif,
            name=part.name,
            max_pixels=service.limits.image_pixels,
            allow_truncated=service.options.allow_truncated,
        )
    except ImageError as error:
        raise ApiError(str(error), param=part.name, code="invalid_image") from error
    count = count_tiles(image.width, image.height, processor, limit)
    _check_tiles(count, left, part.name, service)
    hold.add(count * 3 * processor.image_size**2)
    grids.append(image_grid(image.width, image.height, processor, limit))
    return cut_tiles(image, processor, limit)


def _check_tiles(count: int, left: int, name: str, service) -> None:
    if count > left:
        raise ApiError(
            f"{name}: the images have more than {service.limits.tiles:,} tiles "
            "(--max_request_tiles); send fewer images, or set max_tiles, max_total_tiles, detail "
            "or num_frames",
            param=name,
            code="too_many_tiles",
        )


def _max_new_tokens(asked: ChatRequest, prompt: Prompt, scaling: str, service) -> int:
    """Returns the longest answer: what is asked, or the server's limit as far as there is room."""
    language = service.language
    factor = language.rope_factor if scaling == "dynamic" else 1
    positions = int(language.max_position * factor) - next_position(prompt.positions) // UNITS
    room = min(service.engine.max_length - len(prompt.tokens), positions)
    wanted = asked.max_new_tokens or min(service.limits.new_tokens, room)
    if room < 1 or wanted > room:
        most = min(service.engine.max_length, int(language.max_position * factor))
        raise ApiError(
            f"the prompt has {len(prompt.tokens):,} tokens and leaves room for {max(0, room):,} of "
            f"the context of {most:,}"
            + (f"; {wanted:,} are asked for" if wanted > 0 else "")
            + ". Use fewer images, a lower max_tiles or max_total_tiles, a delta below 1 or a lower"
            " max_completion_tokens",
            param="messages",
            code="context_length_exceeded",
        )
    return wanted
