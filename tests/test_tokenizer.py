"""Token ids and texts of tokenizer.py are those of transformers on the real Qwen2.5 vocabulary."""

import pickle

import numpy as np
import pytest
from tokenizers.decoders import DecodeStream

from internvl3_jax.data.text.tokenizer import Tokenizer
from internvl3_jax.data.text.tokenizer_files import TokenizerError
from tests.support.qwen_tokenizer import (
    ADDED_IDS,
    CONTROL,
    INTERNVL,
    MARKUP,
    random_texts,
    write_qwen_tokenizer,
)


@pytest.fixture(scope="module")
def qwen(qwen_directory):
    return Tokenizer.from_directory(qwen_directory)


@pytest.fixture(scope="module")
def qwen_transformers(qwen_directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(qwen_directory)


def with_control(texts, seed):
    """Puts control tokens into texts at random places."""
    rng = np.random.default_rng(seed)
    for text in texts:
        for _ in range(rng.integers(1, 4)):
            cut = rng.integers(len(text) + 1)
            text = text[:cut] + CONTROL[rng.integers(len(CONTROL))] + text[cut:]
        yield text


def test_qwen_ids(qwen):
    assert qwen.vocab_size == 151674
    assert len(INTERNVL) == 9 and ADDED_IDS["<IMG_CONTEXT>"] == 151667
    assert {token: qwen.token_id(token) for token in ADDED_IDS} == ADDED_IDS
    assert qwen.bos_id is None
    assert qwen.encode("Hello, world") == [9707, 11, 1879]
    assert qwen.encode("") == []


def test_qwen_text_equals_transformers(qwen, qwen_transformers):
    assert type(qwen_transformers).__name__.startswith("Qwen2Tokenizer")
    texts = random_texts(1500, seed=0)
    expected = qwen_transformers(texts).input_ids
    assert [qwen.encode(text) for text in texts] == expected
    assert [qwen.encode(text, special=False) for text in texts] == expected
    assert [
        qwen.decode(ids, skip_special=False) for ids in expected
    ] == qwen_transformers.batch_decode(expected)


def test_qwen_special_tokens_equal_transformers(qwen, qwen_transformers):
    texts = list(with_control(random_texts(500, seed=1), seed=1))
    expected = qwen_transformers(texts).input_ids
    assert [qwen.encode(text) for text in texts] == expected
    assert [
        qwen.decode(ids, skip_special=False) for ids in expected
    ] == qwen_transformers.batch_decode(expected)


def test_tokenizer_json_gives_the_same_ids(qwen, tmp_path):
    other = Tokenizer.from_directory(write_qwen_tokenizer(tmp_path, layout="json"))
    assert other.vocab_size == qwen.vocab_size
    for text in with_control(random_texts(200, seed=2), seed=2):
        assert other.encode(text) == qwen.encode(text)
        assert other.encode(text, special=False) == qwen.encode(text, special=False)


@pytest.mark.parametrize("token", CONTROL)
def test_typed_control_token_stays_text(qwen, token):
    for text in (token, f"a{token}b", f"  {token}\n{token}", token * 3):
        ids = qwen.encode(text, special=False)
        assert not set(ids) & {ADDED_IDS[name] for name in CONTROL}
        assert qwen.decode(ids) == text
        assert ADDED_IDS[token] in qwen.encode(text)


def test_typed_control_tokens_equal_transformers_without_special_tokens(qwen, qwen_transformers):
    texts = [
        text
        for text in with_control(random_texts(300, seed=3), seed=3)
        if not any(token in text for token in MARKUP)
    ]
    assert len(texts) > 50
    expected = qwen_transformers(texts, split_special_tokens=True).input_ids
    assert [qwen.encode(text, special=False) for text in texts] == expected


@pytest.mark.parametrize("token", MARKUP)
def test_markup_is_one_id_in_any_text_and_survives_decoding(qwen, token):
    for special in (True, False):
        ids = qwen.encode(f"a {token}dog", special=special)
        assert ids.count(ADDED_IDS[token]) == 1
        assert qwen.decode(ids) == f"a {token}dog"


def test_decode_leaves_out_control_tokens(qwen):
    ids = qwen.encode("<|im_start|>a<ref>b</ref><img><IMG_CONTEXT></img>c<|im_end|>")
    assert qwen.decode(ids) == "a<ref>b</ref>c"
    assert qwen.decode(np.array(ids, np.int32)) == "a<ref>b</ref>c"
    assert qwen.decode([ADDED_IDS["<box>"], 151900]) == "<box>"  # an id of the padded vocabulary


def stream_text(tokenizer, ids, skip_special=True):
    stream = tokenizer.stream(skip_special)
    return "".join(piece or "" for piece in map(stream.step, ids)) + stream.flush()


def test_stream_equals_decode_and_the_library(qwen, qwen_transformers):
    library = qwen_transformers.backend_tokenizer
    for text in with_control(random_texts(150, seed=4), seed=4):
        ids = qwen.encode(text)
        assert stream_text(qwen, ids) == qwen.decode(ids)
        ours, theirs = qwen.stream(skip_special=False), DecodeStream(skip_special_tokens=False)
        assert [ours.step(id) for id in ids] == [theirs.step(library, id) for id in ids]


def test_stream_of_random_ids_equals_decode(qwen):
    rng = np.random.default_rng(5)
    for _ in range(100):
        # ids below 256 are single bytes
        ids = rng.integers(0, 256 if rng.random() < 0.5 else qwen.vocab_size, size=40)
        assert stream_text(qwen, ids) == qwen.decode(ids)


def test_stream_holds_back_incomplete_characters(qwen):
    ids = qwen.encode("𝔘")
    stream = qwen.stream()
    assert len(ids) > 1
    assert [stream.step(id) for id in ids] == [None] * (len(ids) - 1) + ["𝔘"]
    assert stream.flush() == ""
    assert stream.step(ids[0]) is None
    assert stream.flush() == "\ufffd"
    assert [stream.step(id) for id in qwen.encode("a b")] == ["a", " b"]


def test_pickled_tokenizer_is_the_same(qwen):
    other = pickle.loads(pickle.dumps(qwen))
    assert other.encode("a<|im_end|>", special=False) == qwen.encode("a<|im_end|>", special=False)
    assert other.files() == qwen.files()


def test_files_make_the_same_tokenizer_elsewhere(qwen, qwen_directory, tmp_path):
    assert set(qwen.files()) == {path.name for path in qwen_directory.iterdir()}
    for name, content in qwen.files().items():
        (tmp_path / name).write_bytes(content)
    assert Tokenizer.from_directory(tmp_path).encode("a <ref>b") == qwen.encode("a <ref>b")


def test_half_a_surrogate_pair_is_refused(qwen):
    with pytest.raises(TokenizerError, match=r"U\+D83D, at index 1"):
        qwen.encode("a\ud83d")
