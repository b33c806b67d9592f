"""Handles samples longer than a row: raises, drops, or cuts after a turn, never within an image."""

from collections.abc import Callable, Sequence

from internvl3_jax.data.text.chat_template import Encoded, Message, count_places

RULES = ("error", "truncate", "drop")


class TooLong(ValueError):
    """A sample that does not fit into a row."""


class NothingTrained(ValueError):
    """A sample without a trained token."""


# Takes messages and the number of tiles of each image.
Encode = Callable[[Sequence[Message], Sequence[int]], Encoded]


def encode_within(
    messages: Sequence[Message],
    tiles: Sequence[int],
    encode: Encode,
    max_tokens: int,
    max_tiles: int,
    rule: str,
) -> tuple[Encoded, int]:
    """Encodes a conversation, shortened to a row if `rule` is "truncate".

    Args:
      tiles: Number of tiles of each image.
      max_tokens, max_tiles: Budgets of a row.
      rule: One of RULES.

    Returns:
      (encoded conversation, number of its images).

    Raises:
      TooLong: It does not fit and is not shortened, or does not fit even with a single answer.
      NothingTrained: There is no answer to learn.
    """

    def fits(encoded: Encoded, images: int) -> bool:
        return len(encoded.tokens) <= max_tokens and sum(tiles[:images]) <= max_tiles

    encoded, images = encode(messages, tiles), len(tiles)
    if not encoded.loss_mask[1:].any():
        raise NothingTrained("no turn of the assistant: nothing to learn")
    if fits(encoded, images):
        return encoded, images
    if rule == "truncate":
        kept = _longest(messages, tiles, encode, fits)
        if kept:
            return kept
    raise TooLong(_advise(len(encoded.tokens), sum(tiles), max_tokens, max_tiles, rule))


def _longest(messages, tiles, encode: Encode, fits) -> tuple[Encoded, int] | None:
    """Finds the most turns that fit, by bisection over the ends of answers; None if none do."""
    ends = [number for number, message in enumerate(messages, 1) if message["role"] == "assistant"]
    best, low, high = None, 0, len(ends)
    while low < high:
        middle = (low + high) // 2
        kept = messages[: ends[middle]]
        images = sum(count_places(kept, len(tiles)))
        encoded = encode(kept, tiles[:images])
        if fits(encoded, images):
            best, low = (encoded, images), middle + 1
        else:
            high = middle
    return best


def _advise(tokens: int, tiles: int, max_tokens: int, max_tiles: int, rule: str) -> str:
    advice = (
        "set data.overlong to truncate or drop"
        if rule == "error"
        else "its first answer alone does not fit"
    )
    advice = "data.overlong is drop" if rule == "drop" else advice
    return too_long_message(
        "a conversation", [("tokens", tokens, max_tokens), ("tiles", tiles, max_tiles)], advice
    )


def too_long_message(subject: str, sizes: Sequence[tuple[str, int, int]], advice: str) -> str:
    """Describes the first of `sizes`, (name, count, limit of a row), that is over its limit."""
    name, count, limit = next(size for size in sizes if size[1] > size[2])
    return (
        f"{subject} has {count:,} {name}, a row holds {limit:,}: raise data.{name}_per_row "
        f"({advice})"
    )
