"""Known faults of engines, by which a difference is explained.

`CAUSES` are the known faults of other engines. The pack holds what each of them would give
(faults.py), so that a cause is named because its numbers match. `HINTS` are for what matches none.
Needs numpy alone.
"""

from internvl3_jax.parity.compare import FLOATS, Difference, compare, first_difference
from internvl3_jax.parity.folder import Case

CAUSES = {
    "tie_on_area": "of equally near grids the one with most tiles is taken; it needs more than half "
    "of that grid's pixels, or a square image becomes nine tiles and a thumbnail",
    "no_thumbnail": "the thumbnail is missing: an image of several tiles is followed by one more",
    "thumbnail_first": "the thumbnail comes first; its place is after the tiles",
    "bgr": "the channels are BGR; they must be RGB",
    "no_system": "the system prompt is missing; the models were trained with InternVL's own text",
    "empty_system": "the system prompt is empty; the models were trained with InternVL's own text",
    "other_system": "the system prompt is that of Qwen; the models were trained with InternVL's own",
    "no_newline": "the chat template lacks the line break after <|im_end|>",
    "no_generation_prompt": "the chat template lacks the header <|im_start|>assistant at its end",
    "frame_label": "frames are labeled Frame1 instead of Frame-1, as they were in training",
    "image_label": "several images lack their labels Image-1: and so on",
    "image_id_in_prompt": "the image token id is another one, such as transformers' default 151667, "
    "which is <think> with Qwen3: it is 151671 there (<IMG_CONTEXT> of the tokenizer)",
    "image_id_in_model": "the features are put nowhere: the model looks for another image token id, "
    "such as transformers' default 151667; with Qwen3 it is 151671 (<IMG_CONTEXT>)",
    "v2pe_ignored": "V2PE positions are ignored: visual tokens advance by 1 instead of delta",
    "mean_std": "pixels are normalized with mean and std 0.5 instead of ImageNet's",
    "no_qk_norm": "the norms of q and k of the decoder are dropped (Qwen3 has them)",
    "rope_theta": "the rotary base is 10,000 instead of config.json's rope_theta",
    "rope_linear": "positions are divided by the factor of rope_scaling; dynamic NTK changes nothing "
    "up to the trained length",
    "tied_head": "the output head is the embedding; the released models have a head of their own",
}
HINTS = {
    "tile_counts": "grid choice: quotients in float64, limit of tiles, thumbnail",
    "tiles": "resize: Pillow's bicubic filter, to the whole grid at once; order of the tiles",
    "rendered": "chat template, system prompt, labels of images and frames",
    "token_ids": "tokenizer files, image token id, <image> tags, special tokens in text",
    "prompt_tokens": "system prompt, chat template, tile tie, thumbnail, labels",
    "positions": "V2PE delta; text after an image continues at a whole number",
    "tower": "mean and std of pixels, layer scale, QK-norm of the 6B tower, GELU (exact)",
    "projector": "order of the pixel shuffle (ps_version v2), epsilon of its LayerNorm (1e-5)",
    "embeddings": "image token id, order of the features",
    "hidden_first": "QK-norm, biases of q, k and v, rope_theta, rope scaling, head_dim",
    "hidden_last": "norm epsilon, final norm, attention mask",
    "logits": "tied head, padding of the vocabulary",
    "logprobs": "tied head, template, precision",
    "answer_ids": "end ids, sampling instead of greedy decoding, cache",
    "answer": "end ids, special tokens in the text, thinking, sampling instead of greedy decoding",
}
_PRECISION = "precision: bfloat16 or TF32 somewhere; norms, softmax, rotary tables and logits must be float32"
_BFLOAT16 = 0.25  # of the root mean square


def causes_of(found: dict, case: Case, difference: Difference, tolerance: float) -> list[str]:
    """Returns the faults of the pack that give at this stage what the engine gives."""
    stage, names = difference.stage, []
    for name, values in case.faults.items():
        if stage not in values or compare(stage, found[stage], values[stage], tolerance):
            continue
        # What comes before is equal, so the fault must change nothing there.
        rest = {key: value for key, value in values.items() if key in found}
        first = first_difference(rest, case.stages, tolerance)
        if first is not None and first.stage == stage:
            names.append(name)
    return names


def explain(names: list[str], difference: Difference, found: dict, golden: dict) -> str:
    """Returns the cause in words: that of a known fault, or what is usually wrong at this stage."""
    if names:
        return "; or: ".join(f"{CAUSES[name]} [{name}]" for name in names)
    stage = difference.stage
    if stage in FLOATS and difference.error is not None and difference.error < _BFLOAT16:
        return f"none of the known faults; small, so likely {_PRECISION}"
    if stage in ("answer", "answer_ids") and _is_prefix(found[stage], golden[stage]):
        return "end ids: one of the two answers continues where the other ends"
    return f"none of the known faults; look at: {HINTS[stage]}"


def _is_prefix(one, other) -> bool:
    one, other = list(one), list(other)
    length = min(len(one), len(other))
    return one[:length] == other[:length]
