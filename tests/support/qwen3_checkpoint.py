"""A tiny InternVL3.5: the original layout with random weights, and a tokenizer with <think>."""

import json
import pathlib

from examples.tiny_digits.recipe import tokenizer as tiny_tokenizer
from tests.support.released import reduce, write_released

THINK = ("<think>", "</think>")


def tokenizer_files() -> dict[str, bytes]:
    """Returns the digits tokenizer with Qwen3's tokens before InternVL's, as in the released files.

    They are not marked as special. <IMG_CONTEXT> is 455, and 453, its usual id here, is <img>.
    """
    files = tiny_tokenizer.build()
    tokens = list(json.loads(files["added_tokens.json"]))
    tokens[3:3] = THINK
    added = {token: tiny_tokenizer.ENTRIES + index for index, token in enumerate(tokens)}
    settings = json.loads(files["tokenizer_config.json"])
    entries = {entry["content"]: entry for entry in settings["added_tokens_decoder"].values()}
    entries |= {token: entries["<img>"] | {"content": token, "special": False} for token in THINK}
    settings["added_tokens_decoder"] = {str(id): entries[token] for token, id in added.items()}
    return files | {
        "added_tokens.json": json.dumps(added).encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }


def write(directory: pathlib.Path, size: str = "3.5-4b", flash: bool = False) -> pathlib.Path:
    """Writes the released directory of a size at reduced width. flash: with a router."""
    model = reduce(size)
    model.image_token_id = 455
    model.flash = flash
    write_released(directory, model, "internvl")
    for name, content in tokenizer_files().items():
        (directory / name).write_bytes(content)
    return directory
