"""Files of a tokenizer: damaged ones are named, and what an owner added or set is followed."""

import json
import pickle

import pytest

from internvl3_jax.data.text.tokenizer import Tokenizer
from internvl3_jax.data.text.tokenizer_files import TokenizerError, with_merges
from tests.support.qwen_tokenizer import CONTROL, write_qwen_tokenizer


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
        name: content if isinstance(content, str | bytes) else json.dumps(content)
        for name, content in files.items()
        if content
    }
    return {
        name: content if isinstance(content, bytes) else content.encode()
        for name, content in encoded.items()
    }


def test_small_tokenizer():
    tokenizer = Tokenizer.from_files(small_files())
    assert tokenizer.encode("ab<img>b<ref>") == [2, 4, 1, 5]
    # entries for i, m, g and > are lacking, so BPE drops them
    assert tokenizer.encode("<img><ref>", special=False) == [3, 5]
    assert tokenizer.bos_id is None
    marked = Tokenizer.from_files(small_files(merges__txt="\ufeff#version: 0.2\na b\n"))
    assert marked.encode("ab<img>b<ref>") == [2, 4, 1, 5]


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
        *(
            (
                {"tokenizer_config__json": {key: value}},
                f"tokenizer_config.json: {key} names '<point>', which has no id in any file",
            )
            for key, value in (
                ("additional_special_tokens", ["<img>", "<point>"]),
                ("extra_special_tokens", {"point_token": {"content": "<point>"}}),
                ("extra_special_tokens", ["<point>"]),
                ("eos_token", "<point>"),
            )
        ),
        (
            {"merges__txt": "#version: 0.2\n"},
            "1 entries of vocab.json, such as 'ab', have no line in merges.txt",
        ),
        ({"merges__txt": b"\xff\xfea\0 \0b\0"}, "merges.txt: is UTF-16 or UTF-32 text"),
        ({"merges__txt": b"a b\n\xe9"}, "merges.txt: line 2 is not UTF-8"),
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
