"""Pairs for preference optimisation: one question with a chosen and a rejected answer, as one
sample.

Both answers stand in one row, so that each image of the question is encoded once. Either the
question stands there twice, and the two conversations are segments of their own, as packed samples
are:

    question chosen | question rejected          segments 1 and 2

or, with `shared`, once, and the decoder computes it once:

    question, then chosen and rejected           one segment; `until` hides chosen from rejected

In the second form the question's last token, whose target is the answer's first, stands before each
of the answers.
"""

import numpy as np

from internvl3_jax.data.batch import Sample, average_weights, join_tiles
from internvl3_jax.data.text.chat_template import Encoded
from internvl3_jax.positions import build_positions

NO_END = np.iinfo(np.int32).max  # of `until`: every later token sees this one


class PairError(ValueError):
    """A pair that cannot be used."""


def finish_pair(
    rejected: Encoded, chosen: Encoded, tiles, deltas, processor, loss_reduction: str, shared: bool
) -> Sample:
    """Two encoded conversations that differ in their answer, and the tiles of their images, to
    one sample of [T] tokens.

    Beside the fields of a conversation's sample (data/batch.py; `loss_weights` are of the chosen
    answer alone) it has those of `Batch` that are of pairs: answers, features, until; and segments,
    counted from 1.
    """
    sides = [_side(encoded, deltas, number) for number, encoded in enumerate((chosen, rejected), 1)]
    sides[0]["loss_weights"] = average_weights(sides[0]["answers"] > 0, loss_reduction)
    if shared:
        sides = _share(*sides)
    else:
        for number, side in enumerate(sides, 1):
            side["segments"] = np.full(len(side["tokens"]), number, np.int32)
    sample = {name: np.concatenate([side[name] for side in sides]) for name in sides[0]}
    return sample | {"tiles": join_tiles(tiles, processor.image_size)}


def pair_length(chosen: Encoded, rejected: Encoded, shared: bool) -> int:
    """Tokens of the sample."""
    return len(chosen.tokens) + len(rejected.tokens) - (_question_length(chosen) if shared else 0)


def _question_length(encoded: Encoded) -> int:
    """Without its last token."""
    return int(np.argmax(encoded.loss_mask)) - 1


def _side(encoded: Encoded, deltas, number: int) -> Sample:
    trained = np.append(encoded.loss_mask[1:], False)
    length = len(encoded.tokens)
    visual = np.zeros(length, bool)
    for start, count in encoded.runs:
        visual[start : start + count] = True
    return {
        "tokens": encoded.tokens,
        "targets": np.append(encoded.tokens[1:], 0).astype(np.int32),
        "loss_weights": np.zeros(length, np.float32),
        "positions": build_positions(length, encoded.runs, deltas),
        "answers": np.where(trained, number, 0).astype(np.int32),
        # The k-th visual token of either side is the k-th feature of the pair's images.
        "features": np.maximum(np.cumsum(visual) - 1, 0).astype(np.int32),
    }


def _share(chosen: Sample, rejected: Sample) -> list[Sample]:
    """The question without its last token; then, with it, the two answers."""
    end = int(np.argmax(chosen["answers"] > 0))
    if (
        end != int(np.argmax(rejected["answers"] > 0))
        or (chosen["tokens"][: end + 1] != rejected["tokens"][: end + 1]).any()
    ):
        raise PairError("the two answers do not follow the same tokens")
    question = {name: value[:end] for name, value in chosen.items()}
    answers = [{name: value[end:] for name, value in side.items()} for side in (chosen, rejected)]
    length = len(answers[0]["tokens"])
    parts = [question, *answers]
    for part, last in zip(parts, (NO_END, end + length - 1, NO_END), strict=True):
        part["until"] = np.full(len(part["tokens"]), last, np.int32)
        part["segments"] = np.ones(len(part["tokens"]), np.int32)
    return parts
