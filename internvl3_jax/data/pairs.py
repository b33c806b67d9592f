"""Makes samples of pairs for preference optimization: one question, a chosen and a rejected answer.

Both answers are in one row, so that each image of the question is encoded once. The question is in
the row twice, and the two conversations are segments, as packed samples are:

    question chosen | question rejected          segments 1 and 2

or, with `shared`, once, so that the decoder computes it once:

    question, then chosen and rejected           one segment; `last_query` hides chosen from rejected

In the second form the question's last token, whose target is the first token of the answer, is
repeated before each answer.
"""

import numpy as np

from internvl3_jax.data.batch import Sample, average_weights, join_tiles
from internvl3_jax.data.text.chat_template import Encoded
from internvl3_jax.positions import build_positions

NO_END = np.iinfo(np.int32).max  # of `last_query`: every later token sees this one


class PairError(ValueError):
    """A pair that cannot be used."""


def finish_pair(
    rejected: Encoded, chosen: Encoded, tiles, deltas, processor, loss_reduction: str, shared: bool
) -> Sample:
    """Makes one sample of [T] tokens of two encoded conversations that differ in their answer.

    It has the fields of a conversation's sample (data/batch.py; `loss_weights` are of the chosen
    answer), those of a `Batch` of pairs (answers, features, last_query), and segments from 1.
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
    """Counts the tokens of the sample."""
    return len(chosen.tokens) + len(rejected.tokens) - (_question_length(chosen) if shared else 0)


def _question_length(encoded: Encoded) -> int:
    """Counts the tokens of the question without its last one."""
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
        # The k-th visual token of either side takes the k-th feature of the pair's images.
        "features": np.maximum(np.cumsum(visual) - 1, 0).astype(np.int32),
    }


def _share(chosen: Sample, rejected: Sample) -> list[Sample]:
    """Splits a pair into the question without its last token, and the two answers with it."""
    end = int(np.argmax(chosen["answers"] > 0))
    if (
        end != int(np.argmax(rejected["answers"] > 0))
        or (chosen["tokens"][: end + 1] != rejected["tokens"][: end + 1]).any()
    ):
        raise PairError("the two answers do not follow the same tokens")
    question = {name: value[:end] for name, value in chosen.items()}
    answers = [{name: value[end:] for name, value in side.items()} for side in (chosen, rejected)]
    length = len(answers[0]["tokens"])
    sections = [question, *answers]
    for section, last in zip(sections, (NO_END, end + length - 1, NO_END), strict=True):
        section["last_query"] = np.full(len(section["tokens"]), last, np.int32)
        section["segments"] = np.ones(len(section["tokens"]), np.int32)
    return sections
