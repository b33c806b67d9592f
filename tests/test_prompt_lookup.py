"""Prompt lookup: the same greedy tokens in fewer runs of the model."""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from internvl3_jax import Chat, load
from internvl3_jax.inference import programs
from internvl3_jax.inference.generator import Generator
from internvl3_jax.inference.prompt_lookup import GUESSES, guess
from tests.support.generation import PARAMS, RAGGED, generator, make_run
from tests.support.tiny_checkpoint import CONFIG

DIGITS = pathlib.Path(__file__).resolve().parents[1] / "examples" / "tiny_digits"


def lookup_run(rows=1, limit=20, **changes):
    return dataclasses.replace(make_run(rows, limit), prompt_lookup=True, **changes)


def answers_and_runs(model: Generator, prompts, config):
    """Returns the ids of each row, and the runs of the model that gave them."""
    state, answers = model.start(prompts, config), [[] for _ in prompts]
    for pieces in model.stream(state, config):
        for answer, piece in zip(answers, pieces, strict=True):
            answer.extend(piece)
    return answers, np.asarray(state.lookup.num_runs)


def naive_guess(history: list[int]) -> list[int] | None:
    """The rule, written down directly; None without an earlier occurrence."""
    for count in (3, 2):
        for start in range(len(history) - count - 1, -1, -1):
            if len(history) > count and history[start : start + count] == history[-count:]:
                return history[start + count :][:GUESSES]
    return None


def test_guesses_follow_the_latest_occurrence_of_the_last_tokens():
    """Against the rule written down directly, on random rows of few tokens."""
    rng, slots = np.random.default_rng(0), 40
    lengths = rng.integers(1, slots + 1, 300)
    history = rng.integers(0, 4, (len(lengths), slots))
    guesses = np.asarray(guess(jnp.asarray(history), jnp.asarray(lengths)))
    found = 0
    for row, length, actual in zip(history.tolist(), lengths, guesses.tolist(), strict=True):
        expected = naive_guess(row[:length])
        if expected:
            found += 1
            assert actual[: len(expected)] == expected
    assert found > 150


@pytest.mark.parametrize("on_cpu", [True, False])
def test_tokens_are_those_of_plain_decoding(monkeypatch, on_cpu):
    """Ragged rows with images and V2PE, in the loops of both kinds of device."""
    monkeypatch.setattr(programs, "on_cpu", lambda: on_cpu)
    model = Generator(CONFIG, PARAMS)
    rows, limit = len(RAGGED), 45
    plain = model.generate(RAGGED, make_run(rows, limit))
    looked_up, runs = answers_and_runs(model, RAGGED, lookup_run(rows, limit))
    assert looked_up == plain and {len(row) for row in looked_up} == {limit}
    # A random model repeats itself, so many guesses are right.
    assert (runs < limit - 1).all() and (runs >= (limit - 1) / (GUESSES + 1)).all()
    assert [model.generate([prompt], lookup_run(1, limit))[0] for prompt in RAGGED] == plain


def test_a_stop_token_ends_a_row_in_the_middle_of_right_guesses():
    rows, limit = len(RAGGED), 40
    plain = generator().generate(RAGGED, make_run(rows, limit))
    for place in (1, 7, 22):
        stop = (plain[0][place],)
        model = Generator(CONFIG, PARAMS, stop_ids=stop)
        expected = model.generate(RAGGED, make_run(rows, limit))
        assert model.generate(RAGGED, lookup_run(rows, limit)) == expected
        assert expected[0][-1] == stop[0]


@pytest.mark.parametrize("limit", [1, 2, 9, 33])
def test_no_row_gets_more_than_the_limit(limit):
    expected = generator().generate(RAGGED, make_run(len(RAGGED), limit))
    assert generator().generate(RAGGED, lookup_run(len(RAGGED), limit)) == expected


def test_several_rows_of_one_prompt():
    config = lookup_run(2, 12)
    state = generator().start(RAGGED[:1], config)
    rows = [[], []]
    for pieces in generator().stream(state, config):
        for row, piece in zip(rows, pieces, strict=True):
            row.extend(piece)
    assert rows == 2 * generator().generate(RAGGED[:1], make_run(1, 12))


def test_it_needs_greedy_decoding():
    with pytest.raises(ValueError, match=r"temperature is 0.7; prompt_lookup needs greedy"):
        Chat(load(DIGITS), prompt_lookup=True, temperature=0.7)
    with pytest.raises(ValueError, match="prompt_lookup is 1; it must be True or False"):
        Chat(load(DIGITS), prompt_lookup=1)


def test_dynamic_rope_beyond_the_trained_length_is_decoded_plainly():
    """A guess would be the furthest position, on which all frequencies depend."""
    language = dataclasses.replace(CONFIG.language, max_position=25, rope_factor=4.0)
    model = Generator(dataclasses.replace(CONFIG, language=language), PARAMS)
    config = lookup_run(1, 20, scaling="dynamic")
    assert model.start(RAGGED[3:], config).lookup is None
    short = dataclasses.replace(config, max_new_tokens=2)
    assert model.start(RAGGED[1:2], short).lookup is not None


def test_a_conversation_of_the_digits_model_stays_the_same():
    lines = (DIGITS / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    questions = list(map(json.loads, lines))
    checkpoint, runs, tokens = load(DIGITS), 0, 0
    plain, looked_up = Chat(checkpoint), Chat(checkpoint, prompt_lookup=True)
    for question in questions[:10]:
        images = [str(DIGITS / path) for path in question["image"]]
        for chat in (plain, looked_up):
            chat.reset()
            chat(question["prompt"], images=images)
            chat("How many digits are there?")  # from the cache of the first turn
        assert looked_up.last.token_ids == plain.last.token_ids
        assert looked_up.last.reused_tokens == plain.last.reused_tokens > 0
        assert plain.last.model_runs == len(plain.last.token_ids) - 1
        assert looked_up.last.model_runs <= plain.last.model_runs
        runs, tokens = runs + looked_up.last.model_runs, tokens + plain.last.model_runs
    assert runs <= tokens


DOCUMENT = """Invoice 2025-0417. Nordlicht Optik GmbH, Hafenstrasse 12, 20459 Hamburg.
Item: reading lamp LX-300, quantity 4, price 59.90, total 239.60.
Item: magnifier stand MS-12, quantity 2, price 120.00, total 240.00.
Delivery: 12 May 2025. Payment: within 30 days to IBAN DE89 3704 0044 0532 0130 00.
"""
ANSWER = """seller: Nordlicht Optik GmbH
address: Hafenstrasse 12, 20459 Hamburg
invoice: 2025-0417
items: reading lamp LX-300, quantity 4, price 59.90, total 239.60; magnifier stand MS-12, quantity \
2, price 120.00, total 240.00
delivery: 12 May 2025
payment: within 30 days to IBAN DE89 3704 0044 0532 0130 00
"""


def test_an_answer_that_quotes_a_document_needs_less_than_half_of_the_runs():
    """The runs that a model needs which would answer so: the guesses are compared with the answer.

    By characters, so that the rule and not a tokenizer is measured.
    """
    prompt, answer = list(map(ord, DOCUMENT)), list(map(ord, ANSWER))
    whole, slots = prompt + answer, len(prompt) + len(answer) + GUESSES
    history = np.zeros((1, slots), np.int32)
    history[0, : len(whole)] = whole
    length, runs = len(prompt) + 1, 0
    while length < len(whole):
        guesses = np.asarray(guess(jnp.asarray(history), jnp.asarray([length])))[0]
        right = 0
        while (
            right < GUESSES
            and length + right < len(whole)
            and guesses[right] == whole[length + right]
        ):
            right += 1
        length, runs = length + right + 1, runs + 1
    assert 1.4 * runs < 2 * runs < len(answer) - 1


def test_guesses_are_no_tokens_of_the_future():
    """What is behind a row's length is not looked up."""
    history = jnp.asarray([[1, 2, 3, 9, 9, 1, 2, 3, 7, 1, 2, 3]])
    assert guess(history, jnp.asarray([8]))[0, 0] == 9
    assert guess(history, jnp.asarray([12]))[0, 0] == 7
