"""Rebuilds the real Qwen2.5 tokenizer, with InternVL's nine tokens, from
tests/data/qwen2_5/merges.txt.gz.
"""

import functools
import gzip
import hashlib
import json
from pathlib import Path

import numpy as np

MERGES = Path(__file__).parents[1] / "data" / "qwen2_5" / "merges.txt.gz"
# SHA-256 of merges.txt without its version line, and of the vocabulary's entries by id, one per
# line.
MERGES_SHA256 = "599bab54075088774b1733fde865d5bd747cbcc7a547c5bc12610e874e26f5e3"
VOCAB_SHA256 = "36c3749fd3c87e2402f612459b45ae4e6ce5488a3ecde47a8a3ea3ed3d5dda5a"
BASE_SIZE = 151643

QWEN_SPECIAL = (
    *(
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|object_ref_start|>",
        "<|object_ref_end|>",
        "<|box_start|>",
    ),
    *(
        "<|box_end|>",
        "<|quad_start|>",
        "<|quad_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
        "<|image_pad|>",
    ),
    "<|video_pad|>",
)
QWEN_PLAIN = (
    *(
        "<tool_call>",
        "</tool_call>",
        "<|fim_prefix|>",
        "<|fim_middle|>",
        "<|fim_suffix|>",
        "<|fim_pad|>",
        "<|repo_name|>",
    ),
    "<|file_sep|>",
)
INTERNVL = (
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
)
CONTROL = (*QWEN_SPECIAL, "<img>", "</img>", "<IMG_CONTEXT>")
MARKUP = (*QWEN_PLAIN, "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
ADDED_IDS = {
    token: BASE_SIZE + index for index, token in enumerate(QWEN_SPECIAL + QWEN_PLAIN + INTERNVL)
}

SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@functools.cache
def merges() -> str:
    """Returns merges.txt without its version line."""
    content = gzip.decompress(MERGES.read_bytes())
    assert hashlib.sha256(content).hexdigest() == MERGES_SHA256, (
        f"{MERGES} is not the file this helper was written for"
    )
    return content.decode()


@functools.cache
def vocab() -> dict[str, int]:
    """Entry -> id: GPT-2's symbols of the 256 bytes, the printable ones first, then the merges in
    order.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(byte) for byte in printable] + [
        chr(256 + index) for index in range(256 - len(printable))
    ]
    entries = symbols + [line.replace(" ", "") for line in merges().splitlines()]
    ids = {entry: index for index, entry in enumerate(entries)}
    assert len(ids) == len(entries) == BASE_SIZE
    assert hashlib.sha256("\n".join(entries).encode()).hexdigest() == VOCAB_SHA256
    return ids


def added_tokens() -> list[dict]:
    """Returns the 31 added tokens in the format of tokenizer.json."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": id, "content": token, **flags, "special": token not in QWEN_PLAIN}
        for token, id in ADDED_IDS.items()
    ]


def tokenizer_json() -> dict:
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    options = {
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(),
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            **options,
            "byte_fallback": False,
            "vocab": vocab(),
            "merges": merges().splitlines(),
        },
    }


def write_qwen_tokenizer(directory: str | Path, layout: str = "vocab") -> Path:
    """Writes a tokenizer as the released InternVL3 repositories carry it and returns its directory.

    layout "vocab": vocab.json, merges.txt, added_tokens.json. layout "json": tokenizer.json, as
    newer transformers save it.
    Both with special_tokens_map.json and tokenizer_config.json.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    additional = [*QWEN_SPECIAL[1:], *INTERNVL]
    roles = {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": additional,
    }
    config = roles | {
        "added_tokens_decoder": {str(entry.pop("id")): entry for entry in added_tokens()},
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 12288,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
    }
    contents = {"special_tokens_map.json": roles, "tokenizer_config.json": config}
    if layout == "json":
        contents["tokenizer.json"] = tokenizer_json()
    else:
        contents |= {"vocab.json": vocab(), "added_tokens.json": ADDED_IDS}
        (directory / "merges.txt").write_text("#version: 0.2\n" + merges(), encoding="utf-8")
    for name, content in contents.items():
        (directory / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return directory


FRAGMENTS = (
    *(
        "hello",
        " world",
        "The quick brown fox",
        "It's",
        " they'LL",
        "don't",
        "naïve café",
        "e\u0301",
        "\u1112\u1161\u11ab",
        "\u212b",
    ),
    *(
        "你好，世界。",
        "书生·万象",
        "日本語のテキスト",
        "한국어",
        "Привет",
        "مرحبا",
        "שלום",
        "สวัสดี",
        "हिन्दी",
        "\u0338",
        "\u200b",
        "\u200d",
        "\ufeff",
    ),
    *(
        "😀",
        "👩‍👩‍👧‍👦",
        "🇨🇳",
        "👍🏽",
        "𝔘𝔫𝔦",
        "\U0010ffff",
        "\ufffd",
        "\x00",
        "\x07",
        "\x7f",
        "\x85",
        "\xa0",
        "\u2028",
        "\u3000",
    ),
    *(
        "\n",
        "\n\n",
        "\n\n\n",
        "\r\n",
        "\r",
        "\t",
        "\t\t",
        " ",
        "  ",
        "    ",
        " \n",
        "\n ",
        " \n \n",
        "\v",
        "\f",
    ),
    *(
        "0",
        "12",
        "3.14",
        "2024-05-13",
        "1,234,567",
        "#",
        "## Title",
        "- item",
        "* a",
        "**bold**",
        "`x = 1`",
        "```python\n",
        "| a | b |",
    ),
    *(
        "$\\frac{1}{2}$",
        "<b>",
        "</b>",
        "<|",
        "|>",
        "<|im_end",
        "im_end|>",
        "<img",
        "< img>",
        "IMG_CONTEXT",
        "<Image>",
        "a<b>c",
        "\\n",
    ),
    *(
        "<ref>",
        "</ref>",
        "<box>[[1, 2, 3, 4]]</box>",
        "<quad>",
        "<tool_call>",
        "</tool_call>",
        "<|fim_prefix|>",
        "<|repo_name|>",
    ),
    *(
        "...",
        "!!!",
        "?!",
        "——",
        "“",
        "”",
        "(",
        ")",
        "{",
        "}",
        "https://example.org/a?b=c&d=%20",
        "def f(x):\n    return x\n",
    ),
)


def random_texts(count: int, seed: int) -> list[str]:
    """Texts without control tokens that try every rule of the tokenizer: fragments in random order,
    and random code points.
    """
    rng = np.random.default_rng(seed)
    texts = []
    while len(texts) < count:
        parts = [FRAGMENTS[i] for i in rng.integers(len(FRAGMENTS), size=rng.integers(1, 16))]
        if rng.random() < 0.25:
            top = (0x100, 0x3100, 0xD800, 0x20000)[rng.integers(4)]
            parts += [
                chr(point)
                for point in rng.integers(1, top, size=rng.integers(1, 20))
                if not 0xD800 <= point < 0xE000
            ]
        text = "".join(parts)
        if not any(token in text for token in CONTROL):
            texts.append(text)
    return texts
