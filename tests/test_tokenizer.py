"""tokenizer.py against transformers on the real Qwen2.5 vocabulary, and what it says of damaged
files.
"""

import json
import pickle

import numpy as np
import pytest
from tokenizers.decoders import DecodeStream

from internvl3_jax.data.text.tokenizer import Tokenizer
from internvl3_jax.data.text.tokenizer_files import TokenizerError, with_merges
from tests.support.qwen_tokenizer import (
    ADDED_IDS,
    CONTROL,
    INTERNVL,
    MARKUP,
    random_texts,
    write_qwen_tokenizer,
)


@pytest.fixture(scope="module")
def qwen_directory(tmp_path_factory):
    return write_qwen_tokenizer(tmp_path_factory.mktemp("qwen"))


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


def small_files(**changes):
    """A tokenizer of four entries in the released layout; changes replace files, None removes one."""
    files = {
        "vocab.json": {"a": 0, "b": 1, "ab": 2, "<": 3},
        "merges.txt": "#version: 0.2\na b\n",
        "added_tokens.json": {"<img>": 4, "<ref>": 5},
        "tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False},
    }
    files |= {name.replace("__", "."): content for name, content in changes.items()}
    encoded = {
        name: content if isinstance(content, str) else json.dumps(content)
        for name, content in files.items()
        if content
    }
    return {name: content.encode() for name, content in encoded.items()}


def test_small_tokenizer():
    tokenizer = Tokenizer.from_files(small_files())
    assert tokenizer.encode("ab<img>b<ref>") == [2, 4, 1, 5]
    # entries for i, m, g and > are lacking, so BPE drops them
    assert tokenizer.encode("<img><ref>", special=False) == [3, 5]
    assert tokenizer.bos_id is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab__json": None, "merges__txt": None}, "holds no tokenizer; expected tokenizer.json"),
        ({"merges__txt": None}, "merges.txt is missing"),
        ({"vocab__json": None}, "vocab.json is missing"),
        ({"vocab__json": '{"a": 0, '}, "vocab.json: is not JSON .*damaged"),
        (
            {"vocab__json": "[1, 2]"},
            r"vocab.json: is the list \[1, 2\]; expected an object; the file is damaged",
        ),
        (
            {"vocab__json": {"a": 0, "b": 0, "ab": 2, "<": 3}},
            "vocab.json: 'a' and 'b' both have the id 0",
        ),
        (
            {"vocab__json": {"a": 0, "b": 1.5, "ab": 2, "<": 3}},
            "vocab.json: 'b' is the number 1.5; expected a whole number",
        ),
        (
            {"added_tokens__json": {"<img>": 4, "<ref>": 4}},
            "the added tokens <img> and <ref> both have the id 4",
        ),
        (
            {"added_tokens__json": {"<img>": 2**60}},
            "added_tokens.json: '<img>' is .*; expected from 0 to",
        ),
        (
            {"tokenizer_config__json": {"added_tokens_decoder": {"x": {"content": "<img>"}}}},
            "'x' is not an id of a token",
        ),
        (
            {"tokenizer_config__json": {"added_tokens_decoder": {"4": {}}}},
            "'4': content is missing",
        ),
        (
            {"tokenizer_config__json": {"bos_token": 5}},
            "bos_token is the number 5; expected a text or an object",
        ),
        (
            {"tokenizer_config__json": {"add_bos_token": "no"}},
            "add_bos_token is the text 'no'; expected true or false",
        ),
        (
            {"tokenizer__json": {"model": {"vocab": {}, "merges": [["a", 1]]}}},
            r"merges\[0\] is the number 1; expected a text",
        ),
        (
            {"tokenizer__json": {"model": {}, "added_tokens": [{"id": 1}]}},
            r"added_tokens\[0\]: content is missing",
        ),
        (
            {"internvl3_jax_tokenizer__json": {"merges": "fast"}},
            "merges is 'fast'; expected one of 'all', 'slow'",
        ),
        (
            {"merges__txt": "#version: 0.2\n"},
            "1 entries of vocab.json, such as 'ab', have no line in merges.txt",
        ),
        ({"merges__txt": "a b\nab b\n"}, "line 'ab b' of merges.txt names or makes no entry"),
        (
            {"tokenizer__json": {"version": "1.0", "model": {"type": "?"}}},
            "cannot build this tokenizer",
        ),
        (
            {"added_tokens__json": {"<img>": 4, "<ref>": 6}},
            "added token <ref> should have id 6 but gets 5",
        ),
        (
            {
                "tokenizer_config__json": {
                    "added_tokens_decoder": {"7": {"content": "<img>", "special": True}}
                }
            },
            "gives token <img> the id 7, another 4",
        ),
        (
            {"tokenizer_config__json": {"tokenizer_class": "GPT2Tokenizer"}},
            "of a GPT2Tokenizer, whose rule",
        ),
        (
            {"vocab__json": None, "merges__txt": None, "tokenizer__model": "junk"},
            "is not a sentencepiece model",
        ),
    ],
)
def test_damaged_files(changes, message):
    with pytest.raises(TokenizerError, match="here.*" + message):
        Tokenizer.from_files(small_files(**changes), "here")


def test_merges_of_the_slow_tokenizer(qwen_directory, tmp_path):
    """transformers before 4.40 took the lines of merges.txt that begin with # for comments."""
    for layout in ("vocab", "json"):
        files = Tokenizer.from_directory(write_qwen_tokenizer(tmp_path / layout, layout)).files()
        every, slow = (
            Tokenizer.from_files(with_merges(files, merges)) for merges in ("all", "slow")
        )
        assert (every.merges, slow.merges) == ("all", "slow")
        assert every.encode("### Step 1") == [14374, 14822, 220, 16]
        assert (
            slow.encode("### Step 1")
            == pickle.loads(pickle.dumps(slow)).encode("### Step 1")
            == [2, 2, 2, 14822, 220, 16]
        )
        assert slow.decode([2, 2, 2, 14822, 220, 16]) == "### Step 1"
        assert slow.encode("No heading, 1 < 2") == every.encode("No heading, 1 < 2")
        assert with_merges(slow.files(), "all") == every.files()


def test_tokens_that_an_owner_added_are_one_id_and_control_tokens_stay_text(qwen_directory):
    files = Tokenizer.from_directory(qwen_directory).files()
    ids = json.loads(files["added_tokens.json"]) | {
        "<point>": 151674,
        "</point>": 151675,
        "<|mine|>": 151676,
    }
    config = json.loads(files["tokenizer_config.json"]) | {"pad_token": {"content": "<|mine|>"}}
    flags = {
        "special": True,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
    }
    config.setdefault("added_tokens_decoder", {}).update(
        {"151674": {"content": "<point>", **flags}}
    )
    changed = {
        "added_tokens.json": json.dumps(ids).encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
    tokenizer = Tokenizer.from_files(files | changed)
    for special in (True, False):
        assert tokenizer.encode("<point>5</point>", special=special) == [151674, 20, 151675]
    assert tokenizer.decode([151674, 20, 151675]) == "<point>5</point>"
    for typed in (*CONTROL, "<|mine|>"):
        assert tokenizer.token_id(typed) not in tokenizer.encode(f"a {typed} b", special=False)


def test_missing_directory(tmp_path):
    with pytest.raises(TokenizerError, match="nowhere is not a directory"):
        Tokenizer.from_directory(tmp_path / "nowhere")


def test_missing_tokens_are_named():
    tokenizer = Tokenizer.from_files(small_files(), "base")
    with pytest.raises(
        TokenizerError, match="base: the tokenizer has no token </img>; .* with ids from 6 on"
    ):
        tokenizer.token_id("</img>")
    with pytest.raises(TokenizerError, match="no token </img>, <IMG_CONTEXT>;"):
        tokenizer.require("<img>", "</img>", "<IMG_CONTEXT>")


def test_half_a_surrogate_pair_is_refused(qwen):
    with pytest.raises(TokenizerError, match=r"U\+D83D, at index 1"):
        qwen.encode("a\ud83d")


def test_tokenizer_json_settings_do_not_cut_or_pad(qwen_directory):
    from tokenizers import Tokenizer as Library

    library = Library.from_str(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
            }
        )
    )
    library.enable_truncation(2)
    library.enable_padding(length=8)
    tokenizer = Tokenizer.from_files({"tokenizer.json": library.to_str().encode()})
    assert tokenizer.encode("aaaa") == [0, 0, 0, 0]
