"""Writes a tiny plain language model and vision tower, as released on their own."""

import json

from safetensors.numpy import save_file

from convert.compose import NEW_TOKENS
from convert.config_json import to_hf
from examples.tiny_digits.recipe import tokenizer as tiny_tokenizer
from internvl3_jax.checkpoints import storage
from internvl3_jax.checkpoints.hf.assemble import tensors_from_params
from tests.support.released import random_params, reduce, reduce_processor

KNOWN = 451  # entries of the tokenizer without the nine tokens
ROWS = 480  # of the language model: padded, as Qwen's are


def without_new_tokens(files: dict[str, bytes]) -> dict[str, bytes]:
    """Removes InternVL's tokens from a tokenizer, which leaves that of a plain language model."""
    values = {
        name: json.loads(content) for name, content in files.items() if name.endswith(".json")
    }
    for token in NEW_TOKENS:
        values["added_tokens.json"].pop(token)
    settings = values["tokenizer_config.json"]
    decoder = settings["added_tokens_decoder"].items()
    settings["added_tokens_decoder"] = {
        id: entry for id, entry in decoder if entry["content"] not in NEW_TOKENS
    }
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        values[name]["additional_special_tokens"] = []
    return files | {name: json.dumps(content).encode() for name, content in values.items()}


def write_llm(directory, size: str = "1b", tied: bool = True, seed: int = 1):
    """Writes a plain language model; returns (directory, its leaves by path, the ModelConfig whose
    language part it is).
    """
    directory.mkdir()
    model = reduce(size)
    model.language.vocab_size, model.language.tie_embeddings = ROWS, tied
    params = random_params(model, seed)
    prefix = "language_model."
    tensors = tensors_from_params(model, params, "internvl" if not tied else "hf")
    tensors = {
        name.replace("model.language_model.", prefix + "model."): tensor
        for name, tensor in tensors.items()
    }
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    save_file(tensors, directory / "model.safetensors")
    config = to_hf(model, reduce_processor(model), "hf", "bfloat16")["text_config"]
    (directory / "config.json").write_text(
        json.dumps(config | {"use_mrope": False} if size == "1b" else config)
    )
    for name, content in without_new_tokens(tiny_tokenizer.build()).items():
        (directory / name).write_bytes(content)
    (directory / "generation_config.json").write_text(json.dumps({"temperature": 0.7}))
    return directory, storage.by_path(params), model


def write_tower(directory, kind: str, size: str = "1b", seed: int = 2):
    """Writes an InternViT, alone with or without its prefix, or inside a model of either layout;
    returns (directory, leaves by path).
    """
    directory.mkdir()
    model = reduce(size)
    params = random_params(model, seed)
    layout = "hf" if kind == "hf" else "internvl"
    tensors = tensors_from_params(model, params, layout)
    config = to_hf(model, reduce_processor(model), layout, "bfloat16")
    if kind in ("prefixed", "bare"):
        tensors = {
            name: tensor for name, tensor in tensors.items() if name.startswith("vision_model.")
        }
        config = config["vision_config"]
    if kind == "bare":
        tensors = {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory, storage.by_path(params)
