"""Chat templates against transformers: token ids and trained places of whole conversations."""

import hashlib
import json

import numpy as np
import pytest

from internvl3_jax.config import ProcessorConfig
from internvl3_jax.data.text.chat_template import TEMPLATES, ChatError
from internvl3_jax.data.text.tokenizer import Tokenizer
from internvl3_jax.data.text.tokenizer_files import TokenizerError
from internvl3_jax.positions import build_positions
from tests.support.chat_messages import PROCESSOR, assistant, encode, user
from tests.support.qwen_tokenizer import ADDED_IDS, random_texts


def reference(messages, tiles, transformers_tokenizer, system):
    """Ids and trained mask: each block is one string with the image tokens in it, tokenized by
    itself.
    """
    tiles = iter(tiles)
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    tokens, trained = [], []
    for message in messages:
        content = message["content"]
        while message["role"] == "user" and "<image>" in content:
            image_text = f"<img>{'<IMG_CONTEXT>' * PROCESSOR.tokens_per_tile * next(tiles)}</img>"
            content = content.replace("<image>", image_text, 1)
        ids = transformers_tokenizer(
            f"<|im_start|>{message['role']}\n{content}<|im_end|>\n"
        ).input_ids
        tokens += ids
        trained += (
            [False] * 3 + [True] * (len(ids) - 4) + [False]
            if message["role"] == "assistant"
            else [False] * len(ids)
        )
    return tokens, trained


def random_conversations(count, seed):
    """Messages and tiles; the text around images and at both ends of a message is anything,
    spaces and newlines included.
    """
    rng = np.random.default_rng(seed)
    texts = iter([text for text in random_texts(count * 12, seed) if "<image>" not in text])
    for _ in range(count):
        messages, tiles = [], []
        if rng.random() < 0.2:
            messages.append({"role": "system", "content": next(texts)})
        for _ in range(rng.integers(1, 3)):
            content = next(texts)
            for _ in range(rng.choice([0, 1, 1, 2])):
                content += "\n" * rng.integers(3) + "<image>" + "\n" * rng.integers(3)
                content += next(texts) if rng.random() < 0.7 else ""
                tiles.append(int(rng.integers(1, 5)))
            messages += [user(content), assistant(next(texts))]
        yield messages, tiles


@pytest.mark.parametrize(
    ("setting", "system"),
    [("default", TEMPLATES["internvl2_5"]), (None, None), ("Be brief.", "Be brief.")],
)
def test_random_conversations_equal_the_reference(
    tokenizer, transformers_tokenizer, setting, system
):
    processor = ProcessorConfig(tokens_per_tile=3, system_message=setting)
    for messages, tiles in random_conversations(200, seed=len(str(setting))):
        encoded = encode(messages, tokenizer, tiles, processor)
        tokens, trained = reference(messages, tiles, transformers_tokenizer, system)
        assert encoded.tokens.tolist() == tokens
        assert encoded.loss_mask.tolist() == trained
        context = encoded.tokens == ADDED_IDS["<IMG_CONTEXT>"]
        assert [length for _, length in encoded.runs] == [3 * n for n in tiles]
        assert context.sum() == sum(3 * n for n in tiles)
        assert all(context[start : start + length].all() for start, length in encoded.runs)


@pytest.mark.parametrize("before", ["", "\n", "\n\n", " ", "a", "a\n", "a ", "你", "1"])
@pytest.mark.parametrize("after", ["", "\n", "\n\n", " ", " a", "\na", " \n a", "。", "'s", "\r\n"])
def test_text_next_to_a_image(tokenizer, transformers_tokenizer, before, after):
    messages = [user(f"{before}<image>{after}"), assistant(f"{after}x{before}")]
    tokens, trained = reference(messages, [2], transformers_tokenizer, TEMPLATES["internvl2_5"])
    encoded = encode(messages, tokenizer, [2])
    assert encoded.tokens.tolist() == tokens
    assert encoded.loss_mask.tolist() == trained


def test_worked_example(tokenizer):
    messages = [user("<image>\nHi"), assistant("Yes")]
    encoded = encode(
        messages, tokenizer, [1], ProcessorConfig(tokens_per_tile=2, system_message=None)
    )
    expected = [
        ("<|im_start|>", False), ("user", False), ("\n", False),
        ("<img>", False), ("<IMG_CONTEXT>", False), ("<IMG_CONTEXT>", False), ("</img>", False), ("\n", False), ("Hi", False),
        ("<|im_end|>", False), ("\n", False),
        ("<|im_start|>", False), ("assistant", False), ("\n", False), ("Yes", True), ("<|im_end|>", True), ("\n", False),
    ]  # fmt: skip
    pieces = [tokenizer.decode([id], skip_special=False) for id in encoded.tokens]
    assert list(zip(pieces, encoded.loss_mask.tolist(), strict=True)) == expected
    assert encoded.runs == [(4, 2)]
    assert encoded.tokens.dtype == np.int32 and encoded.loss_mask.dtype == bool
    assert len(build_positions(len(encoded.tokens), encoded.runs, [64])) == len(expected)


def test_default_system_text():
    digest = hashlib.sha256(TEMPLATES["internvl2_5"].encode()).hexdigest()
    assert digest == "bdb4d179c4c458dd9bd365588d3fd15aba0f2b755b4b192383416f610ad3396e"


def test_system_message(tokenizer):
    own = [{"role": "system", "content": "Own."}, user("Hi")]
    starts = {
        "default": f"<|im_start|>system\n{TEMPLATES['internvl2_5']}<|im_end|>\n<|im_start|>user",
        None: "<|im_start|>user",
        "None": "<|im_start|>system\nNone<|im_end|>\n<|im_start|>user",
        "": "<|im_start|>system\n<|im_end|>\n<|im_start|>user",
    }
    for setting, start in starts.items():
        processor = ProcessorConfig(system_message=setting)
        text = tokenizer.decode(
            encode([user("Hi")], tokenizer, processor=processor).tokens, skip_special=False
        )
        assert text.startswith(start)
        text = tokenizer.decode(
            encode(own, tokenizer, processor=processor).tokens, skip_special=False
        )
        assert text == "<|im_start|>system\nOwn.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"


def test_generation_prompt_continues_the_conversation(tokenizer):
    messages = [user("Hi"), assistant("Yes"), user("<image>\nWhat?")]
    prompt = encode(messages, tokenizer, [1], prompt=True)
    plain = encode(messages, tokenizer, [1])
    header = tokenizer.encode("<|im_start|>assistant\n")
    assert prompt.tokens.tolist() == [*plain.tokens, *header]
    assert not prompt.loss_mask[-len(header) :].any()
    answered = encode([*messages, assistant("A cat.")], tokenizer, [1])
    assert answered.tokens[: len(prompt.tokens)].tolist() == prompt.tokens.tolist()
    assert answered.loss_mask[len(prompt.tokens)] and prompt.runs == answered.runs


def test_bos_comes_once(tokenizer):
    class WithBos:
        bos_id = 7

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    messages = [user("<image>"), assistant("b"), user("c")]
    encoded, plain = encode(messages, WithBos(), [1]), encode(messages, tokenizer, [1])
    assert encoded.tokens.tolist() == [7, *plain.tokens]
    assert encoded.loss_mask.tolist() == [False, *plain.loss_mask]
    assert encoded.runs == [(plain.runs[0][0] + 1, plain.runs[0][1])]


def test_unknown_template(tokenizer):
    with pytest.raises(ChatError, match="template 'phi3-chat' is unknown; supported: internvl2_5"):
        encode([user("a")], tokenizer, processor=ProcessorConfig(template="phi3-chat"))


def test_tokenizer_without_the_templates_tokens():
    files = {"vocab.json": {"a": 0}, "added_tokens.json": {"<|im_start|>": 1, "<|im_end|>": 2}}
    files = {name: json.dumps(content).encode() for name, content in files.items()} | {
        "merges.txt": b""
    }
    with pytest.raises(TokenizerError, match="no token <img>, <IMG_CONTEXT>, </img>"):
        encode([user("a")], Tokenizer.from_files(files))
