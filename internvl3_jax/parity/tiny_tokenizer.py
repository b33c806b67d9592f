"""A small tokenizer of Qwen's construction: bytes, a few merges, and the tokens of InternVL."""

import json

from tokenizers import pre_tokenizers

THINK = ("<think>", "</think>")
# Words of the chat format and of the questions, of which the merges are made.
_WORDS = ("system", "user", "assistant", "Image-", "Frame-", "Frame", "What", "Ġis", "Ġthe")
_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_IMAGE = ("<img>", "</img>", "<IMG_CONTEXT>")
_MARKUP = ("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")


def build(thinks: bool) -> dict[str, bytes]:
    """Returns file name -> content: vocab.json, merges.txt, added_tokens.json,
    tokenizer_config.json.

    thinks: it has <think> and </think> before InternVL's tokens, as Qwen3.
    """
    vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = []
    for word in _WORDS:
        for length in range(1, len(word)):
            pair = (word[:length], word[length])
            if "".join(pair) not in vocabulary:
                merges.append(" ".join(pair))
                vocabulary.append("".join(pair))
    tokens = [*_CONTROL, *(THINK if thinks else ()), *_IMAGE, *_MARKUP]
    added = {token: len(vocabulary) + index for index, token in enumerate(tokens)}
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "unk_token": None,
        "add_bos_token": False,
        "errors": "replace",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(id): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": token not in THINK,
            }
            for token, id in added.items()
        },
    }
    files = {
        "vocab.json": {token: id for id, token in enumerate(vocabulary)},
        "added_tokens.json": added,
        "tokenizer_config.json": settings,
    }
    encoded = {name: json.dumps(content, indent=1).encode() for name, content in files.items()}
    return encoded | {"merges.txt": ("#version: 0.2\n" + "\n".join(merges) + "\n").encode()}
