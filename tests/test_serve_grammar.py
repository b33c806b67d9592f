"""Grammars: what they allow, with the real tokenizer of Qwen2.5; and that no grammar takes the
server's time.
"""

import json
import re
import time

import numpy as np
import pytest

from internvl3_jax.serve.errors import ApiError
from internvl3_jax.serve.grammar import Vocabulary
from internvl3_jax.serve.grammar_fields import GrammarText

SIZE = 151936  # of the released models' logits, beyond the tokenizer's ids


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    return Vocabulary(tokenizer, SIZE, (tokenizer.token_id("<|im_end|>"),))


def drawn(vocabulary, grammar: GrammarText, seed: int, longest: int = 400) -> str | None:
    """A text of random tokens that the grammar allows; None if it does not end."""
    rng, constraint, text = np.random.default_rng(seed), vocabulary.constraint(grammar), b""
    for _ in range(longest):
        allowed = constraint.allowed()
        assert allowed.shape == (SIZE,) and allowed.any()
        assert not allowed[len(vocabulary.token_bytes) :].any()
        token = int(rng.choice(np.flatnonzero(allowed)))
        if token in vocabulary.stop_ids:
            return text.decode()
        assert b"<|" not in vocabulary.token_bytes[token], "a control token"
        text += vocabulary.token_bytes[token]
        constraint.accept(token)
    return None


SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["a", "é", "书"]},
        "n": {"type": "integer", "minimum": -5, "maximum": 5},
        "on": {"oneOf": [{"type": "boolean"}, {"type": "null"}]},
    },
    "required": ["kind", "n", "on"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(5))
def test_json(vocabulary, seed):
    text = drawn(vocabulary, GrammarText("json", json.dumps(SCHEMA), "f"), seed)
    value = json.loads(text)
    assert value.keys() == {"kind", "n", "on"}
    assert value["kind"] in ("a", "é", "书") and -5 <= value["n"] <= 5
    assert value["on"] in (True, False, None)


@pytest.mark.parametrize("seed", range(3))
def test_expressions_and_choices(vocabulary, seed):
    for pattern in (r"[0-9]{3}", r"[0-9]{4}-\w", "(yes|no)( ok){0,2}", "书[生象]"):
        assert re.fullmatch(pattern, drawn(vocabulary, GrammarText("regex", pattern, "f"), seed))
    choices = ["a.b", "(c)", "d|e", "new\nline", "<box>", "é"]
    grammar = GrammarText("choice", json.dumps(choices), "f")
    assert drawn(vocabulary, grammar, seed) in choices
    lark = GrammarText("grammar", 'start: "x" list\nlist: "," | ";" list', "f")
    assert re.fullmatch("x;*,", drawn(vocabulary, lark, seed))


def test_copies_are_apart(vocabulary):
    first = vocabulary.constraint(GrammarText("regex", "ab|ac", "f"))
    second = first.copy()
    tokens = {text: vocabulary.token_bytes.index(text) for text in (b"a", b"b", b"c")}
    first.accept(tokens[b"a"])
    assert first.allowed()[tokens[b"b"]] and first.allowed()[tokens[b"c"]]
    assert second.allowed()[tokens[b"a"]] and not second.allowed()[tokens[b"b"]]
    first.accept(tokens[b"b"])
    assert np.flatnonzero(first.allowed()).tolist() == list(vocabulary.stop_ids)


def test_bytes_of_tokens(tokenizer):
    """Joined, they are the text, also where a token is a part of a letter."""
    known = tokenizer.token_bytes()
    assert len(known) == tokenizer.vocab_size
    for text in ("Hello, world!\n", "naïve 书生 🤗 \t  x", "<ref>a</ref><box>[[1, 2]]</box>"):
        ids = tokenizer.encode(text, special=False)
        assert b"".join(known[token] for token in ids) == text.encode()
    assert known[tokenizer.token_id("<|im_end|>")] == b"<|im_end|>"


HOSTILE = [
    ("regex", "(a{1000}){1000}"),
    ("regex", "((a{100}){100}){100}"),
    ("regex", "(a?){500}a{500}"),
    ("regex", ".{0,1000}" * 50),
    ("regex", "(" * 1000 + ")" * 1000),
    ("json", json.dumps({"type": "object", "properties": {f"p{i}": {} for i in range(3000)}})),
    ("json", json.dumps({"type": "integer", "minimum": 5, "maximum": 1})),
    ("json", '{"$ref": "#"}'),
    ("grammar", 'start: start "x"'),
    (
        "grammar",
        "start: r0\n" + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(99)) + 'r99: "x"',
    ),
]


@pytest.mark.parametrize("kind, text", HOSTILE)
def test_what_is_too_complex_is_refused_before_the_engine_sees_it(vocabulary, kind, text):
    with pytest.raises(ApiError, match="f cannot be used") as caught:
        vocabulary.constraint(GrammarText(kind, text, "f"))
    assert "<" not in caught.value.message[-60:] and len(caught.value.message) < 500


@pytest.mark.parametrize(
    "kind, text",
    [
        ("regex", "(x+x+)+y"),
        ("regex", "(.*)" * 6 + "[^a]{3000}"),
        ("json", json.dumps({"type": "array", "minItems": 10**9})),
        ("json", json.dumps({"const": "x" * 60_000})),
        ("grammar", 'start: a\na: a a | "x"'),
    ],
)
def test_tokens_of_odd_grammars_are_quick(vocabulary, kind, text):
    """None holds the engine's thread up for long; a second is for a busy machine."""
    constraint = vocabulary.constraint(GrammarText(kind, text, "f"))
    for _ in range(20):
        began = time.thread_time()
        allowed = constraint.allowed()
        token = int(np.argmax(allowed))
        constraint.accept(token)
        assert time.thread_time() - began < 1
        if token in vocabulary.stop_ids:
            break
