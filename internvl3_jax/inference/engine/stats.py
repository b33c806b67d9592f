"""Counts of an engine."""

import dataclasses


@dataclasses.dataclass
class EngineStats:
    """Counts of an engine since its start, and what it does now.

    Attributes:
      running, waiting: requests in rows, and in the queue.
      finished: requests that ended, however that was.
      prompt_tokens: tokens of the prompts that entered; reused_tokens: those that were in a row.
      new_tokens: tokens of answers.
      image_hits, image_misses: images whose features were there, and not.
      blocks: blocks of tokens that were started.
      tiles, compressed_tiles: tiles of the prompts that entered, and those of them that the router
        compressed to a quarter of their tokens (InternVL3.5-Flash).
    """

    running: int = 0
    waiting: int = 0
    finished: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    image_hits: int = 0
    image_misses: int = 0
    blocks: int = 0
    tiles: int = 0
    compressed_tiles: int = 0
