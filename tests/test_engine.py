"""The engine: each answer is the one that its request gets alone, whatever else is asked meanwhile,
and nothing is compiled after the warm-up.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from internvl3_jax.config import UNITS
from internvl3_jax.inference.engine.engine import Engine
from internvl3_jax.inference.engine.request import Request, RowSampling
from internvl3_jax.inference.generator import Generator
from tests.support.engine import (
    COMPILED,
    LENGTH,
    adapted_generator,
    alone,
    ask,
    continued,
    forget,
    make_adapter,
    shared_engine,
)
from tests.support.generation import IMAGE, PARAMS, RAGGED, generator, make_prompt, make_run
from tests.support.tiny_checkpoint import CONFIG

# --- the same answers -----------------------------------------------------------------------------


def test_answers_equal_those_of_single_runs():
    engine = shared_engine()
    tickets = ask(engine, *(Request(prompt, max_new_tokens=20) for prompt in RAGGED))
    for index, ticket in enumerate(tickets):
        assert ticket.ids == alone(index, 20)
        assert (ticket.finish, ticket.error) == ("length", None)


def test_sampled_answers_equal_those_of_single_runs():
    engine = shared_engine()
    settings = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 1.3, "top_k": 7},
        {"temperature": 1.0, "top_k": 30, "top_p": 0.9},
    ]
    requests = [
        Request(prompt, RowSampling(**values, seed=index + 5), max_new_tokens=20)
        for index, (prompt, values) in enumerate(zip(RAGGED, settings, strict=True))
    ]
    # One greedy row between the sampled ones, which take different paths.
    requests.insert(2, Request(RAGGED[0], max_new_tokens=20))
    tickets = ask(engine, *requests)
    greedy = tickets.pop(2)
    assert greedy.ids == alone(0, 20)
    for index, (ticket, values) in enumerate(zip(tickets, settings, strict=True)):
        assert ticket.ids == alone(index, 20, index + 5, **values)


def test_answers_are_equal_under_random_arrivals_and_cancellations():
    engine, rng = shared_engine(), np.random.default_rng(0)
    open_tickets, finished, cancelled = [], 0, 0
    for _ in range(300):
        if rng.random() < 0.6 and len(open_tickets) < 12:
            index, limit = int(rng.integers(len(RAGGED))), int(rng.integers(1, 21))
            if rng.random() < 0.5:
                values, seed = {}, 0
            else:
                values, seed = {"temperature": 1.0, "top_p": 0.9}, int(rng.integers(3))
            request = Request(RAGGED[index], RowSampling(**values, seed=seed), limit)
            expected = alone(index, 20, seed, **values)[:limit]
            open_tickets.append((engine.submit(request), expected))
        if rng.random() < 0.1 and open_tickets:
            ticket, _ = open_tickets[int(rng.integers(len(open_tickets)))]
            engine.cancel(ticket)
        engine.step()
        for ticket, expected in [pair for pair in open_tickets if pair[0].finish]:
            open_tickets.remove((ticket, expected))
            if ticket.finish == "cancelled":
                cancelled += 1
                assert ticket.ids == expected[: len(ticket.ids)]
            else:
                finished += 1
                assert ticket.ids == expected
    engine.run()
    assert finished > 50 and cancelled > 5
    for ticket, expected in open_tickets:
        assert ticket.ids == expected[: len(ticket.ids)]
        assert ticket.finish == "cancelled" or ticket.ids == expected


def test_stop_ids_end_each_answer_by_themselves():
    engine = shared_engine()
    expected = [alone(index, 20) for index in range(3)]
    requests = [
        Request(RAGGED[index], max_new_tokens=20, stop_ids=(answer[4 * index + 3],))
        for index, answer in enumerate(expected)
    ]
    for ticket, request, answer in zip(ask(engine, *requests), requests, expected, strict=True):
        end = answer.index(request.stop_ids[0]) + 1
        assert (ticket.ids, ticket.finish) == (answer[:end], "stop")


def test_pieces_add_up_to_the_answer():
    engine, pieces = shared_engine(), []
    ticket = engine.submit(Request(RAGGED[1], max_new_tokens=20), pieces.append)
    engine.run()
    assert [token for piece in pieces for token in piece.ids] == ticket.ids == alone(1, 20)
    assert [piece.finish for piece in pieces][-1] == "length"
    assert all(piece.finish is None for piece in pieces[:-1])
    assert len(pieces[0].ids) == 1  # the first token does not wait for a block


# --- adapters -------------------------------------------------------------------------------------


def test_rows_have_adapters_of_their_own():
    engine, one = shared_engine(), adapted_generator()
    names = [None, "a", "b", "a", "b", None]
    requests = [
        Request(RAGGED[index % 4], max_new_tokens=20, adapter=name)
        for index, name in enumerate(names)
    ]
    answers = set()
    for index, (ticket, name) in enumerate(zip(ask(engine, *requests), names, strict=True)):
        one.use(name)
        assert ticket.ids == one.generate([RAGGED[index % 4]], make_run(1))[0]
        answers.add(tuple(ticket.ids))
    one.use(None)
    assert len(answers) == 6


def test_a_prompt_is_not_reused_under_another_adapter():
    engine = shared_engine()
    forget(engine)
    tickets = [
        ask(engine, Request(RAGGED[0], max_new_tokens=5, adapter=name))[0]
        for name in (None, "a", "b", "a")
    ]
    assert [ticket.reused_tokens for ticket in tickets][:3] == [0, 0, 0]
    assert len({tuple(ticket.ids) for ticket in tickets}) == 3


def test_adapters_with_whole_layers_take_turns():
    """An adapter that replaces parameters of the decoder cannot share a call with others."""
    whole = make_adapter(2, "language/layers/q", seed=5)
    whole.whole = {"language": {"norm": {"scale": 1.5 + jnp.zeros(CONFIG.language.hidden_size)}}}
    one = Generator(CONFIG, PARAMS, named_adapters={"whole": whole})
    engine = Engine(one, rows=2, max_length=LENGTH)
    names = [None, "whole", None, "whole"]
    tickets = ask(engine, *(Request(RAGGED[1], max_new_tokens=9, adapter=name) for name in names))
    for ticket, name in zip(tickets, names, strict=True):
        one.use(name)
        assert ticket.ids == one.generate([RAGGED[1]], make_run(1, 9))[0]
    assert tickets[0].ids != tickets[1].ids


# --- prefixes and images --------------------------------------------------------------------------


def test_equal_prompts_run_once():
    engine = shared_engine()
    forget(engine)
    before = engine.stats
    tickets = ask(
        engine,
        *(
            Request(RAGGED[2], RowSampling(temperature=1.0, seed=seed), max_new_tokens=20)
            for seed in range(5)
        ),
    )
    length = len(RAGGED[2].tokens)
    # Three enter together; then two, which find the prompt in a row and run its last token again.
    reused = [ticket.reused_tokens for ticket in tickets]
    assert reused == [0, length, length, length - 1, length]
    for seed, ticket in enumerate(tickets):
        assert ticket.ids == alone(2, 20, seed, temperature=1.0)
    assert engine.stats.reused_tokens - before.reused_tokens == sum(reused)


def test_a_continued_prompt_runs_from_its_end_on():
    engine = shared_engine()
    forget(engine)
    (first,) = ask(engine, Request(RAGGED[0], max_new_tokens=12))
    longer = continued(RAGGED[0], first.ids, [5, 6, 7])
    (second,) = ask(engine, Request(longer, max_new_tokens=20))
    # All but the answer's last token, which was not run.
    assert second.reused_tokens == len(RAGGED[0].tokens) + 11
    assert second.ids == generator().generate([longer], make_run(1))[0]


def test_another_image_or_delta_is_not_reused():
    engine = shared_engine()
    same_text = [
        make_prompt([(1, UNITS)], seed=21),
        dataclasses.replace(
            make_prompt([(1, UNITS)], seed=21), tiles=make_prompt([(1, UNITS)], seed=22).tiles
        ),
        make_prompt([(1, 64)], seed=21),
    ]
    for prompt in same_text:
        forget(engine)
        (expected,) = ask(engine, Request(prompt, max_new_tokens=20))
        (other,) = ask(engine, Request(same_text[0], max_new_tokens=20))
        if prompt is same_text[0]:
            continue
        # The text before the image, and under another delta the first of its tokens.
        start = same_text[0].runs[0][0]
        assert start <= other.reused_tokens <= start + 1
        assert expected.ids != other.ids
        assert other.ids == generator().generate([same_text[0]], make_run(1))[0]


def test_features_of_images_are_kept_within_their_budget():
    one_tile = CONFIG.tokens_per_tile * CONFIG.language.hidden_size * 4
    engine = Engine(generator(), rows=1, max_length=LENGTH, image_bytes=2 * one_tile)
    prompts = [make_prompt([(1, UNITS)], seed=seed) for seed in range(3)]
    for prompt in [prompts[0], prompts[0], prompts[1], prompts[2], prompts[0]]:
        forget(engine)
        (ticket,) = ask(engine, Request(prompt, max_new_tokens=4))
        assert ticket.ids == generator().generate([prompt], make_run(1, 4))[0]
        assert engine._store.num_bytes <= 2 * one_tile
    assert (engine.stats.image_hits, engine.stats.image_misses) == (1, 4)


def test_long_prompts_enter_in_chunks_between_blocks():
    """A running answer continues while a prompt of several chunks enters."""
    engine = Engine(generator(), rows=2, max_length=4096)
    text = make_prompt(seed=9, text=1200)
    running = engine.submit(Request(RAGGED[1], max_new_tokens=200))
    engine.step()
    engine.step()
    entering = engine.submit(Request(text, max_new_tokens=4))
    counts = []
    while not entering.ids:
        counts.append(len(running.ids))
        engine.step()
    assert len(set(counts)) >= 2  # at most 1,024 tokens of prompts between two blocks
    engine.run()
    assert entering.ids == generator().generate([text], make_run(1, 4))[0]
    assert running.ids == generator().generate([RAGGED[1]], make_run(1, 200))[0]


def test_a_block_ends_when_a_waiting_request_can_enter():
    """A row whose answer has ended is not idle for the rest of a block."""
    engine = shared_engine()
    forget(engine)
    decoded = []
    read = engine._scheduler._read

    def counted():
        started = engine._scheduler._unread[0]
        read()
        if not started.is_first:
            decoded.append((int(started.block.count), started.until_free))

    engine._scheduler._read = counted
    try:
        limits = (20, 6, 20, 9)  # three rows: the last request enters after the second answer
        requests = [Request(RAGGED[k], max_new_tokens=limit) for k, limit in enumerate(limits)]
        tickets = ask(engine, *requests)
    finally:
        del engine._scheduler._read
    for index, (ticket, limit) in enumerate(zip(tickets, limits, strict=True)):
        assert ticket.ids == alone(index, 20)[:limit]
    # The 5 steps that the second answer needs after its first token, then what the longest needs.
    assert decoded == [(5, True), (14, False)]


def test_rows_grow_with_their_content():
    engine = Engine(generator(), rows=2)
    assert engine._device.sizes.capacity == 512
    text = make_prompt(seed=9, text=700)
    short, long = ask(
        engine, Request(RAGGED[0], max_new_tokens=20), Request(text, max_new_tokens=20)
    )
    assert engine._device.sizes.capacity == 768
    assert short.ids == alone(0, 20)
    assert long.ids == generator().generate([text], make_run(1))[0]


# --- programs -------------------------------------------------------------------------------------


def test_no_request_compiles_after_the_warm_up():
    engine, rng = shared_engine(), np.random.default_rng(1)
    compiled = len(COMPILED)
    for number in range(500):
        images = [(int(n), int(rng.choice([256, 64, 1]))) for n in rng.integers(1, 5, 2)]
        prompt = make_prompt(images[: rng.integers(3)], seed=number, text=int(rng.integers(1, 25)))
        sampling = RowSampling(
            temperature=float(rng.choice([0.0, 0.5, 1.0])),
            top_k=int(rng.integers(0, 50)),
            top_p=float(rng.uniform(0.1, 1)),
            min_p=float(rng.choice([0, 0.1])),
            repetition_penalty=float(rng.choice([1, 1.2])),
            presence_penalty=float(rng.choice([0, 0.5])),
            logit_bias={} if rng.random() < 0.7 else {int(rng.integers(50)): 3.0},
            seed=int(rng.integers(100)),
        )
        request = Request(
            prompt,
            sampling,
            max_new_tokens=int(rng.integers(1, 8)),
            stop_ids=tuple(rng.integers(0, IMAGE, rng.integers(0, 5)).tolist()),
            adapter=(None, "a", "b")[number % 3],
            top_logprobs=None if rng.random() < 0.8 else int(rng.integers(0, 20)),
        )
        engine.submit(request)
    engine.run()
    assert engine.stats.finished >= 500
    assert COMPILED[compiled:] == []


def test_a_block_reads_no_more_slots_than_its_longest_row():
    engine, read = Engine(generator(), rows=2, max_length=1024), []
    decode = engine._device.decode

    def note(group, count, slots, until_free):
        read.append(engine._device.sizes.for_reading(slots))
        return decode(group, count, slots, until_free)

    engine._device.decode = note
    ask(engine, Request(RAGGED[1], max_new_tokens=130))
    assert read[0] == 128 and set(read) == {128, 256}
    read.clear()
    ask(
        engine,
        Request(make_prompt(text=300), max_new_tokens=9),
        Request(RAGGED[1], max_new_tokens=40),
    )
    assert read[0] == 384 and read[-1] == 128
