"""Trains the tokenizer of the experiment, constructed as those of the released models."""

import json
import pathlib
import sys

import packages
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the clone

from examples.tiny_digits.recipe import tokenizer as tiny_tokenizer
from internvl3_jax.data.text.tokenizer_files import QWEN2_SPLIT

VOCABULARY = 1024  # entries, added tokens included


def write_tokenizer(folder: pathlib.Path, corpus: list[str]) -> None:
    """Writes the files of the digits model's tokenizer with VOCABULARY entries of the corpus."""
    tokens = tiny_tokenizer.ADDED + tiny_tokenizer.MARKUP
    entries = VOCABULARY - len(tokens)
    model = train_bpe(entries, corpus)
    files = tiny_tokenizer.build()

    # The added tokens come after the entries
    settings = json.loads(files["tokenizer_config.json"])
    described = {entry["content"]: entry for entry in settings["added_tokens_decoder"].values()}
    settings["added_tokens_decoder"] = {
        str(entries + index): described[token] for index, token in enumerate(tokens)
    }
    contents = {
        "vocab.json": model["vocab"],
        "added_tokens.json": {token: entries + index for index, token in enumerate(tokens)},
        "tokenizer_config.json": settings,
    }
    for name, content in contents.items():
        files[name] = json.dumps(content, ensure_ascii=False, indent=1).encode()
    merges = [f"{' '.join(pair)}\n" for pair in model["merges"]]
    files["merges.txt"] = "".join(["#version: 0.2\n", *merges]).encode()

    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def train_bpe(entries: int, corpus: list[str]) -> dict:
    """Trains byte-level BPE with Qwen2.5's normalizer and split rule: {"vocab": .., "merges": ..}.

    Raises:
      ValueError: the corpus is too small for so many entries.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.ByteLevel()
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=entries, initial_alphabet=alphabet, show_progress=False
    )
    # Repeated, so that the words of the chat format and the names are single tokens however small
    # the corpus is.
    names = [f"{space}{name}" for name in packages.THINGS for space in ("", " ")]
    frequent = ["system\n", "user\n", "assistant\n", *names] * 1000
    tokenizer.train_from_iterator([*frequent, *corpus], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    if len(model["vocab"]) != entries:
        raise ValueError(
            f"the corpus gave {len(model['vocab'])} of {entries} vocabulary entries; "
            "write a larger one with --scale"
        )
    return model
