"""Samples longer than a row: an error, left out, or cut after a whole turn. An image is never cut."""

from collections.abc import Callable, Sequence

from internvl3_jax.data.text.chat_template import Encoded, Message, count_places

RULES = ("error", "truncate", "drop")


class TooLong(ValueError):
    """A sample that fits no row."""


class NothingTrained(ValueError):
    """A sample without a trained token."""


# messages and tiles of each of their images
Encode = Callable[[Sequence[Message], Sequence[int]], Encoded]


def encode_within(
    messages: Sequence[Message],
    tiles: Sequence[int],
    encode: Encode,
    max_tokens: int,
    max_tiles: int,
    rule: str,
) -> tuple[Encoded, int]:
    """(the encoded conversation, number of its images), shortened to a row where `rule` is
    "truncate".

    Args:
      tiles: number of tiles of each image.
      max_tokens, max_tiles: what a row holds.

    Raises:
      TooLong: if it does not fit and is not to be shortened, or does not fit with a single answer.
      NothingTrained: if there is no answer to learn.
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
    raise TooLong(_complaint(len(encoded.tokens), sum(tiles), max_tokens, max_tiles, rule))


def _longest(messages, tiles, encode: Encode, fits) -> tuple[Encoded, int] | None:
    """The most whole turns that fit, by bisection over the ends of the answers; None if not even
    one does.
    """
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


def _complaint(tokens: int, tiles: int, max_tokens: int, max_tiles: int, rule: str) -> str:
    advice = (
        "set data.overlong to truncate or drop"
        if rule == "error"
        else "its first answer alone does not fit"
    )
    advice = "data.overlong is drop" if rule == "drop" else advice
    return complaint(
        "a conversation", [("tokens", tokens, max_tokens), ("tiles", tiles, max_tiles)], advice
    )


def complaint(what: str, sizes: Sequence[tuple[str, int, int]], advice: str) -> str:
    """sizes: (name, count, limit) of what a row holds, one of them over its limit."""
    name, count, limit = next(size for size in sizes if size[1] > size[2])
    return (
        f"{what} has {count:,} {name}, a row holds {limit:,}: raise data.{name}_per_row ({advice})"
    )
