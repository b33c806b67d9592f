"""The fingerprint of a checkpoint: settings that change answers without an error if they differ.

It is a flat dict of plain values, saved with the checkpoint and compared with the files on loading.
"""

import hashlib
import json

from internvl3_jax.config import ModelConfig, ProcessorConfig
from internvl3_jax.data.text.chat_template import TEMPLATES
from internvl3_jax.data.text.tokenizer import Tokenizer
from internvl3_jax.io.integrity import MANIFEST

# Scripts, digits, whitespace, an emoji and markup, on which tokenizers of equal size differ.
_PROBE = (
    "InternVL3 reads <ref>a cat</ref><box>[[1, 23, 456, 999]]</box>, schöne Grüße, "
    "书生·万象 \U0001f600\n\n  def f(x):\n\treturn x"
)


class FingerprintError(ValueError):
    """A checkpoint whose files differ from when it was saved; the message lists the entries."""


def fingerprint(
    model: ModelConfig, processor: ProcessorConfig, tokenizer: Tokenizer, dtype: str
) -> dict:
    """Computes the fingerprint from the current configuration and tokenizer.

    Raises:
      ValueError: the template or a token is unknown, or <IMG_CONTEXT> has another id than the
        configuration says.
    """
    if processor.template not in TEMPLATES:
        raise ValueError(
            f"template {processor.template!r} is unknown; supported: {', '.join(TEMPLATES)}"
        )
    image_token_id = tokenizer.token_id("<IMG_CONTEXT>")
    if image_token_id != model.image_token_id:
        raise ValueError(
            f"the tokenizer has <IMG_CONTEXT> at {image_token_id}, the configuration says "
            f"image_token_id {model.image_token_id}"
        )
    default = processor.system_message == "default"
    merges = {} if tokenizer.merges == "all" else {"tokenizer_merges": tokenizer.merges}
    return merges | {
        "template": processor.template,
        "system_text": TEMPLATES[processor.template] if default else processor.system_message,
        "stop_tokens": list(processor.stop_tokens),
        "stop_ids": [tokenizer.token_id(token) for token in processor.stop_tokens],
        "image_ids": [tokenizer.token_id("<img>"), image_token_id, tokenizer.token_id("</img>")],
        "tokenizer_probe": hashlib.sha256(
            json.dumps(tokenizer.encode(_PROBE)).encode()
        ).hexdigest()[:16],
        "image_size": processor.image_size,
        "tokens_per_tile": processor.tokens_per_tile,
        "min_tiles": processor.min_tiles,
        "max_tiles": processor.max_tiles,
        "tiles": processor.tiles,
        "max_total_tiles": processor.max_total_tiles,
        "use_thumbnail": processor.use_thumbnail,
        "mean": list(model.vision.mean),
        "std": list(model.vision.std),
        "apply_exif": processor.apply_exif,
        "frame_label": processor.frame_label,
        "delta": processor.delta,
        "dtype": dtype,
    }


def compare(saved: dict, now: dict, where: str, accept: bool) -> None:
    """Raises FingerprintError unless both are equal or `accept` is set."""
    names = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    if names and not accept:
        lines = "".join(
            f"\n  {name}: made with {saved.get(name)!r}, now {now.get(name)!r}" for name in names
        )
        raise FingerprintError(
            f"{where}: {MANIFEST} records other settings than the files have now:{lines}\n"
            "Restore the files, or load with accept_fingerprint=True (--accept_fingerprint) to use "
            "the present ones"
        )
