"""Prefill, cache, decode loop and sampling: the same tokens as the full forward pass, from few
compiled programs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl3_jax.config import UNITS, MeshConfig
from internvl3_jax.data.batch import Prompt, join_tiles
from internvl3_jax.data.media.tiles import cut_tiles
from internvl3_jax.inference import programs
from internvl3_jax.inference.generator import ContextError, GenerationConfig, Generator
from internvl3_jax.inference.programs import TOKENS_PER_CALL
from internvl3_jax.inference.prompt_batch import TILE_BUCKETS, bucket, tile_pieces
from internvl3_jax.inference.sampling import Sampling, sample
from internvl3_jax.model import kv_cache
from internvl3_jax.model.internvl import InternVL
from internvl3_jax.model.language import unroll
from internvl3_jax.parallel import sharding
from internvl3_jax.positions import build_positions, next_position
from tests.support.tiny_checkpoint import CONFIG, LANGUAGE, PROCESSOR, picture, random_params

PARAMS = random_params(CONFIG)
IMAGE, PER_TILE = CONFIG.image_token_id, CONFIG.tokens_per_tile


@functools.cache
def generator(stop_ids=()) -> Generator:
    return Generator(CONFIG, PARAMS, stop_ids=stop_ids)


def make_run(rows=1, limit=20, seeds=None, **sampling) -> GenerationConfig:
    return GenerationConfig(limit, Sampling(**sampling), seeds or (0,) * rows, "none")


def make_prompt(pictures=(), seed=0, text=5) -> Prompt:
    """`text` tokens before, between and after pictures of noise, given as (tiles, delta in units)."""
    rng = np.random.default_rng(seed)
    tokens, runs, tiles = list(rng.integers(0, IMAGE, text)), [], []
    size = CONFIG.vision.image_size
    for count, _ in pictures:
        runs.append((len(tokens), count * PER_TILE))
        tokens += [IMAGE] * runs[-1][1] + list(rng.integers(0, IMAGE, text))
        tiles.append(rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8))
    positions = build_positions(len(tokens), runs, [delta for _, delta in pictures])
    return Prompt(np.asarray(tokens, np.int32), positions, runs, tiles)


# Prompts of different lengths: with and without pictures, with and without V2PE.
RAGGED = [
    make_prompt([(1, UNITS)], seed=1),
    make_prompt(seed=2, text=9),
    make_prompt([(2, 64), (1, 1)], seed=3),
    make_prompt([(4, 128)], seed=4, text=1),
]


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
    # before the pictures, at the first, behind the second
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
    assert state.cache[0]["k"].shape[1] == 112
    state = generator().start([prompt], run, state.cache, len(first.tokens))
    assert state.cache[0]["k"].shape[1] == 192
    assert [
        token for (piece,) in generator().stream(state, run) for token in piece
    ] == generator().generate([prompt], run)[0]


# --- where an answer ends ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(fsdp=1, tensor=8),
        MeshConfig(data=2, fsdp=1, tensor=4),
        MeshConfig(fsdp=4, tensor=2),
        MeshConfig(fsdp=8),
    ],
    ids=str,
)
def test_a_mesh_draws_the_same_tokens(mesh):
    """Weights and cache split over the devices; 2 key heads on up to 4 of them. Also for sampled
    tokens, and one row alone.
    """
    mesh = sharding.make_mesh(mesh)
    split = jax.device_put(PARAMS, sharding.param_shardings(PARAMS, mesh))
    ours = Generator(CONFIG, split)
    down = ours.params["language"]["layer_0"]["down"]["kernel"]
    assert (
        down.sharding.shard_shape(down.shape)[0]
        == CONFIG.language.intermediate_size // mesh.shape["tensor"]
    )
    for prompts, sampling in ((RAGGED, {}), (RAGGED[:1], {"temperature": 1.0})):
        run = make_run(len(prompts), limit=20, **sampling)
        assert ours.generate(prompts, run) == generator().generate(prompts, run)


@pytest.mark.parametrize("limit", [1, 2, 16, 17, 18, 40])
def test_the_limit_is_kept(limit):
    longest = generator().generate(RAGGED[:1], make_run(limit=40))[0]
    assert generator().generate(RAGGED[:1], make_run(limit=limit))[0] == longest[:limit]


def test_a_stop_id_ends_its_row_alone():
    free = generator().generate(RAGGED, make_run(len(RAGGED)))
    stops = (free[0][0], free[2][7], 9_999)
    stopped = generator(stops).generate(RAGGED, make_run(len(RAGGED)))
    ends = [
        min((place for place, token in enumerate(answer) if token in stops), default=None)
        for answer in free
    ]
    assert ends[0] == 0 and 0 < ends[2] <= 7 and None in ends
    assert stopped == [
        answer if end is None else answer[: end + 1] for answer, end in zip(free, ends, strict=True)
    ]


def test_pieces_come_as_they_are_drawn():
    run = make_run(len(RAGGED), limit=20)
    expected = generator().generate(RAGGED, run)
    state = generator().start(RAGGED, run)
    pieces = list(generator().stream(state, run))
    assert [len(piece) for piece, *_ in pieces] == [1, TOKENS_PER_CALL, 3]
    assert [
        [token for piece in pieces for token in piece[row]] for row in range(len(RAGGED))
    ] == expected


def test_prompts_beyond_the_context_are_refused():
    prompt, limit = make_prompt(text=LANGUAGE.max_position - 20), 20
    generator().check_context_length(prompt, make_run(limit=limit))
    with pytest.raises(
        ContextError,
        match=r"^line 3: the prompt of 2,029 tokens and 20 new ones reach position 2,049; the model knows 2,048\.",
    ):
        generator().check_context_length(
            make_prompt(text=LANGUAGE.max_position - 19), make_run(limit=limit), "line 3"
        )
    # Under V2PE positions count, not tokens.
    tokens = np.full(8 * LANGUAGE.max_position, IMAGE, np.int32)
    generator().check_context_length(
        Prompt(tokens, build_positions(len(tokens), [(0, len(tokens))], [16]), [], []),
        make_run(limit=limit),
    )


def test_dynamic_scaling_makes_room():
    config = dataclasses.replace(
        CONFIG, language=dataclasses.replace(LANGUAGE, rope_scaling="dynamic", rope_factor=2.0)
    )
    run = GenerationConfig(20, Sampling(), (0,), "dynamic")
    stretched = Generator(config, PARAMS)
    stretched.check_context_length(make_prompt(text=2 * LANGUAGE.max_position - 20), run)
    with pytest.raises(ContextError, match="the model knows 4,096"):
        stretched.check_context_length(make_prompt(text=2 * LANGUAGE.max_position - 19), run)
    with pytest.raises(ContextError, match="the model knows 2,048"):
        stretched.check_context_length(
            make_prompt(text=2 * LANGUAGE.max_position - 20), make_run(limit=20)
        )


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
    for count in range(1, 60):
        assert sum(tile_pieces(count)) == count and set(tile_pieces(count)) <= set(TILE_BUCKETS)


def test_compiled_programs_are_no_more_than_buckets():
    """100 random pictures with prompts of random lengths; afterwards nothing at all is compiled."""
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
        tiles = cut_tiles(picture(width, height, number), PROCESSOR)
        text = rng.integers(0, IMAGE, int(rng.integers(5, 100)))
        tokens = np.concatenate([text[:4], np.full(len(tiles) * PER_TILE, IMAGE), text[4:]]).astype(
            np.int32
        )
        runs = [(4, len(tiles) * PER_TILE)]
        prompts.append(Prompt(tokens, build_positions(len(tokens), runs, [UNITS]), runs, [tiles]))
        length = bucket(len(tokens))
        slots = bucket(length + run.max_new_tokens + TOKENS_PER_CALL)
        hit["encode_tiles"] |= set(tile_pieces(len(tiles)))
        hit["write_features"] |= {(length, size) for size in tile_pieces(len(tiles))}
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

draw = jax.jit(sample, static_argnums=2)
LOGITS = np.random.default_rng(0).normal(size=(64, 50)).astype(np.float32) * 2


def draws(logits, sampling, seed=0):
    return np.asarray(draw(logits, jax.random.split(jax.random.key(seed), len(logits)), sampling))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=1e-4),
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=1.0, top_p=1e-6),
        Sampling(temperature=5.0, top_k=3, top_p=0.01),
    ],
    ids=str,
)
def test_limits_that_are_greedy(sampling):
    np.testing.assert_array_equal(draws(LOGITS, sampling), LOGITS.argmax(axis=-1))


def allowed(logits, sampling):
    """bool[V] of the tokens that may be drawn, and their probabilities f64[V], by the rule written
    out.
    """
    order = np.argsort(-logits, kind="stable")
    probabilities = np.exp((logits - logits.max()).astype(np.float64) / sampling.temperature)
    kept = np.zeros(len(logits), bool)
    kept[order[: sampling.top_k or len(logits)]] = True
    probabilities = np.where(kept, probabilities, 0)
    probabilities /= probabilities.sum()
    reached = 0.0
    for token in order:
        if reached >= sampling.top_p:
            kept[token] = False
        reached += probabilities[token]
    probabilities = np.where(kept, probabilities, 0)
    return kept, probabilities / probabilities.sum()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_p=0.9),
        Sampling(temperature=1.5, top_k=5),
        Sampling(temperature=1.5, top_k=20, top_p=0.6),
    ],
    ids=str,
)
def test_draws_follow_the_rule(sampling):
    """Exactly the allowed tokens are drawn, as often as their probabilities say."""
    for logits in LOGITS[:2]:
        kept, probabilities = allowed(logits, sampling)
        count = 20_000
        drawn = draws(np.broadcast_to(logits, (count, len(logits))), sampling)
        share = np.bincount(drawn, minlength=len(logits)) / count
        assert (share[~kept] == 0).all()
        assert (share[kept & (probabilities > 1e-3)] > 0).all()
        assert (
            np.abs(share - probabilities)
            < 5 * np.sqrt(probabilities * (1 - probabilities) / count) + 1e-4
        ).all()


def test_the_nucleus_holds_the_token_that_reaches_top_p():
    probabilities = np.asarray([0.1, 0.4, 0.2, 0.3])
    for top_p, expected in [(0.39, {1}), (0.41, {1, 3}), (0.69, {1, 3}), (0.71, {1, 2, 3})]:
        rows = np.broadcast_to(np.log(probabilities).astype(np.float32), (2000, 4))
        assert set(draws(rows, Sampling(temperature=1.0, top_p=top_p)).tolist()) == expected


def test_a_row_is_drawn_as_if_alone():
    sampling = Sampling(temperature=1.0, top_k=30, top_p=0.95)
    keys = jax.random.split(jax.random.key(3), len(LOGITS))
    together = np.asarray(draw(LOGITS, keys, sampling))
    alone = [int(draw(LOGITS[row : row + 1], keys[row : row + 1], sampling)[0]) for row in range(8)]
    assert together[:8].tolist() == alone
    np.testing.assert_array_equal(
        np.asarray(draw(LOGITS[::-1], keys[::-1], sampling))[::-1], together
    )


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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1; it must be 0"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)


@pytest.mark.parametrize("top_p", [1e-45, 1e-40, 1e-12])
def test_the_likeliest_token_is_always_kept(top_p):
    """Also where top_p is 0 in float32."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 50)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 3)
    drawn = sample(logits, keys, Sampling(temperature=1.0, top_p=top_p))
    np.testing.assert_array_equal(np.asarray(drawn)[..., -3:].ravel()[:3], logits.argmax(axis=-1))
