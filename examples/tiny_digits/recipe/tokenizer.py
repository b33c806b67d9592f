"""Trains the tokenizer of the digits model: Qwen2.5's construction with 448 entries.

Normalizer, split rule, byte-level alphabet and added tokens are those of the released models, so
that the same code reads it. The corpus is the prompts and a little English.
"""

import json

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from examples.tiny_digits.recipe import data as digits
from internvl3_jax.data.text.tokenizer_files import QWEN2_SPLIT

ENTRIES = 448  # before the added tokens
ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
MARKUP = ("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
# Plain English, so that the merges are words.
_TEXT = (
    "What is in the picture? Describe the image in detail. "
    "There are several handwritten digits on a sheet of paper.",
    "The first number is larger than the second one. "
    "Please answer the question with a single word or phrase. Where is it? Is there any text?",
    "Read the number from left to right and locate every digit. "
    "Compare both pictures and say which of them shows the larger number.",
)


def build() -> dict[str, bytes]:
    """Returns file name -> content: vocab.json, merges.txt, added_tokens.json,
    special_tokens_map.json, tokenizer_config.json.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=ENTRIES, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    if len(model["vocab"]) != ENTRIES:
        raise ValueError(f"the corpus gave {len(model['vocab'])} of {ENTRIES} entries")
    added = {token: ENTRIES + index for index, token in enumerate(ADDED + MARKUP)}
    merges = "".join(f"{' '.join(pair)}\n" for pair in model["merges"])
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    settings = names | {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": 4096,
        "add_bos_token": False,
        "bos_token": None,
        "unk_token": None,
        "errors": "replace",
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(index): _added_entry(token) for token, index in added.items()},
        "additional_special_tokens": list(ADDED[3:] + MARKUP),
    }
    files = {
        "vocab.json": model["vocab"],
        "added_tokens.json": added,
        "special_tokens_map.json": names | {"additional_special_tokens": list(ADDED[3:] + MARKUP)},
        "tokenizer_config.json": settings,
    }
    encoded = {
        name: json.dumps(content, ensure_ascii=False, indent=1).encode()
        for name, content in files.items()
    }
    return encoded | {"merges.txt": b"#version: 0.2\n" + merges.encode()}


def _added_entry(token: str) -> dict:
    return {
        "content": token,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }


def _corpus():
    # Repeated, so that the words of the chat format and of the tasks are merged first.
    yield from ["system\n", "user\n", "assistant\n"] * 50
    yield from [prompt.replace("{}", "") for prompt in digits.PROMPTS.values()] * 50
    yield from [
        "Image-1:",
        "Image-2:",
        ": Image-1",
        ": Image-2",
        ": Neither",
        " > ",
        " < ",
        " = ",
        "[[",
        "]]",
        ", ",
        "], [",
    ] * 50
    yield from _TEXT
