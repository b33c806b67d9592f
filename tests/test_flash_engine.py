"""The router in the engine: the answers of a restatement in torch with tiles of both kinds, whatever
else is asked meanwhile.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch

from internvl3_jax.config import UNITS, MeshConfig
from internvl3_jax.inference import flash
from internvl3_jax.inference.engine.engine import Engine
from internvl3_jax.inference.engine.request import Request
from internvl3_jax.inference.generator import Generator
from internvl3_jax.parallel.sharding import make_mesh, param_shardings
from internvl3_jax.positions import build_positions
from tests.support.engine import COMPILED, ask
from tests.support.flash_reference import flash_pair
from tests.support.parity import as_prompt, make_row, pixels

NEW = 10  # tokens of an answer
IMAGES = [((4,), UNITS), ((3, 2), UNITS), ((4,), 64), ((1, 3, 2), 64), ((1,), UNITS)]


@functools.cache
def generator() -> Generator:
    _, _, config, params = flash_pair()
    return Generator(config, params)


@functools.cache
def prompt_of(tiles, delta, seed):
    _, _, config, _ = flash_pair()
    batch, _ = make_row(config, tiles, seed=seed)
    return as_prompt(config, batch, tiles, [delta] * len(tiles))


@functools.cache
def expected(tiles, delta, seed, is_on=True):
    """Returns (ids of the answer, which tiles are compressed) of the restatement."""
    model, _, config, _ = flash_pair()
    prompt = prompt_of(tiles, delta, seed)
    every = np.concatenate(prompt.tiles)
    spans = [(start, count // config.tokens_per_tile) for start, count in prompt.runs]
    decisions = None if is_on else torch.zeros(len(every), dtype=torch.bool)
    answer, _, decisions = model.run(
        prompt.tokens, spans, pixels(every, config), delta / UNITS, NEW, decisions
    )
    return answer, decisions.tolist()


def decided(ticket):
    return np.concatenate(ticket.request.prompt.compressed).tolist()


def request(tiles, delta, seed, **settings):
    return Request(prompt_of(tiles, delta, seed), max_new_tokens=NEW, **settings)


@pytest.mark.parametrize(("tiles", "delta"), IMAGES)
def test_greedy_answers_are_those_of_torch(tiles, delta):
    engine = Engine(generator(), rows=2)
    (ticket,) = ask(engine, request(tiles, delta, seed=3))
    answer, compressed = expected(tiles, delta, 3)
    assert decided(ticket) == compressed
    assert ticket.ids == answer
    (off,) = ask(engine, request(tiles, delta, seed=3, flash="off"))
    assert off.ids == expected(tiles, delta, 3, False)[0]
    assert off.request.prompt.compressed is None
    if any(compressed):
        assert len(ticket.request.prompt.tokens) < len(off.request.prompt.tokens)


def test_the_cases_have_tiles_of_both_kinds():
    found = [expected(tiles, delta, 3) for tiles, delta in IMAGES]
    assert sum(any(kinds) and not all(kinds) for _, kinds in found) >= 3
    assert any(found[i][0] != expected(*IMAGES[i], 3, False)[0] for i in range(len(found)))


def test_neighbors_change_neither_decisions_nor_answers_and_nothing_compiles():
    engine = Engine(generator(), rows=3, max_length=256)
    engine.warm_up()
    COMPILED.clear()
    cases = [(tiles, delta, seed) for tiles, delta in IMAGES for seed in (3, 4)]
    requests = [request(*case) for case in cases]
    requests += [request(*cases[0], flash="off"), request(*cases[0]), request(*cases[2])]
    tickets = ask(engine, *requests)
    for case, ticket in zip([*cases, None, cases[0], cases[2]], tickets, strict=True):
        answer, compressed = expected(*(case or cases[0]), case is not None)
        assert ticket.ids == answer
        if case is not None:
            assert decided(ticket) == compressed
    assert not COMPILED
    stats = engine.stats
    counted = [flash.counts(ticket.request.prompt) for ticket in tickets]
    assert (stats.tiles, stats.compressed_tiles) == tuple(map(sum, zip(*counted, strict=True)))
    assert 0 < stats.compressed_tiles < stats.tiles
    assert stats.prompt_tokens == sum(len(ticket.request.prompt.tokens) for ticket in tickets)


def test_a_mesh_changes_no_answer():
    _, _, config, params = flash_pair()
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    sharded = jax.device_put(params, param_shardings(params, mesh))
    engine = Engine(Generator(config, sharded), rows=2)
    cases = [((3, 2), UNITS, 3), ((4,), 64, 3)]
    for case, ticket in zip(cases, ask(engine, *(request(*case) for case in cases)), strict=True):
        assert (ticket.ids, decided(ticket)) == expected(*case)


def test_images_are_encoded_once_and_a_conversation_is_reused():
    engine = Engine(generator(), rows=1, max_length=256)
    first, again = ask(engine, request((4,), UNITS, 3)), ask(engine, request((4,), UNITS, 3))
    assert first[0].ids == again[0].ids == expected((4,), UNITS, 3)[0]
    assert again[0].reused_tokens == len(again[0].request.prompt.tokens) - 1
    assert engine.stats.image_misses == 1
    # The same image with another decision about its tiles is another image.
    (off,) = ask(engine, request((4,), UNITS, 3, flash="off"))
    assert off.ids == expected((4,), UNITS, 3, False)[0]
    assert off.reused_tokens <= off.request.prompt.runs[0][0] + 1
    assert engine.stats.image_misses == 1 and engine.stats.image_hits == 1


def test_features_that_are_not_kept_are_computed_again():
    engine = Engine(generator(), rows=1, max_length=256, image_bytes=0)
    tickets = ask(engine, *(request((3, 2), UNITS, seed) for seed in (3, 3, 4, 3)))
    for ticket, seed in zip(tickets, (3, 3, 4, 3), strict=True):
        assert ticket.ids == expected((3, 2), UNITS, seed)[0]


def test_a_cancelled_request_does_not_stop_the_next_one():
    engine = Engine(generator(), rows=1, max_length=256)
    left = engine.submit(request((3, 2), UNITS, 3))
    stays = engine.submit(request((4,), UNITS, 3))
    engine.cancel(left)
    engine.run()
    assert left.finish == "cancelled" and stays.ids == expected((4,), UNITS, 3)[0]


def test_a_prompt_that_cannot_be_compressed_fails_alone():
    engine = Engine(generator(), rows=1, max_length=256)
    prompt = prompt_of((4,), UNITS, 3)
    positions = prompt.positions.copy()
    positions[prompt.runs[0][0] + 5] += 1
    odd = dataclasses.replace(prompt, positions=positions)
    bad, good = ask(engine, Request(odd, max_new_tokens=NEW), request((4,), UNITS, 3))
    assert bad.finish == "error" and "one V2PE step per image" in str(bad.error)
    assert good.ids == expected((4,), UNITS, 3)[0]


# --- the rule -------------------------------------------------------------------------------------


def test_on_several_hosts_an_error_of_the_tower_ends_the_engine():
    """Only one host may have met it while the router's tiles are encoded."""
    engine = Engine(generator(), rows=1, max_length=256)
    engine._scheduler.isolates_errors = False

    def fail(*_):
        raise MemoryError("no memory on this host")

    engine._device.encode = fail
    ticket = engine.submit(request((2,), 1, 0))
    with pytest.raises(MemoryError, match="no memory on this host"):
        engine.run()
    assert (ticket.finish, type(ticket.error)) == ("error", MemoryError)


def test_the_quantile_is_that_of_torch():
    rng = np.random.default_rng(0)
    for _ in range(300):
        values = rng.random(int(rng.integers(1, 30)), np.float32)
        share = float(rng.choice([0.0, 0.1, 0.25, 0.5, 0.9, 1.0, rng.random()]))
        theirs = torch.quantile(torch.from_numpy(values), share).numpy()
        np.testing.assert_allclose(flash.quantile(values, share), theirs, rtol=1e-6)
        assert ((values > flash.quantile(values, share)) == (values > theirs)).all()


def test_the_rule_of_a_request():
    _, _, config, _ = flash_pair()
    config = dataclasses.replace(config, flash_relative=0.5, flash_absolute=0.4)
    chosen = flash.choose(
        [np.float32([0.1, 0.9, 0.39]), np.float32([0.2]), np.float32([0.4])], config
    )
    assert [tiles.tolist() for tiles in chosen] == [[False, True, False], [False], [True]]
    assert flash.choose([np.float32([0.99])], config)[0].tolist() == [False]
    assert flash.choose([], config) == []


def test_positions_of_a_compressed_prompt_are_exact():
    _, _, config, _ = flash_pair()
    full, few = config.tokens_per_tile, config.tokens_per_compressed_tile
    for delta in (UNITS, 64, 1):
        prompt = prompt_of((2, 1), delta, 5)
        chosen = [np.asarray([True, False]), np.asarray([True])]
        found = flash.compress(prompt, chosen, config)
        (start, _), (second, _) = prompt.runs
        assert found.runs == [(start, few + full), (second - full + few, few)]
        assert (found.tokens == config.image_token_id).sum() == full + 2 * few
        text = prompt.tokens != config.image_token_id
        kept = found.tokens != config.image_token_id
        np.testing.assert_array_equal(found.tokens[kept], prompt.tokens[text])
        wanted = build_positions(len(found.tokens), found.runs, [delta] * 2)
        np.testing.assert_array_equal(found.positions, wanted)
        nothing = flash.compress(prompt, [np.zeros(2, bool), np.zeros(1, bool)], config)
        np.testing.assert_array_equal(nothing.positions, prompt.positions)


@pytest.mark.parametrize(("mode", "message"), [
    ("on", "flash is 'on'; it must be 'off' or 'auto'"),
    ("auto", "flash is 'auto', but the checkpoint has no router"),
])  # fmt: skip
def test_modes_that_do_not_exist(mode, message):
    _, _, config, _ = flash_pair()
    plain = dataclasses.replace(config, flash=False)
    assert not flash.uses_router(None, plain) and not flash.uses_router("off", plain)
    assert flash.uses_router(None, config) and not flash.uses_router("off", config)
    with pytest.raises(ValueError, match=message):
        flash.uses_router(mode, plain)
