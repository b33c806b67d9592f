"""Contents of the cache's rows: a prefix of a new prompt that is in one is not run again."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int32, UInt8

from internvl3_jax.config import UNITS, LanguageConfig, ModelConfig
from internvl3_jax.inference.engine.request import Piece, Request, Ticket
from internvl3_jax.inference.flash import uses_router
from internvl3_jax.inference.prompt_cache import extend_prompt


@dataclasses.dataclass
class Content:
    """The tokens whose keys and values a row of the cache holds, from its first slot on.

    Attributes:
      tokens: i32[T].
      positions: i32[T], in units of 1/256.
      runs: (first token, number of tokens) of each image.
      digests: of each image, its `identities`.
      adapter: name of the LoRA adapter that they were run with.
    """

    tokens: Int32[np.ndarray, " T"]
    positions: Int32[np.ndarray, " T"]
    runs: list[tuple[int, int]]
    digests: list[bytes]
    adapter: str | None

    @classmethod
    def of(
        cls, request: Request, digests: list[bytes], config: LanguageConfig, ids: Sequence[int] = ()
    ) -> "Content":
        """Returns what a row holds after a prompt, and `ids` of its answer, have been run.

        A stretched rope depends on the length, so that nothing run with it can be used again.
        """
        prompt = request.prompt
        if is_stretched(request, config):
            prompt = dataclasses.replace(
                prompt, tokens=prompt.tokens[:0], positions=prompt.positions[:0]
            )
        elif ids:
            prompt = extend_prompt(prompt, ids)
        tokens, positions = prompt.tokens, prompt.positions
        if request.scaling == "dynamic":
            known = int(np.searchsorted(positions, config.max_position * UNITS))
            tokens, positions = tokens[:known], positions[:known]
        return cls(tokens, positions, prompt.runs, digests, request.adapter)

    def prefix(self, request: Request, digests: list[bytes], config: LanguageConfig) -> int:
        """Returns how many leading tokens of a request are here; it leaves one at least.

        Tokens, positions and images are compared, so that the answer is the one without reuse. An
        image is reused as a whole.
        """
        prompt = request.prompt
        if self.adapter != request.adapter or is_stretched(request, config):
            return 0
        length = min(len(self.tokens), len(prompt.tokens) - 1)
        same = (self.tokens[:length] == prompt.tokens[:length]) & (
            self.positions[:length] == prompt.positions[:length]
        )
        keep = length if same.all() else int(np.argmin(same))
        for index, (start, count) in enumerate(prompt.runs):
            same_image = index < len(self.digests) and self.digests[index] == digests[index]
            if start < keep and (not same_image or keep < start + count):
                return start
        return keep


def is_stretched(request: Request, config: LanguageConfig) -> bool:
    """Returns whether the prompt of a request is beyond the positions of an unchanged rope."""
    last = request.prompt.positions[-1] // UNITS
    return request.scaling == "dynamic" and last >= config.max_position


def new_ticket(request: Request, config: ModelConfig, on_piece: Callable[[Piece], None]) -> Ticket:
    """Returns the ticket of a request that enters an engine. on_piece: see `Ticket`."""
    prompt = request.prompt
    awaits = bool(prompt.tiles) and prompt.compressed is None
    return Ticket(
        request,
        on_piece,
        digests=[digest(tiles) for tiles in prompt.tiles],
        awaits_routing=awaits and uses_router(request.flash, config),
    )


def identities(ticket: Ticket) -> list[bytes]:
    """Returns what tells the features of each image apart: its tiles, and which are compressed."""
    compressed = ticket.request.prompt.compressed
    if compressed is None:
        return ticket.digests
    return [
        name + (tiles.tobytes() if tiles.any() else b"")
        for name, tiles in zip(ticket.digests, compressed, strict=True)
    ]


def digest(tiles: UInt8[np.ndarray, "n S S 3"]) -> bytes:
    """Returns the SHA-256 of an image's tiles."""
    return hashlib.sha256(np.ascontiguousarray(tiles)).digest()


@dataclasses.dataclass(eq=False)
class Row:
    """One row of the cache.

    Attributes:
      ticket: whose answer it decodes; None: it is free.
      content: what it holds; None: nothing.
      next_slot: slot of the next token of the answer after all blocks that were started.
      started: number of tokens of the answer after all blocks that were started.
      used: number of the engine's step in which it was last used.
    """

    ticket: Ticket | None = None
    content: Content | None = None
    next_slot: int = 0
    started: int = 0
    used: int = 0


def best_source(
    rows: Sequence[Row], request: Request, digests: list[bytes], config: LanguageConfig
) -> tuple[int | None, int]:
    """Returns the row that holds the longest prefix of a request, and how long that is."""
    best, longest = None, 0
    for index, row in enumerate(rows):
        keep = row.content.prefix(request, digests, config) if row.content is not None else 0
        if keep > longest:
            best, longest = index, keep
    return best, longest


def choose_row(rows: Sequence[Row], source: int | None, keep: int) -> int:
    """Returns the free row that a request takes, of which there must be one.

    It is the row whose content the request continues, else the one that was not used for longest,
    and only if there is no other the one that holds its prefix.
    """
    free = [index for index, row in enumerate(rows) if row.ticket is None]
    if source in free and keep == len(rows[source].content.tokens):
        return source
    return min(free, key=lambda index: (index == source, rows[index].used))


def same_prompt(ticket: Ticket, other: Ticket) -> bool:
    """Returns whether two requests have the same prompt, and the same keys and values for it."""
    a, b = ticket.request, other.request
    return ticket is other or (
        a.adapter == b.adapter
        and a.scaling == b.scaling
        and ticket.awaits_routing == other.awaits_routing
        and identities(ticket) == identities(other)
        and a.prompt.runs == b.prompt.runs
        and np.array_equal(a.prompt.tokens, b.prompt.tokens)
        and np.array_equal(a.prompt.positions, b.prompt.positions)
    )
