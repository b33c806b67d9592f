"""The key/value cache in 8 bits: what it holds, what attention computes from it, and generation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl3_jax import Chat, load
from internvl3_jax.config import UNITS, MeshConfig
from internvl3_jax.inference.generator import Generator
from internvl3_jax.model import kv_cache
from internvl3_jax.model.internvl import InternVL
from internvl3_jax.model.language import unroll
from internvl3_jax.model.ops.attention import attention, cache_mask, int8_attention
from internvl3_jax.parallel.sharding import make_mesh, param_shardings
from internvl3_jax.positions import next_position
from tests.support.generation import PARAMS, RAGGED, generator, make_run
from tests.support.tiny_checkpoint import CONFIG, LANGUAGE, directory, make_image

# Values of the cache are within scale / 2 = absmax / 254 of what was written. The logits of the tiny
# model, of size 3, may move by a twentieth of that.
LOGITS = 0.15


def written(dtype, seed=0, rows=3, slots=40):
    """Returns a layer's cache with different counts of tokens in each row, and the counts."""
    rng = np.random.default_rng(seed)
    layer = kv_cache.init_cache(LANGUAGE, rows, slots, dtype)[0]
    k, v = rng.standard_normal((2, rows, 24, 2, 8), np.float32) * [[[[1.0], [30.0]]]]
    layer = kv_cache.write(layer, k, v, np.tile(np.arange(24, dtype=np.int32), (rows, 1)))
    counts = np.array([3, 24, 11], np.int32)
    # One more token in each row, over what padding left there.
    k1, v1 = rng.standard_normal((2, rows, 1, 2, 8), np.float32)
    return kv_cache.write(layer, k1, v1, counts[:, None]), counts


def test_values_are_within_half_a_step():
    full, few = written(jnp.float32)[0], written(jnp.int8)[0]
    assert few["k"].dtype == jnp.int8 and few["k_scale"].shape == (3, 2, 40)
    for full_part, few_part in zip(
        kv_cache.read(full, jnp.float32), kv_cache.read(few, jnp.float32), strict=True
    ):
        bound = np.abs(full_part).max(axis=-1, keepdims=True) / 254
        assert (np.abs(full_part - few_part) <= 1.0001 * bound).all()
    # Free slots are zeros, with the scale 0.
    assert not few["k_scale"][:, :, 25:].any() and not few["v"][:, :, 25:].any()
    sizes = [sum(leaf.nbytes for leaf in layer.values()) for layer in (full, few)]
    assert sizes[1] == sizes[0] * (8 + 4) / 32  # 8 values a vector; 128 of the released models


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scaled_scores_are_those_of_the_unpacked_keys(dtype):
    """Of a ragged batch; the same numbers but for the rounding of `dtype`: bfloat16 queries move
    scores of size 10 by up to a twentieth.
    """
    layer, counts = written(jnp.int8)
    q = jnp.asarray(np.random.default_rng(1).standard_normal((3, 1, 4, 8)), dtype)
    mask = cache_mask(counts[:, None], 40)
    out = int8_attention(q, *kv_cache.read_int8(layer), mask)
    expected = attention(q.astype(jnp.float32), *kv_cache.read(layer, jnp.float32), mask, "xla")
    assert out.dtype == dtype
    atol = 1e-4 if dtype == jnp.float32 else 0.02 * np.abs(expected).max()
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=0, atol=atol)


def test_grown_and_repeated_it_holds_the_same():
    cache = [written(jnp.int8)[0]]
    grown = kv_cache.grow(cache, 64)
    assert kv_cache.num_slots(grown) == 64 and grown[0]["v_scale"].shape == (3, 2, 64)
    twice = kv_cache.repeat(grown, 2)
    for name, leaf in cache[0].items():
        np.testing.assert_array_equal(grown[0][name][:, :, :40], leaf)
        np.testing.assert_array_equal(twice[0][name][1::2], grown[0][name])


# --- generation ----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def step(dtype, params, tokens, positions, slots, cache):
    model = InternVL(CONFIG, dtype, unrolled=True)
    inputs = (tokens, None, positions, slots, cache, "none")
    hidden, cache = model.apply({"params": params}, *inputs, method=InternVL.step)
    return model.apply({"params": params}, hidden, method=InternVL.logits), cache


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_of_a_ragged_batch_are_near_those_of_the_full_cache(dtype):
    """Prompts of different lengths at once, then token by token: as with a cache in `dtype`."""
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), PARAMS)
    params |= {"language": unroll(params["language"], LANGUAGE)}
    lengths = np.asarray([len(prompt.tokens) for prompt in RAGGED], np.int32)
    tokens, positions = np.zeros((2, 4, 64), np.int32)
    for row, prompt in enumerate(RAGGED):
        tokens[row, : lengths[row]], positions[row, : lengths[row]] = (
            prompt.tokens,
            prompt.positions,
        )
    slots = np.broadcast_to(np.arange(64, dtype=np.int32), tokens.shape)
    answers = np.random.default_rng(0).integers(0, 400, (4, 8)).astype(np.int32)
    following = np.asarray([next_position(prompt.positions) for prompt in RAGGED], np.int32)

    def run(cache_dtype):
        cache = kv_cache.init_cache(LANGUAGE, 4, 80, cache_dtype)
        logits, cache = step(dtype, params, tokens, positions, slots, cache)
        found = [logits[row, length - 1] for row, length in enumerate(lengths)]
        for index in range(answers.shape[1]):
            place = (following + UNITS * index)[:, None], (lengths + index)[:, None]
            logits, cache = step(dtype, params, answers[:, index : index + 1], *place, cache)
            found += list(logits[:, 0])
        return np.asarray(found)[:, : LANGUAGE.vocab_size]

    full, few = run(dtype), run(jnp.int8)
    assert 0 < np.abs(few - full).max() < LOGITS
    assert np.abs(full).max() > 3


def test_rows_do_not_depend_on_their_neighbors():
    few = Generator(CONFIG, PARAMS, cache_dtype=jnp.int8)
    together = few.generate(RAGGED, make_run(len(RAGGED)))
    for prompt, answer in zip(RAGGED, together, strict=True):
        assert few.generate([prompt], make_run()) == [answer]
    full = generator().generate(RAGGED, make_run(len(RAGGED)))
    # The first token does not read the cache.
    assert [answer[0] for answer in together] == [answer[0] for answer in full]


def test_several_devices_generate_the_same():
    alone = Generator(CONFIG, PARAMS, cache_dtype=jnp.int8).generate(RAGGED, make_run(4))
    for axes in ({"fsdp": 1, "tensor": 2}, {"fsdp": 2, "tensor": 2}, {"fsdp": 1, "tensor": 4}):
        mesh = make_mesh(MeshConfig(**axes), jax.devices()[: axes["fsdp"] * axes["tensor"]])
        params = jax.device_put(PARAMS, param_shardings(PARAMS, mesh))
        assert (
            Generator(CONFIG, params, cache_dtype=jnp.int8).generate(RAGGED, make_run(4)) == alone
        )


def test_a_conversation_continues_in_it():
    """The second turn reads the first one from the cache; several answers to a question copy it."""
    chat = Chat(load(directory(), weights="int8"), cache="int8", max_new_tokens=8)
    chat("What?", images=[make_image(20, 30)])
    second = chat("And now?")
    assert chat.last.reused_tokens > 0
    assert chat.generator.cache_dtype == jnp.int8 and isinstance(second, str)
    with pytest.raises(ValueError, match="cache is 'int4'; it must be int8, or None"):
        Chat(load(directory()), cache="int4")


def test_infer_takes_it(ask):
    answer, _ = ask(prompt="What?", cache="int8", weights="int8")
    assert answer.strip()
