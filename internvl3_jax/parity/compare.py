"""Compares the stages of an engine with the goldens, in the order in which a prompt passes them.

Texts, ids, pixels and positions must be equal. A float stage differs by max |a - b| over the root
mean square of the golden, which the tolerance of the dtype bounds. Needs numpy alone.
"""

import dataclasses

import numpy as np

# stage -> what it is
STAGES = {
    "tile_counts": "i64[images]: tiles of each image, thumbnails included",
    "tiles": "u8[N,S,S,3]: pixels of all tiles, RGB, before they are normalized",
    "rendered": "text: the prompt that the tokenizer gets, with every <IMG_CONTEXT>",
    "token_ids": "i64[T]: the prompt",
    "prompt_tokens": "i64[]: their number",
    "positions": "i64[T]: in units of 1/256",
    "tower": "f32[N,P,C]: output of the vision tower, without the class token",
    "projector": "f32[N,K,D]: visual tokens",
    "embeddings": "f32[T,D]: input of the decoder, visual tokens included",
    "hidden_first": "f32[T,D]: output of its first layer",
    "hidden_last": "f32[T,D]: output of its last layer, after the final norm",
    "logits": "f32[V]: of the last token of the prompt",
    "logprobs": "f32[K]: of the most likely first tokens",
    "answer_ids": "i64[A]: the greedy answer, with its stop token if there is one",
    "answer": "text: the answer",
}
FLOATS = frozenset("tower projector embeddings hidden_first hidden_last logits logprobs".split())
# Of max |a - b| / rms(b). float32: another order of summation. bfloat16: 8 bits of mantissa.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.25}


@dataclasses.dataclass
class Difference:
    """The difference of a stage.

    Attributes:
      error: max |a - b| / rms(b) of a float stage, inf for another shape; None of an exact stage.
      text: by how much, in words.
    """

    stage: str
    text: str
    error: float | None = None


def compare(stage: str, found, golden, tolerance: float) -> Difference | None:
    """Returns how a stage differs from its golden, or None."""
    if isinstance(golden, str):
        return _compare_texts(stage, str(found), golden)
    found, golden = np.asarray(found), np.asarray(golden)
    if found.shape != golden.shape:
        error = np.inf if stage in FLOATS else None
        shapes = f"shape {list(found.shape)} instead of {list(golden.shape)}"
        if golden.size <= 4 and found.size <= 16:
            shapes = f"{found.tolist()} instead of {golden.tolist()}"
        return Difference(stage, shapes, error)
    if stage not in FLOATS:
        return _compare_exactly(stage, found, golden)
    if not golden.size:
        return None
    # Log-probabilities have a scale of their own.
    golden = golden.astype(np.float64)
    scale = 1.0 if stage == "logprobs" else np.sqrt(np.mean(golden**2))
    error = np.abs(found.astype(np.float64) - golden) / scale
    worst = float(error.max()) if np.isfinite(error).all() else np.inf
    if worst <= tolerance:
        return None
    place = np.unravel_index(int(np.argmax(np.nan_to_num(error, nan=np.inf))), golden.shape)
    share = float(np.mean(~(error <= tolerance)))
    return Difference(
        stage,
        f"by {worst:.3g} of the root mean square at {list(map(int, place))}, {share:.1%} of the "
        f"values beyond {tolerance:g}",
        worst,
    )


def _compare_texts(stage: str, found: str, golden: str) -> Difference | None:
    if found == golden:
        return None
    pairs = zip(found, golden, strict=False)
    same = next((k for k, (one, other) in enumerate(pairs) if one != other), None)
    same = min(len(found), len(golden)) if same is None else same
    here, there = (text[same : same + 40] for text in (found, golden))
    return Difference(stage, f"at character {same}: {here!r} instead of {there!r}")


def _compare_exactly(stage: str, found: np.ndarray, golden: np.ndarray) -> Difference | None:
    unequal = found != golden
    if not unequal.any():
        return None
    place = np.unravel_index(int(np.argmax(unequal)), golden.shape)
    return Difference(
        stage,
        f"{int(unequal.sum())} of {golden.size} values, the first at {list(map(int, place))}: "
        f"{found[place]} instead of {golden[place]}",
    )


def first_difference(found: dict, golden: dict, tolerance: float) -> Difference | None:
    """Returns the first stage that differs, of those that both have."""
    for stage in STAGES:
        if stage in found and stage in golden:
            difference = compare(stage, found[stage], golden[stage], tolerance)
            if difference is not None:
                return difference
    return None


def derived(stages: dict, top: list[list], by_value: bool = False) -> dict:
    """Adds the stages that follow from others: `prompt_tokens`, and `logprobs`.

    Args:
      top: rows [id, ...] of the tokens whose log-probabilities are meant.
      by_value: as many of the largest log-probabilities instead, in descending order.
    """
    more = {}
    if "token_ids" in stages:
        more["prompt_tokens"] = np.asarray(len(stages["token_ids"]))
    if "logits" in stages and top:
        logits = np.asarray(stages["logits"], np.float64)
        shifted = logits - logits.max()
        logprobs = shifted - np.log(np.exp(shifted).sum())
        ids = [row[0] for row in top]
        more["logprobs"] = np.sort(logprobs)[::-1][: len(ids)] if by_value else logprobs[ids]
    return more | stages
