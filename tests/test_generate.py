"""Prefill, cache and decode loop: the same tokens as the full forward pass, from few compiled
programs.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl3_jax.config import UNITS
from internvl3_jax.data.batch import Prompt, join_tiles
from internvl3_jax.data.media.tiles import cut_tiles
from internvl3_jax.inference import layout, programs
from internvl3_jax.inference.generator import Generator
from internvl3_jax.inference.programs import TOKENS_PER_CALL
from internvl3_jax.inference.prompt_batch import TILE_BUCKETS, bucket, tile_pieces
from internvl3_jax.model import kv_cache
from internvl3_jax.model.internvl import InternVL
from internvl3_jax.model.language import unroll
from internvl3_jax.positions import build_positions, next_position
from tests.support.generation import (
    IMAGE,
    PARAMS,
    PER_TILE,
    RAGGED,
    generator,
    make_prompt,
    make_run,
)
from tests.support.meshes import STYLES
from tests.support.tiny_checkpoint import CONFIG, LANGUAGE, PROCESSOR, make_image, random_params


@jax.jit
def _forward(params, batch):
    return InternVL(CONFIG).apply({"params": params}, batch)


def full_logits(prompts, answers):
    """f32[B,T,V] of prompts with their answers behind them, in one pass without a cache; T and N
    are fixed, padding included.
    """
    size = CONFIG.vision.image_size
    tokens, positions, segments = np.zeros((3, len(prompts), 64), np.int32)
    tiles = np.zeros((len(prompts), 4, size, size, 3), np.uint8)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = np.concatenate([prompt.tokens, answer]).astype(np.int32)
        following = next_position(prompt.positions) + UNITS * np.arange(len(answer))
        tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
        positions[row, : len(ids)] = np.concatenate([prompt.positions, following])
        joined = join_tiles(prompt.tiles, size)
        tiles[row, : len(joined)] = joined
    return np.asarray(
        _forward(
            PARAMS, {"tokens": tokens, "positions": positions, "segments": segments, "tiles": tiles}
        )
    )


# --- the same as the full forward pass -----------------------------------------------------------


def test_greedy_tokens_are_those_of_the_full_forward_pass():
    answers = generator().generate(RAGGED, make_run(len(RAGGED)))
    logits = full_logits(RAGGED, answers)
    for row, (prompt, answer) in enumerate(zip(RAGGED, answers, strict=True)):
        assert len(answer) == 20
        steps = logits[row, len(prompt.tokens) - 1 : len(prompt.tokens) + 19]
        assert answer == steps.argmax(axis=-1).tolist()
    assert len({tuple(answer) for answer in answers}) == len(answers)


@pytest.mark.parametrize("style", STYLES)
def test_layouts_give_the_same_tokens(monkeypatch, style):
    """That of a large model on a CPU, and that of accelerators: merged kernels, and a tower whose
    layers are stacked.
    """
    config, answers = STYLES[style], []
    monkeypatch.setattr(layout, "LARGE", 0)
    for on_cpu in (True, False):
        monkeypatch.setattr(programs, "on_cpu", lambda on_cpu=on_cpu: on_cpu)
        found = Generator(config, random_params(config))
        assert ("q" in found.params["language"]["layer_0"]) == on_cpu
        assert ("layer_0" in found.params["vision"]) == on_cpu
        answers.append(found.generate(RAGGED, make_run(len(RAGGED))))
    assert answers[0] == answers[1]


def test_logits_of_every_step_are_those_of_the_full_forward_pass():
    """The model's own `step` on a ragged batch: prompts at once into the cache, then token by
    token.
    """
    prompts, answers = (
        RAGGED,
        [np.random.default_rng(row).integers(0, IMAGE, 8).astype(np.int32) for row in range(4)],
    )
    expected = full_logits(prompts, answers)
    model = InternVL(CONFIG, unrolled=True)
    params = PARAMS | {"language": unroll(PARAMS["language"], LANGUAGE)}
    lengths = np.asarray([len(prompt.tokens) for prompt in prompts], np.int32)

    @jax.jit
    def step(params, tokens, visual, positions, slots, cache):
        hidden, cache = model.apply(
            {"params": params},
            tokens,
            visual,
            positions,
            slots,
            cache,
            "none",
            method=InternVL.step,
        )
        return model.apply({"params": params}, hidden, method=InternVL.logits), cache

    longest = 64
    tokens, positions = np.zeros((2, 4, longest), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : lengths[row]], positions[row, : lengths[row]] = (
            prompt.tokens,
            prompt.positions,
        )
    slots = np.broadcast_to(np.arange(longest, dtype=np.int32), tokens.shape)
    visual = generator().features(prompts, longest, 0)
    logits, cache = step(
        params, tokens, visual, positions, slots, kv_cache.init_cache(LANGUAGE, 4, longest + 8)
    )
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(
            logits[row, :length, : LANGUAGE.vocab_size],
            expected[row, :length],
            rtol=1e-4,
            atol=1e-4,
        )
    following = np.asarray([next_position(prompt.positions) for prompt in prompts], np.int32)
    for index in range(8):
        token = np.asarray([answer[index] for answer in answers])[:, None]
        logits, cache = step(
            params,
            token,
            None,
            (following + index * UNITS)[:, None],
            (lengths + index)[:, None],
            cache,
        )
        wanted = np.stack([expected[row, length + index] for row, length in enumerate(lengths)])
        np.testing.assert_allclose(
            logits[:, 0, : LANGUAGE.vocab_size],
            wanted,
            rtol=1e-4,
            atol=1e-4,
            err_msg=f"step {index}",
        )


def test_a_ragged_batch_gives_what_each_prompt_gives_alone():
    together = generator().generate(RAGGED, make_run(len(RAGGED)))
    assert together == [generator().generate([prompt], make_run())[0] for prompt in RAGGED]


@pytest.mark.parametrize("keep", [3, 5, 22])
def test_going_on_from_a_cache_is_starting_anew(keep):
    """The second prompt shares its beginning with the first, whose cache is full of other things
    behind it.
    """
    prompt = make_prompt([(2, 64), (1, UNITS)], seed=5)
    # before the images, at the first, behind the second
    assert keep in (3, prompt.runs[0][0], prompt.runs[1][0] + PER_TILE)
    run = make_run(limit=24)
    tokens = prompt.tokens.copy()
    tokens[keep:][tokens[keep:] != IMAGE] = 17
    earlier = Prompt(
        tokens,
        prompt.positions,
        prompt.runs,
        [tiles if keep > 5 else 255 - tiles for tiles in prompt.tiles],
    )
    state = generator().start([earlier], run)
    for _ in generator().stream(state, run):
        pass
    state = generator().start([prompt], run, state.cache, keep)
    continued = [token for (piece,) in generator().stream(state, run) for token in piece]
    assert continued == generator().generate([prompt], run)[0]


def test_a_kept_cache_grows():
    """112 slots after the first question, 192 for the second."""
    first, second = make_prompt(seed=6, text=60), make_prompt(seed=7, text=70)
    both = np.concatenate([first.tokens, second.tokens])
    prompt = Prompt(both, build_positions(len(both), [], []), [], [])
    run = make_run(limit=20)
    state = generator().start([first], run)
    assert kv_cache.num_slots(state.cache) == 112
    state = generator().start([prompt], run, state.cache, len(first.tokens))
    assert kv_cache.num_slots(state.cache) == 192
    assert [
        token for (piece,) in generator().stream(state, run) for token in piece
    ] == generator().generate([prompt], run)[0]


# --- shapes --------------------------------------------------------------------------------------


def test_buckets():
    assert [bucket(length) for length in (1, 64, 65, 96, 97, 129, 193, 256, 257)] == [
        64,
        64,
        80,
        96,
        112,
        160,
        224,
        256,
        320,
    ]
    assert [bucket(length) for length in (1025, 3840, 3841)] == [1152, 3840, 4096]
    for on_cpu in (True, False):
        for count in range(1, 60):
            pieces = tile_pieces(count, on_cpu)
            assert sum(pieces) == count and set(pieces) <= set(TILE_BUCKETS[on_cpu])
    assert tile_pieces(13, True) == [8, 4, 1] and tile_pieces(13, False) == [13]


def test_compiled_programs_are_no_more_than_buckets():
    """100 random images with prompts of random lengths; afterwards nothing at all is compiled."""
    # A width of its own: programs that another test compiled must not be found.
    config = dataclasses.replace(
        CONFIG, language=dataclasses.replace(LANGUAGE, intermediate_size=52, num_layers=1)
    )
    own = Generator(config, random_params(config), stop_ids=(456,))
    rng, run = np.random.default_rng(0), make_run(limit=2)
    names = ("encode_tiles", "write_features", "prefill", "decode")
    before = {name: getattr(programs, name)._cache_size() for name in names}
    hit = {name: set() for name in names}
    prompts = []
    for number in range(100):
        width, height = (int(side) for side in rng.integers(4, 80, 2))
        tiles = cut_tiles(make_image(width, height, number), PROCESSOR)
        text = rng.integers(0, IMAGE, int(rng.integers(5, 100)))
        tokens = np.concatenate([text[:4], np.full(len(tiles) * PER_TILE, IMAGE), text[4:]]).astype(
            np.int32
        )
        runs = [(4, len(tiles) * PER_TILE)]
        prompts.append(Prompt(tokens, build_positions(len(tokens), runs, [UNITS]), runs, [tiles]))
        length = bucket(len(tokens))
        slots = bucket(length + run.max_new_tokens + TOKENS_PER_CALL)
        hit["encode_tiles"] |= set(tile_pieces(len(tiles), True))
        hit["write_features"] |= {(length, size) for size in tile_pieces(len(tiles), True)}
        hit["prefill"].add((length, slots))
        hit["decode"].add(slots)
    for prompt in prompts:
        own.generate([prompt], run)
    compiled = {name: getattr(programs, name)._cache_size() - before[name] for name in names}
    assert all(0 < compiled[name] <= len(shapes) for name, shapes in hit.items())
    assert len(hit["prefill"]) <= 6 and len({len(prompt.tokens) for prompt in prompts}) > 40

    compilations = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for prompt in prompts:
            own.generate([prompt], run)
        assert not compilations
        jax.jit(lambda x: x * 3 + 41)(1.0)
        assert compilations  # the event has not been renamed
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


# --- sampling ------------------------------------------------------------------------------------


def test_seeds_decide():
    """The same seed gives the same answer, in any company; every token has a random number of its
    own.
    """
    prompts, hot = RAGGED[:2], {"temperature": 1.0}
    together = generator().generate(prompts * 2, make_run(seeds=(7, 7, 8, 7), **hot))
    assert together[3] == together[1] and together[2] != together[0]
    assert generator().generate([prompts[0]], make_run(seeds=(7,), **hot))[0] == together[0]
    flat = jax.tree.map(jnp.zeros_like, PARAMS)  # every token as likely as every other
    answer = Generator(CONFIG, flat).generate([prompts[0]], make_run(limit=33, **hot))[0]
    assert len(set(answer)) > 25
